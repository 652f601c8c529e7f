"""Documents of a task as text, and what was found while reading them.

Nothing is left out without being counted: bytes that are not UTF-8 become
U+FFFD, a document that is too long is cut, an empty one is passed over, and
``Counts`` says how often.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from data_shards import borders, tables
from data_shards.borders import Region, WholeFile
from data_shards.corpus import Corpus, Slice, Task
from data_shards.errors import DamagedDataError

LONGEST_DOCUMENT_BYTES = 4 << 20
# A line of jsonl is parsed in one piece. Base64 and escapes make it longer than its text.
LONGEST_JSON_LINE_BYTES = 256 << 20
# Of a corpus; more damaged documents are no accident: the file is in another encoding.
_MAX_DAMAGED_FRACTION = 0.01
# Of what has been read, where damage may lie close together: when it is not worth to read on.
_MANY_DAMAGED, _EARLY_FRACTION = 100, 0.1
MAX_EXAMPLES = 5

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Counts:
    """What reading found.

    Attributes:
        documents: Documents given out; each part of a long one is a document.
        text_bytes: Their size in UTF-8; whoever encodes them adds it.
        encoding_errors: Those in which U+FFFD stands for what was not Unicode.
        empty: Lines, files and records with nothing but white space, or null; not given out.
        cut: Documents longer than ``LONGEST_DOCUMENT_BYTES``, given out in parts.
        examples: Where the first few encoding errors stand.
    """

    documents: int = 0
    text_bytes: int = 0
    encoding_errors: int = 0
    empty: int = 0
    cut: int = 0
    examples: list[str] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.text_bytes + other.text_bytes,
            self.encoding_errors + other.encoding_errors,
            self.empty + other.empty,
            self.cut + other.cut,
            [*self.examples, *other.examples][:MAX_EXAMPLES],
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; ``Counts(**counts.to_dict())`` is an equal one."""
        return asdict(self)


def read_documents(corpus: Corpus, task: Task, counts: Counts) -> Iterator[str]:
    """Yields the documents of a task: stripped, not empty, at most ``LONGEST_DOCUMENT_BYTES`` long in UTF-8.

    (U+FFFD is longer than the byte it stands for, so a damaged document may be longer.)

    Args:
        corpus: Says how to read the slices.
        task: What to read.
        counts: Added to as documents are taken.

    Raises:
        DamagedDataError: A file that cannot be unpacked, a jsonl line that is not
            an object with the text column, a table without it, a value in it that
            is not text; after the last document, far too many of ``counts`` that are not UTF-8.
    """
    reader = _Reader(counts)
    for piece in task.slices:
        if corpus.format == "text":
            way = borders.WAYS[corpus.documents]
            for region in borders.regions(piece, way, LONGEST_DOCUMENT_BYTES):
                yield from reader.documents(region, way, piece.path)
        elif corpus.format == "jsonl":
            yield from _read_jsonl(corpus, piece, reader)
        else:
            yield from _read_table(corpus, piece, reader)
    if counts.encoding_errors > _MANY_DAMAGED:
        refuse_other_encoding(counts, _EARLY_FRACTION, "a task")


def refuse_other_encoding(counts: Counts, most: float = _MAX_DAMAGED_FRACTION, of: str = "a corpus") -> None:
    """Ends where so many documents are damaged that it is no accident.

    Args:
        counts: What was found.
        most: The fraction of documents that may be.
        of: What they are in, for people.

    Raises:
        DamagedDataError: More than this fraction of them.
    """
    if counts.encoding_errors > most * counts.documents:
        raise DamagedDataError(
            f"{_describe_damage(counts, most, of)}; convert the file, for example with `iconv -f LATIN1 -t UTF-8`"
        )


def damage_so_far(counts: Counts) -> str:
    """What a corpus would be refused for if this were all of it; empty while that may be chance."""
    is_much = counts.encoding_errors > max(_MANY_DAMAGED, _MAX_DAMAGED_FRACTION * counts.documents)
    return _describe_damage(counts, _MAX_DAMAGED_FRACTION, "a corpus") if is_much else ""


