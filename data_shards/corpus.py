"""Documents of a corpus, and its division into tasks.

A corpus is a set of files. A *task* is one slice of one file, and the unit
that a worker tokenizes. Plain text and jsonl are cut by byte ranges; whatever
cannot be read from the middle (compressed files, parquet, arrow, hub names) is
one task a file. A document belongs to the slice in which its first byte lies,
so every document is read exactly once however the file is cut.
"""

import glob
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_shards.errors import DamagedDataError, DataSettingError

UNREADABLE = (".zst", ".bz2", ".zip", ".7z", ".lz4", ".tar", ".tgz")
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
TABULAR = {"parquet": "parquet", "arrow": "arrow"}
_DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Corpus:
    """Where the documents of one corpus come from.

    Attributes:
        name: Unique among the corpora of a run; names the shard folder.
        path: File, folder or glob; or a hub dataset name when ``format`` is ``hub``.
        format: ``text``, ``jsonl``, ``parquet``, ``arrow`` or ``hub``.
        documents: What ends a document in plain text: ``line``, ``blank_line`` or ``file``.
        text_column: Field that holds the text in every other format.
    """

    name: str
    path: str
    format: str = "text"
    documents: str = "blank_line"
    text_column: str = "text"


@dataclass(frozen=True)
class Task:
    """Bytes ``[begin, end)`` of a file; ``end`` is -1 for a file that is read whole."""

    index: int
    path: str
    begin: int
    end: int


def corpus_files(corpus: Corpus) -> list[str]:
    """Paths of a corpus in a fixed order; a hub name stands for itself.

    Raises:
        DataSettingError: No file there, or one in a form that is not read.
    """
    if corpus.format == "hub":
        return [corpus.path]
    root = Path(corpus.path)
    if root.is_file():
        files = [str(root)]
    else:
        names = root.rglob("*") if root.is_dir() else map(Path, glob.glob(corpus.path, recursive=True))
        files = sorted(str(name) for name in names if name.is_file() and not name.name.startswith("."))
    if not files:
        raise DataSettingError(
            f"data.corpora: no file at {corpus.path!r} (corpus {corpus.name!r}); "
            "give an existing file, a folder with files or a glob that matches some"
        )
    for file in files:
        if file.endswith(UNREADABLE):
            raise DataSettingError(
                f"{file}: files of this kind are not read (corpus {corpus.name!r}); unpack it, or pack it as .gz or .xz"
            )
    return files


def plan_tasks(corpus: Corpus, task_bytes: int) -> list[Task]:
    """Cuts a corpus into tasks of about ``task_bytes``; depends on nothing but the files' sizes."""
    tasks: list[Task] = []
    for path in corpus_files(corpus):
        if _is_read_whole(corpus, path):
            tasks.append(Task(len(tasks), path, 0, -1))
            continue
        size = Path(path).stat().st_size
        for begin in range(0, size, task_bytes):
            tasks.append(Task(len(tasks), path, begin, min(begin + task_bytes, size)))
    if not tasks:
        raise DamagedDataError(f"{corpus.path}: every file of corpus {corpus.name!r} is empty; nothing to tokenize")
    return tasks


def read_documents(corpus: Corpus, task: Task) -> Iterator[str]:
    """Yields the non-empty documents of a task as stripped text.

    Raises:
        DamagedDataError: Bytes that are not UTF-8, a compressed file cut short,
            a jsonl line that is not an object with the text column.
    """
    if corpus.format in (*TABULAR, "hub"):
        texts = _read_tabular(corpus, task)
    elif corpus.format == "jsonl":
        texts = _read_jsonl(corpus, task)
    elif corpus.documents == "file":
        texts = iter([_decode(_read_all(task.path), task.path, 0)])
    else:
        texts = _read_text(task, corpus.documents)
    for text in texts:
        document = text.strip()
        if document:
            yield document


def digest_files(corpus: Corpus) -> dict[str, str]:
    """SHA-256 of each file's content by path; a hub dataset is named by its own fingerprint."""
    if corpus.format == "hub":
        return {corpus.path: _hub_fingerprint(corpus.path)}
    return {path: digest_file(path) for path in corpus_files(corpus)}


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_read_whole(corpus: Corpus, path: str) -> bool:
    sliceable = corpus.format == "jsonl" or (corpus.format == "text" and corpus.documents != "file")
    return not sliceable or Path(path).suffix in COMPRESSED


def _open(path: str) -> BinaryIO:
    opener = COMPRESSED.get(Path(path).suffix)
    return opener(path, "rb") if opener else open(path, "rb")  # type: ignore[return-value]


