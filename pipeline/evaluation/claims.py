"""Who does which unit: a claim beside it, and a heartbeat that shows its owner at work, on any node.

    <unit>/claim                     name of the owner's heartbeat file; made by link, so that one of many succeeds
    <unit>/.claim.<host>~<pid>.tmp   touched every few seconds

A claim whose owner is gone is taken over: at once where the process was on this host, else after a minute without a
heartbeat. There are no locks, which network file systems do not all have. Were a unit done twice nevertheless, both
results are the same.
"""

import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from data_shards.temporaries import Watch, remove_abandoned, temporary_path

_BEAT_EVERY_S = 10.0
_HEARTBEAT = re.compile(r"\.claim\.[^/]*~\d+\.tmp")  # anything else in a claim is damage


class Claim:
    """A unit in this process's hand, until the end of the ``with`` block."""

    def __init__(self, claim: Path, heartbeat: Path):
        self._claim, self._heartbeat = claim, heartbeat
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_EVERY_S):
            with suppress(OSError):  # a full or absent disk shows elsewhere
                os.utime(self._heartbeat)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._released.set()
        self._thread.join()
        if _read(self._claim) == self._heartbeat.name:
            self._claim.unlink(missing_ok=True)
        self._heartbeat.unlink(missing_ok=True)


def take(folder: Path, watch: Watch) -> Claim | None:
    """Claims the unit of a folder; None where a living process has it.

    Args:
        folder: The unit's.
        watch: This process's, which knows what it saw before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / "claim"
    owner = _read(claim)
    if owner is not None:
        if _HEARTBEAT.fullmatch(owner) and watch.is_alive(folder / owner):
            return None
        _remove_stale(claim, owner)
    heartbeat = temporary_path(claim)
    heartbeat.write_text("")
    name = temporary_path(folder / "claim.name")
    name.write_text(heartbeat.name)
    try:
        os.link(name, claim)
    except FileExistsError:  # another process was first
        heartbeat.unlink()
        return None
    finally:
        name.unlink()
    return Claim(claim, heartbeat)


def clear(folder: Path) -> None:
    """Removes from the folder of a unit that is done what processes left there that were killed."""
    (folder / "claim").unlink(missing_ok=True)
    remove_abandoned(folder, below=False)


def is_beating(folder: Path, watch: Watch) -> bool:
    """Whether this process has seen the owner of a unit's claim at work, and not only its claim."""
    owner = _read(folder / "claim")
    return owner is not None and bool(_HEARTBEAT.fullmatch(owner)) and watch.is_beating(folder / owner)


def _read(claim: Path) -> str | None:
    try:
        return claim.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _remove_stale(claim: Path, owner: str) -> None:
    """Takes a claim away whose owner is gone, unless another process has just done so and has its own there."""
    aside = temporary_path(claim.with_name("stale"))
    with suppress(FileNotFoundError):
        os.rename(claim, aside)
        if _read(aside) != owner:
            with suppress(FileExistsError):
                os.link(aside, claim)
        aside.unlink()
    if _HEARTBEAT.fullmatch(owner):
        (claim.parent / owner).unlink(missing_ok=True)