def _describe_damage(counts: Counts, most: float, of: str) -> str:
    return (
        f"{counts.examples[0]}; {counts.encoding_errors:,} of {counts.documents:,} documents have such errors and "
        f"at most {most:.0%} may in {of}"
    )


def _read_jsonl(corpus: Corpus, piece: Slice, reader: "_Reader") -> Iterator[str]:
    lines = borders.WAYS["line"]
    for region in borders.regions(piece, lines, LONGEST_JSON_LINE_BYTES):
        for at, line in borders.each_document(region.data, lines):
            if not line.strip():
                continue
            place = f"{piece.path}: the line at byte {region.offset + at}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                reader.note_error(f"{piece.path}: byte {region.offset + at + error.start} is not UTF-8")
                text = line.decode(errors="replace")
            try:
                value = json.loads(text)[corpus.text_column]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DamagedDataError(
                    f"{place} is not a JSON object with the field {corpus.text_column!r}, of at most "
                    f"{LONGEST_JSON_LINE_BYTES >> 20} MiB; repair it or set text_column"
                ) from error
            yield from reader.value(value, place)


def _read_table(corpus: Corpus, piece: Slice, reader: "_Reader") -> Iterator[str]:
    if corpus.format == "hub":
        name = (corpus.path, corpus.hub_config, corpus.hub_split, corpus.hub_revision)
        values = tables.read_hub_column(*name, piece.path, corpus.text_column)
    else:
        values = tables.read_column(corpus.format, piece.path, corpus.text_column)
    for number, value in enumerate(values):
        yield from reader.value(value, f"{piece.path}: row {number}")


class _Reader:
    """Turns bytes and values into documents, and counts."""

    def __init__(self, counts: Counts):
        self._counts = counts
        self._error_pending = False

    def note_error(self, message: str) -> None:
        """The next document counts as damaged."""
        self._error_pending = True
        if len(self._counts.examples) < MAX_EXAMPLES:
            self._counts.examples.append(message)

    def documents(self, region: Region, way: WholeFile, path: str) -> list[str]:
        """Documents of a region."""
        try:
            documents = self._accept(way.split_text(region.data.decode()), region.part)
        except UnicodeDecodeError:
            documents = []
            for at, document in borders.each_document(region.data, way):
                text = self._decode(document, path, region.offset + at)
                documents += self._accept([text], region.part)
        return documents

    def value(self, value: Any, place: str) -> list[str]:
        """Documents of a field: one, or none, or the parts of a long one.

        Raises:
            DamagedDataError: The value is not text, bytes or None.
        """
        if isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError as error:
                self.note_error(f"{place}: byte {error.start} is not UTF-8")
                text = value.decode(errors="replace")
        elif value is None or isinstance(value, str):
            text = value or ""
        else:  # str() would train the model on brackets and quotes
            kind = type(value).__name__
            article = "an" if kind[0] in "aeiou" else "a"
            raise DamagedDataError(f"{place} holds {article} {kind}, not text; set text_column")
        try:
            is_short = text.isascii() and len(text) <= LONGEST_DOCUMENT_BYTES
            if is_short or len(encoded := text.encode()) <= LONGEST_DOCUMENT_BYTES:
                return self._accept([text], 0)
        except UnicodeEncodeError:
            self.note_error(f"{place} holds half of a surrogate pair")
            encoded = _HALF_SURROGATE.sub("\ufffd", text).encode()
        documents = []
        for region in borders.parts(encoded, 0, LONGEST_DOCUMENT_BYTES):
            documents += self._accept([region.data.decode()], region.part)
        return documents

    def _decode(self, document: bytes, path: str, offset: int) -> str:
        try:
            return document.decode()
        except UnicodeDecodeError as error:
            self.note_error(f"{path}: byte {offset + error.start} is not UTF-8")
            return document.decode(errors="replace")

    def _accept(self, texts: list[str], part: int) -> list[str]:
        documents = [document for text in texts if (document := text.strip())]
        counts = self._counts
        counts.documents += len(documents)
        counts.empty += len(texts) - len(documents)
        counts.cut += part == 1
        counts.encoding_errors += self._error_pending
        self._error_pending = False
        return documents
