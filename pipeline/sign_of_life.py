"""Who works in a run's folder, told by files that their processes touch: a file lock may end at the node, or not exist.

    <run>/.at_work.node07~12345.tmp    host and process in its name, the allocation in it; gone when its owner leaves
    <run>/.at_work_shared.…            of an element of an array, which lets other elements in

A thread touches the file, so it tells of a long step, a slow start and a hang alike. What a killed process leaves is
told from a living one's by watching it for some seconds, where it is another node's; nobody waits otherwise.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_shards.temporaries import Watch, temporary_path
from pipeline.goodput import allocation_id
from pipeline.log import logger

_NAME, _SHARED = "at_work", "at_work_shared"
_BEAT_S = 2.0
_WATCHED_S = 15.0  # a file server may show a touch seconds late
_LONG_AGO_S = 600.0  # even where clocks differ: left behind by a dead process


@contextmanager
def sign_of_life(folder: Path, shared: bool = False) -> Iterator[None]:
    """While it is entered, other nodes can see that this process works in a folder, alone or with others."""
    sign, is_over = temporary_path(folder / (_SHARED if shared else _NAME)), threading.Event()
    sign.write_text(allocation_id(), encoding="utf-8")
    threading.Thread(target=_beat, args=(sign, is_over), daemon=True, name="sign of life").start()
    try:
        yield
    finally:
        is_over.set()
        with suppress(OSError):
            sign.unlink()


def _beat(sign: Path, is_over: threading.Event) -> None:
    while not is_over.wait(_BEAT_S):
        with suppress(OSError):  # the file server may be away for a while
            os.utime(sign)


def withdraw(folder: Path) -> None:
    """Takes this process's sign of a shared stage away before the process ends."""
    with suppress(OSError):
        temporary_path(folder / _SHARED).unlink()


def is_at_work(folder: Path, shared_only: bool = False, but: int | None = None) -> bool:
    """Whether a process has touched its sign of life just now, by the clock of the folder's file system.

    Nobody is waited for, so one that was killed on another node seems to live for some seconds more.

    Args:
        folder: The run's.
        shared_only: Whether to look for elements of an array alone.
        but: Id of a process of this host that does not count.
    """
    but_name = f"{_owner(temporary_path(folder))[0]}~{but}.tmp"
    signs = [sign for sign in _signs(folder, shared_only) if not sign.name.endswith(f".{but_name}")]
    touched = [_touched_unix_s(sign) for sign in signs if Watch().is_alive(sign)]
    return bool(touched) and max(touched) > _now_unix_s(folder) - _WATCHED_S


def _signs(folder: Path, shared_only: bool = False, alone_only: bool = False) -> list[Path]:
    names = [_NAME] * (not shared_only) + [_SHARED] * (not alone_only)
    return [sign for name in names for sign in folder.glob(f".{name}.*.tmp")]


def _touched_unix_s(sign: Path) -> float:
    """Asked anew: what a network file system knows of a file may be old until it is opened."""
    with suppress(OSError), open(sign, "rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


def _now_unix_s(folder: Path) -> float:
    """Now, as the file system has it; in a folder of somebody else, where nothing can be written, as this host has."""
    probe = temporary_path(folder / "now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def find_other(folder: Path, shared: bool = False) -> Path | None:
    """The sign of life of another process that is seen to work in a folder; removes those of dead ones.

    Processes of one allocation follow each other: what an earlier one left says nothing. Where this process shares its
    stage, so do others that share theirs.
    """
    allocation, own = allocation_id(), temporary_path(folder / _NAME)
    watch, began = Watch(), time.monotonic()
    found = [sign for sign in _signs(folder, alone_only=shared) if sign != own]
    asked = [sign for sign in found if _may_live(sign, allocation) and watch.is_alive(sign)]
    if asked:
        logger.info("%s: watched for %.0f s, its process may be at work", asked[0], _WATCHED_S)
    while asked and time.monotonic() - began < _WATCHED_S:
        time.sleep(_BEAT_S / 10)
        for sign in asked:
            _touched_unix_s(sign)
            if watch.is_beating(sign):
                return sign
        asked = [sign for sign in asked if watch.is_alive(sign)]
    for sign in found:
        sign.unlink(missing_ok=True)
    return None


def _may_live(sign: Path, allocation: str) -> bool:
    try:
        is_own = bool(allocation) and sign.read_text(encoding="utf-8") == allocation
        return not is_own and abs(time.time() - sign.stat().st_mtime) < _LONG_AGO_S
    except FileNotFoundError:  # its owner has just left
        return False


def describe_owner(sign: Path) -> str:
    """``process 12345 on node07 (job 4711-0)``."""
    host, pid = _owner(sign)
    job = ""
    with suppress(OSError):
        job = sign.read_text(encoding="utf-8")
    return f"process {pid} on {host}" + (f" (job {job})" if job else "")


def _owner(sign: Path) -> tuple[str, str]:
    """Host and process id."""
    host, _, pid = sign.name.removesuffix(".tmp").rpartition(".")[2].rpartition("~")
    return host, pid
