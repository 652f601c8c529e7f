"""Rows of task files: the values of the fields asked for, and where each row stands in its file.

| ending | content |
|---|---|
| .tsv | cells between tabs, quotes are text; a header, or the task's ``columns`` |
| .csv | cells between commas, quoted where need be |
| .jsonl, .json | an object a line; a list of objects, or SQuAD's layout |
| .parquet | a table |
| .conllu, and any other of a tagging task | a word a line, blank lines between sentences |
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DamagedError

Row = tuple[int | str, tuple[Any, ...]]
"""Where it stands, a line from 1 or in words; and its values, None where an optional field is absent."""

OnBad = Callable[[Path, int | str, str], None]
"""Told of a row that cannot be read: file, place and reason."""


@dataclass(frozen=True)
class Wanted:
    """Fields of a row and what a file may call them.

    Attributes:
        kind: Kind of the task.
        text: Fields with texts.
        label: Field with the label; None in an unlabelled part.
        optional: Fields that a file may lack.
        columns: Columns of a text file whose first line does not name the texts.
        aliases: Other name of a field, used where a file lacks ours.
        classes: Class names by number.
    """

    kind: str
    text: tuple[str, ...]
    label: str | None
    optional: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Texts, then the label."""
        return (*self.text, self.label) if self.label else self.text

    @property
    def fields(self) -> tuple[str, ...]:
        """In the order of a row's values."""
        return (*self.required, *self.optional)

    def name_label(self, value: Any, classes: tuple[str, ...] = ()) -> Any:
        """A class's number, or a list of them, by name; a number below 0 is no label.

        Raises:
            ValueError: A number without a name.
        """
        names = self.classes or classes
        if isinstance(value, list):
            return [self.name_label(one, names) for one in value]
        if isinstance(value, float) and value.is_integer() and self.kind != "regression":
            value = int(value)  # a column of whole numbers and nulls becomes one of floats on many ways to parquet
        if not names or not isinstance(value, int) or isinstance(value, bool):
            return value
        if value >= len(names):
            raise ValueError(f"label number {value} is none of the {len(names)} classes {shorten(names)}")
        return names[value] if value >= 0 else None


