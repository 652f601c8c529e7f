"""Fingerprint of a corpus by its content, so that moved files keep their shards.

Units of up to ``DIGEST_BYTES`` are hashed one by one and remembered on disk.
Several processes share the work without locks: each begins with units of its
own, looks before each one whether another has done it, and can finish alone.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_shards import tables
from data_shards.corpus import Corpus, Slice, Task, corpus_files, plan_tasks
from data_shards.errors import DamagedDataError

DIGEST_BYTES = 256 << 20
_READ_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def corpus_digest(corpus: Corpus, cache: Path | None, part: int = 0, num_parts: int = 1, num_threads: int = 1) -> str:
    """SHA-256 that stands for the content of a corpus, 64 hexadecimal digits.

    It depends on the order, the sizes and the content of the files (of a hub
    dataset: on name, configuration, split and commit), not on where they lie.
    Empty files of plain text or jsonl have no slice and do not count.

    Args:
        corpus: What to read.
        cache: Folder for what has been hashed, which any number of processes may share; None for no memory.
            What cannot be written there is not remembered, and nothing else.
        part: This process's number; it decides the order of work, not the result.
        num_parts: Number of processes that do the same.
        num_threads: Units that are hashed at a time.

    Raises:
        DamagedDataError: All files are empty, or one changed while it was read.
        DataSettingError: No file there, or one in a form that is not read.
    """
    units = _units_of(corpus)
    if units is None:
        name = (corpus.path, corpus.hub_config, corpus.hub_split)
        return _digest_of([*name, tables.hub_origins(*name, corpus.hub_revision)])
    if cache:
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_threads) as pool:
        futures = {unit.index: pool.submit(_unit_digest, unit, cache) for unit in _own_first(units, part, num_parts)}
        try:
            digests = [futures[unit.index].result() for unit in units]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return _digest_of([_file_sizes(units), digests])


def is_remembered(corpus: Corpus, cache: Path) -> bool:
    """Whether ``corpus_digest`` needs to read no text, since another call has left all that it needs in ``cache``.

    Raises:
        DataSettingError: No file there, or one in a form that is not read.
    """
    units = _units_of(corpus)
    return units is None or all((cache / _entry_name(unit)).exists() for unit in units)


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _units_of(corpus: Corpus) -> list[Task] | None:
    """What is hashed one by one; None for a hub dataset whose files are not here: its origins stand for it."""
    if corpus.format != "hub":
        return plan_tasks(corpus, DIGEST_BYTES)
    files = corpus_files(corpus)
    if not all(map(os.path.isfile, files)):
        return None
    return [Task(i, (Slice(path, 0, -1),), os.stat(path).st_size) for i, path in enumerate(files)]


def _own_first(units: list[Task], part: int, num_parts: int) -> list[Task]:
    """A process's own units, then the others' from their ends, where those come last."""
    others = [unit for unit in units if unit.index % num_parts != part]
    return units[part::num_parts] + others[::-1]


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _file_sizes(units: list[Task]) -> list[int]:
    """Size of each file in bytes, in their order."""
    sizes: dict[str, int] = {}
    for unit in units:
        for piece in unit.slices:
            sizes[piece.path] = os.stat(piece.path).st_size if piece.end < 0 else piece.end
    return list(sizes.values())


def _unit_digest(unit: Task, cache: Path | None) -> str:
    if cache is None:
        return _hash(unit)
    entry = cache / _entry_name(unit)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _SHA256.fullmatch(known := entry.read_text(encoding="ascii")):
            return known
    digest = _hash(unit)
    with contextlib.suppress(OSError):
        _remember(entry, digest)
    return digest


def _remember(entry: Path, digest: str) -> None:
    """Writes a cache entry, whole or not at all."""
    temporary = entry.with_name(f".{entry.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(digest, encoding="ascii")
        os.replace(temporary, entry)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _entry_name(unit: Task) -> str:
    """Changes with every file of the unit, as far as that shows without reading it."""
    about = []
    for piece in unit.slices:
        status = os.stat(piece.path)
        about.append([os.path.abspath(piece.path), status.st_size, status.st_mtime_ns, status.st_ino])
        about[-1] += [piece.begin, piece.end]
    return _digest_of(about)


def _hash(unit: Task) -> str:
    digest = hashlib.sha256()
    for piece in unit.slices:
        with open(piece.path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size if piece.end < 0 else piece.end
            file.seek(piece.begin)
            left = end - piece.begin
            while left and (block := file.read(min(_READ_BYTES, left))):
                digest.update(block)
                left -= len(block)
        if left:
            raise DamagedDataError(f"{piece.path}: became shorter while it was read; start again when it is complete")
    return digest.hexdigest()
