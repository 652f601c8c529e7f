"""Who does which unit: a claim beside it, and a heartbeat that shows its owner at work, on any node.

    <unit>/claim                     name of the owner's heartbeat file; made by a link, so that one of many succeeds
    <unit>/.claim.<host>~<pid>.tmp   touched every few seconds

A claim whose owner is gone is taken over: at once where the process was on this host, else after a minute without a
heartbeat. There are no locks, which network file systems do not all have. Were a unit done twice nevertheless, both
results are the same.
"""

import errno
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
    is_ours = False
    try:
        is_ours = _create(claim, heartbeat.name)
    finally:
        if not is_ours:
            heartbeat.unlink()
    return Claim(claim, heartbeat) if is_ours else None


def clear(folder: Path) -> None:
    """Removes from the folder of a unit that is done what processes left there that were killed."""
    (folder / "claim").unlink(missing_ok=True)
    remove_abandoned(folder, below=False)


def is_beating(folder: Path, watch: Watch) -> bool:
    """Whether this process has seen the owner of a unit's claim at work, and not only its claim."""
    owner = _read(folder / "claim")
    return owner is not None and bool(_HEARTBEAT.fullmatch(owner)) and watch.is_beating(folder / owner)


def _create(claim: Path, owner: str) -> bool:
    """Makes a claim, and at once with its content; False where there is one."""
    name = temporary_path(claim.with_name("claim.name"))
    name.write_text(owner)
    try:
        try:
            os.link(name, claim)
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system
            os.symlink(owner, claim)
    except FileExistsError:
        return False
    finally:
        name.unlink()
    return True


def _read(claim: Path) -> str | None:
    try:
        if claim.is_symlink():
            return os.readlink(claim)
        return claim.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # NFS: removed by another node while it was open
            return None
        raise


def _remove_stale(claim: Path, owner: str) -> None:
    """Takes a claim away whose owner is gone, unless another process has just done so and has its own there."""
    aside = temporary_path(claim.with_name("stale"))
    with suppress(FileNotFoundError):
        os.rename(claim, aside)
        if (other := _read(aside)) is not None and other != owner:
            _create(claim, other)
        aside.unlink()
    if _HEARTBEAT.fullmatch(owner):
        (claim.parent / owner).unlink(missing_ok=True)
