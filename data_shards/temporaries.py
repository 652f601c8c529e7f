"""Files that are whole or absent, and what unfinished ones tell about the processes that write them.

A file is written under a temporary name that carries host and process, brought to
disk, and renamed. So two processes may write the same file at the same time, and
the temporary file of a living process shows what it has in hand.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

_ABANDONED_AFTER_S = 24 * 3600.0
_SILENT_AFTER_S = 60.0


def publish_bytes(target: Path, content: bytes) -> None:
    """Writes a small file so that readers see all of it or nothing, and a crash cannot undo it."""
    temporary = temporary_path(target)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Renames a file that is on disk to its final name, and makes the name survive a crash too."""
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def temporary_path(target: Path) -> Path:
    """Where this process writes ``target`` before it is whole; names the process, so that no other writes there."""
    return target.parent / f".{target.name}.{_host()}~{os.getpid()}.tmp"


def remove_abandoned(folder: Path, below: bool = True) -> None:
    """Removes temporary files and folders of processes that are no more.

    Args:
        folder: Where to look.
        below: Whether to look in its folders, too; other processes must not remove any meanwhile.
    """
    for path in (folder.rglob if below else folder.glob)(".*.tmp"):
        with suppress(OSError):  # its owner may be removing or publishing it
            if _is_gone(*_owner(path), path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _owner(path: Path) -> tuple[str, int]:
    """Host and process id in a temporary name; id 0 when it has none."""
    host, _, pid = path.name.removesuffix(".tmp").rpartition(".")[2].rpartition("~")
    return host, int(pid) if pid.isdigit() else 0


def _is_gone(host: str, pid: int, path: Path) -> bool:
    if pid == 0:
        return True
    if host != _host():
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S
    return not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs.

    One that was killed keeps its number until its parent asks for it, in a container perhaps for ever.
    """
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]  # proc(5)
    except PermissionError:  # another user's process
        return True
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _host() -> str:
    return os.uname().nodename.partition(".")[0]


class Watch:
    """Tells which temporary files are still being written, on any node."""

    def __init__(self):
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._changed: set[Path] = set()

    def is_alive(self, path: Path) -> bool:
        """Whether the owner of a temporary file is at work: the file grew or was touched within the last minute.

        Clocks of other nodes are not trusted: the minute begins when this process first sees the file as it is.
        """
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        host, pid = _owner(path)
        if host == _host() and _is_gone(host, pid, path):
            return False
        state, now = (status.st_size, status.st_mtime_ns), time.monotonic()
        if path not in self._seen or self._seen[path][0] != state:
            if path in self._seen:
                self._changed.add(path)
            self._seen[path] = (state, now)
        return now - self._seen[path][1] < _SILENT_AFTER_S

    def is_beating(self, path: Path) -> bool:
        """Whether the owner is alive and this process has seen the file change: a dead one's never does."""
        return self.is_alive(path) and path in self._changed