def _read_all(path: str) -> bytes:
    try:
        with _open(path) as file:
            return file.read()
    except _DECOMPRESSION_ERRORS as error:
        raise _cut_short(path, error) from error


def _read_text(task: Task, documents: str) -> Iterator[str]:
    """Joins lines into documents. ``begin`` moves forward to the first document that starts in the slice."""
    lines_of_document: list[str] = []
    for offset, line in _lines(task, starts_after_blank=documents == "blank_line"):
        text = _decode(line, task.path, offset)
        if documents == "line":
            yield text
        elif text.strip():
            lines_of_document.append(text)
        else:
            yield "".join(lines_of_document)
            lines_of_document = []
    yield "".join(lines_of_document)


def _lines(task: Task, starts_after_blank: bool) -> Iterator[tuple[int, bytes]]:
    """Lines of the documents that start inside the slice, with their byte offsets.

    With ``starts_after_blank`` a document starts at a line that follows a blank
    one, and the last document of the slice is read to its end beyond ``end``;
    else every line is a document.
    """
    try:
        with _open(task.path) as file:
            offset = _seek_to_first_start(file, task.begin, starts_after_blank)
            inside_document = False
            for line in file:
                past_end = task.end >= 0 and offset >= task.end
                if past_end and not (starts_after_blank and inside_document):
                    return
                yield offset, line
                inside_document = bool(line.strip())
                offset += len(line)
    except _DECOMPRESSION_ERRORS as error:
        raise _cut_short(task.path, error) from error


def _seek_to_first_start(file: BinaryIO, begin: int, starts_after_blank: bool) -> int:
    """Moves to the first line at or after ``begin`` that starts a document; returns its offset."""
    if begin == 0:
        return 0
    file.seek(begin - 1)
    offset = begin - 1 + len(file.readline())  # to a line's start, which may be `begin` itself
    if not starts_after_blank or _line_before_is_blank(file, offset):
        return offset
    while line := file.readline():
        offset += len(line)
        if not line.strip():
            break
    return offset


def _line_before_is_blank(file: BinaryIO, offset: int) -> bool:
    """Whether the line that ends at ``offset`` is blank; leaves the position at ``offset``."""
    is_blank, end = True, offset - 1
    while is_blank and end > 0:
        begin = max(0, end - 4096)
        file.seek(begin)
        _, newline, line = file.read(end - begin).rpartition(b"\n")
        is_blank = not line.strip()
        end = 0 if newline else begin
    file.seek(offset)
    return is_blank


def _read_jsonl(corpus: Corpus, task: Task) -> Iterator[str]:
    for offset, line in _lines(task, starts_after_blank=False):
        if not line.strip():
            continue
        try:
            value = json.loads(_decode(line, task.path, offset))[corpus.text_column]
            text = "" if value is None else str(value)
            text.encode()  # fails on half of a surrogate pair, which JSON can write as "\ud800"
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError) as error:
            raise DamagedDataError(
                f"{task.path}: the line at byte {offset} is not a JSON object with Unicode text in the field "
                f"{corpus.text_column!r}; repair it or set text_column"
            ) from error
        yield text


def _read_tabular(corpus: Corpus, task: Task) -> Iterator[str]:
    from datasets import load_dataset

    try:
        if corpus.format == "hub":
            rows = load_dataset(task.path, split="train", streaming=True)
        else:
            rows = load_dataset(TABULAR[corpus.format], data_files=task.path, split="train", streaming=True)
        for row in rows:
            if corpus.text_column not in row:
                raise DamagedDataError(
                    f"{task.path}: no column {corpus.text_column!r}; it has {', '.join(row)}; set text_column"
                )
            yield str(row[corpus.text_column] or "")
    except (OSError, ValueError) as error:  # what datasets and pyarrow raise on a file they cannot read
        raise DamagedDataError(f"{task.path}: cannot be read as {corpus.format} ({error})") from error


def _hub_fingerprint(name: str) -> str:
    from datasets import load_dataset_builder

    info = load_dataset_builder(name).info
    return hashlib.sha256(f"{name} {info.version} {info.download_checksums}".encode()).hexdigest()


def _decode(line: bytes, path: str, offset: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedDataError(
            f"{path}: byte {offset + error.start} is not UTF-8; convert the file, "
            f"for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error


def _cut_short(path: str, error: Exception) -> DamagedDataError:
    return DamagedDataError(f"{path}: cannot be decompressed to its end ({error}); fetch the file again")
