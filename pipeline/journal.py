"""The journal: one JSON object per logged step, the truth about a run.

In step order, without gaps or repeats, floats in full precision. Two runs are
the same run if and only if their journals agree outside the volatile fields.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError

VOLATILE_PREFIXES = ("speed/", "memory/", "goodput/", "time/")

Entry = dict[str, Any]


def is_volatile(field: str) -> bool:
    """Whether a field may differ between two equal runs."""
    return field == "wall_s" or field.startswith(VOLATILE_PREFIXES)


def without_volatile(entry: Entry) -> Entry:
    """What must agree."""
    return {field: value for field, value in entry.items() if not is_volatile(field)}


def read_entries(path: Path) -> list[Entry]:
    """All whole lines; a last line that a kill cut short is left out.

    Raises:
        DamagedError: A line is not JSON.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise DamagedError(f"{path}: line {number} is not JSON; restore the file from a copy") from error
    return entries


class Journal:
    """Appends entries; opened at the step from which training goes on."""

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
        self._file = open(path, "a", encoding="utf-8")

    def append(self, entry: Entry) -> None:
        """Writes one line, visible to readers at once."""
        self._file.write(_line(entry))
        self._file.flush()

    def sync(self) -> None:
        """Makes all lines survive a crash of the machine."""
        os.fsync(self._file.fileno())


def _line(entry: Entry) -> str:
    """One line of JSON, which has no NaN and no infinity: they become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