def read_rows(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    """Rows of a file, in its order; those that cannot be read go to ``on_bad`` instead.

    Raises:
        ConfigError: A file of a kind that is not read.
        DamagedError: The file as a whole cannot be read, or lacks a column.
    """
    reader = _READERS.get(path.suffix)
    if path.suffix == ".json" and wanted.kind == "question_answering":
        reader = _read_squad
    if reader is None and wanted.kind == "tagging":
        reader = _read_conll
    if reader is None:
        raise ConfigError(f"{path}: files of this kind are not read; give {', '.join(_READERS)}")
    return reader(path, wanted, on_bad)


def shorten(names: Any, most: int = 8) -> str:
    """Names for a message, the first ones of many."""
    shown = [str(name)[:60] for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines from 1, with their ends."""
    encoding = "utf-8-sig"  # only the first line can have the mark
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise DamagedError(
                    f"{path}:{number}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
                ) from None
            encoding = "utf-8"


def _columns(path: Path, found: list[str], wanted: Wanted) -> list[int | None]:
    """Number of each field's column.

    Raises:
        DamagedError: No column of that name.
    """
    numbers = [_number(found, name, wanted.aliases.get(name)) for name in wanted.fields]
    absent = [name for name, number in zip(wanted.required, numbers, strict=False) if number is None]
    if absent:
        raise DamagedError(
            f"{path}: no column {shorten(absent)}; it has {shorten(found)}; the task file's text, label and columns "
            "say what they are called"
        )
    return numbers


def _number(found: list[str], name: str, alias: str | None) -> int | None:
    for called in (name, alias):
        if called in found:
            return found.index(called)
    return None


def _table(path: Path, rows: Iterator[tuple[int, list[str]]], wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    """Rows of cells; the first one is the header if it names all the texts."""
    first = next(rows, None)
    if first is None:
        return
    head = first[1]
    named = all(_number(head, name, wanted.aliases.get(name)) is not None for name in wanted.text)
    names = head if named or not wanted.columns else list(wanted.columns)
    width = len(names)
    pick = itemgetter(*(width if number is None else number for number in _columns(path, names, wanted)))

    def values(line: int, cells: list[str]) -> Iterator[Row]:
        if len(cells) == width:
            cells.append(None)  # type: ignore[arg-type]  # what an absent field points at
            yield line, pick(cells)
        elif cells != [""]:  # a blank line; of one column it would be an empty text
            on_bad(path, line, f"{len(cells)} cells, but there are {width} columns")

    if names is not head:
        yield from values(*first)
    for row in rows:
        yield from values(*row)


def _read_tsv(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in _lines(path))
    yield from _table(path, rows, wanted, on_bad)


def _read_csv(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    rows = ((reader.line_num, cells or [""]) for cells in reader)
    try:
        yield from _table(path, rows, wanted, on_bad)
    except csv.Error as error:
        raise DamagedError(f"{path}:{reader.line_num}: not CSV ({error}); quote the cell, or give a .tsv") from None


def _read_jsonl(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            on_bad(path, number, f"not JSON ({error})")
            continue
        yield from _object(path, number, row, wanted, on_bad)


def _read_json(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    content = _load_json(path)
    if not isinstance(content, list):
        raise DamagedError(f"{path}: not a list of objects; give one, or a .jsonl with an object a line")
    for number, row in enumerate(content):
        yield from _object(path, f"object {number}", row, wanted, on_bad)


def _load_json(path: Path) -> Any:
    text = "".join(line for _, line in _lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DamagedError(f"{path}:{error.lineno}: not JSON ({error.msg}); fetch the file again") from None
    except RecursionError:
        raise DamagedError(f"{path}: JSON nested too deeply; fetch the file again") from None


def _object(path: Path, place: int | str, row: Any, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    if not isinstance(row, dict):
        on_bad(path, place, f"a JSON object is wanted, not {type(row).__name__}")
        return
    values = [row[name] if name in row else row.get(wanted.aliases.get(name, name), _ABSENT) for name in wanted.fields]
    absent = [name for name, value in zip(wanted.required, values, strict=False) if value is _ABSENT]
    if absent:
        on_bad(path, place, f"no field {', '.join(absent)}; the row has {shorten(row) or 'none'}")
        return
    yield from _named(path, place, [None if value is _ABSENT else value for value in values], wanted, (), on_bad)


_ABSENT = object()
_SPACES = re.compile(" +")


def _named(
    path: Path, place: int | str, values: list[Any], wanted: Wanted, classes: tuple[str, ...], on_bad: OnBad
) -> Iterator[Row]:
    """The row, its label by name."""
    if wanted.label:
        number = len(wanted.text)
        try:
            values[number] = wanted.name_label(values[number], classes)
        except ValueError as error:
            on_bad(path, place, str(error))
            return
    yield place, tuple(values)


def _read_parquet(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    first = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            numbers = _columns(path, names, wanted)
            label = numbers[len(wanted.text)] if wanted.label else None
            classes = _class_names(file.schema_arrow.metadata, names[label]) if label is not None else ()
            present = sorted({names[number] for number in numbers if number is not None})
            for batch in file.iter_batches(columns=present):
                nothing = [None] * batch.num_rows
                lists = [nothing if n is None else batch.column(names[n]).to_pylist() for n in numbers]
                for number, values in enumerate(zip(*lists, strict=True), first):
                    yield from _named(path, f"row {number}", list(values), wanted, classes, on_bad)
                first += batch.num_rows
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a disk's errors have a number
            raise
        raise DamagedError(f"{path}: cannot be read as parquet ({error}); fetch the file again") from error


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Names that ``datasets`` has left in the file for the numbers of a column."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        while "names" not in feature:  # of lists: {"feature": …}, or [{…}] as earlier releases wrote it
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return tuple(feature["names"])
    except (KeyError, TypeError, IndexError, ValueError):
        return ()


def _read_conll(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    """Sentences; in CoNLL-U, comments, multi-word tokens and empty nodes are none of their words."""
    columns = [_column_number(path, name) for name in wanted.required]
    universal = path.suffix == ".conllu"
    tokens: list[list[str]] = []
    number, start, problem = 0, 1, ""
    for number, raw in _lines(path):
        line = raw.rstrip("\r\n")
        if not line.strip():
            yield from _sentence(path, start, tokens, problem, wanted, on_bad)
            tokens, problem = [], ""
            continue
        if line.startswith("-DOCSTART-") or (universal and line.startswith("#")):
            continue
        cells = line.split("\t") if "\t" in line else _SPACES.split(line.strip(" "))
        if universal and ("-" in cells[0] or "." in cells[0]):
            continue
        start = start if tokens or problem else number
        try:
            tokens.append([cells[column] for column in columns])
        except IndexError:
            problem = problem or f"line {number} has {len(cells)} columns, too few for {', '.join(wanted.required)}"
        if len(cells) < len(columns):
            problem = problem or f"line {number} has {len(cells)} column, but a word and its tag are two"
    yield from _sentence(path, start, tokens, problem, wanted, on_bad)


def _sentence(
    path: Path, start: int, tokens: list[list[str]], problem: str, wanted: Wanted, on_bad: OnBad
) -> Iterator[Row]:
    if problem:
        on_bad(path, start, f"in this sentence {problem}")
    elif tokens:
        words, *tags = map(list, zip(*tokens, strict=True))
        yield start, (words, *tags, *(None for _ in wanted.optional))


def _column_number(path: Path, name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise ConfigError(
            f"{path}: {name!r} is no column number; text and label count the columns of such a file from 0, or from "
            "the end with -1"
        ) from None


def _read_squad(path: Path, wanted: Wanted, on_bad: OnBad) -> Iterator[Row]:
    content = _load_json(path)
    if isinstance(content, list):
        for number, row in enumerate(content):
            yield from _object(path, f"object {number}", row, wanted, on_bad)
        return
    for number, (context, question) in enumerate(_questions(path, content)):
        name = question.get("id")
        place = f"question {number} (counted from 0)" if name is None else f"question {name!r}"
        answers = [question.get("answers") or []] if wanted.label else []
        flag = question.get("is_impossible", False)
        if isinstance(question.get("question"), str):
            yield place, (question["question"], context, *answers, name, flag)
        else:
            on_bad(path, place, "it has no text under the key question")


def _questions(path: Path, content: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield paragraph["context"], question if isinstance(question, dict) else {}
    except (KeyError, TypeError) as error:
        raise DamagedError(
            f"{path}: not in SQuAD's layout of data, paragraphs, context and qas ({error}); give such a file, or .jsonl"
        ) from None


_READERS: dict[str, Callable[[Path, Wanted, OnBad], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conllu": _read_conll,
}
