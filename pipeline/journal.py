"""The journal: one JSON object per logged step, the truth about a run.

In step order, without gaps or repeats, floats in full precision. Two runs are
the same run if and only if their journals agree outside the volatile fields.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError
from pipeline.log import logger

VOLATILE_PREFIXES = ("speed/", "memory/", "goodput/", "time/")

Entry = dict[str, Any]


def is_volatile(field: str) -> bool:
    """Whether a field may differ between two equal runs."""
    return field == "wall_s" or field.startswith(VOLATILE_PREFIXES)


def without_volatile(entry: Entry) -> Entry:
    """What must agree."""
    return {field: value for field, value in entry.items() if not is_volatile(field)}


def stream_entries(path: Path) -> Iterator[Entry]:
    """All whole lines, one by one: a long journal would not fit into memory; a last one that a kill cut short is none.

    Raises:
        DamagedError: A line is not JSON.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DamagedError(f"{path}: line {number} is not JSON; restore the file from a copy") from error


def read_entries(path: Path) -> list[Entry]:
    """As ``stream_entries``, all at once."""
    return list(stream_entries(path))


class Journal:
    """Appends entries; opened at the step from which training goes on.

    Lines are kept in memory until they are on disk for certain: what a full disk did not take, or took and lost, is
    written with the next line, over what there is of it.
    """

    def __init__(self, path: Path, resume_step: int):
        """Drops what lies beyond ``resume_step``: those steps will be computed again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_entries(path) if entry["step"] <= resume_step]
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(entry) for entry in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._path, self._file = path, os.open(path, os.O_WRONLY)
        self._synced_bytes = os.fstat(self._file).st_size
        self._lines, self._written_bytes = bytearray(), 0  # since then, and how much of them is in the file
        self._fails = False

    def append(self, entry: Entry) -> None:
        """Writes one line, visible to readers at once, or warns that it has to wait for room on the disk."""
        self._lines += _line(entry).encode()
        try:
            self._write()
        except OSError as error:
            if not self._fails:
                logger.warning("%s; the journal's lines are kept in memory and written when there is room", error)
            self._fails = True

    def sync(self) -> None:
        """Makes all lines survive a crash of the machine.

        Raises:
            OSError: They cannot be written; they are kept.
        """
        self._write(os.fsync)
        self._synced_bytes += len(self._lines)
        self._lines.clear()
        self._written_bytes = 0

    def _write(self, finish: Callable[[int], None] = lambda _: None) -> None:
        try:
            while rest := self._lines[self._written_bytes :]:
                self._written_bytes += os.pwrite(self._file, rest, self._synced_bytes + self._written_bytes)
            finish(self._file)
        except OSError as error:
            self._written_bytes = 0  # the error may be of an earlier write, as it is on network file systems
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        if self._fails:
            logger.info("%s: written again, all lines are there", self._path)
        self._fails = False


def _line(entry: Entry) -> str:
    """One line of JSON, which has no NaN and no infinity: they become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
