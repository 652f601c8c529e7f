"""Temporary files of processes that are no more, and only those, are removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.temporaries import is_running, remove_abandoned, temporary_path

WAITS = [sys.executable, "-c", "input()"]


def of_process(folder: Path, pid: int, host: str | None = None) -> Path:
    """The temporary file of another process."""
    own = temporary_path(folder / "target").name
    path = folder / own.replace(f"~{os.getpid()}.", f"~{pid}.")
    if host is not None:
        path = folder / f".target.{host}~{pid}.tmp"
    path.write_text("half")
    return path


def test_files_of_a_process_go_when_it_is_killed_even_if_nobody_asks_for_it(tmp_path: Path) -> None:
    with subprocess.Popen(WAITS, stdin=subprocess.PIPE) as process:
        path = of_process(tmp_path, process.pid)
        remove_abandoned(tmp_path)
        assert path.exists()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now, and stays one
        os.kill(process.pid, 0)  # whose number is still taken
        remove_abandoned(tmp_path)
        assert not path.exists()
    assert not is_running(process.pid)


def test_files_of_another_node_stay_for_a_day(tmp_path: Path) -> None:
    young, old = of_process(tmp_path, 4711, "elsewhere"), of_process(tmp_path, 4712, "elsewhere")
    os.utime(old, times=(time.time() - 25 * 3600,) * 2)
    remove_abandoned(tmp_path)
    assert young.exists()
    assert not old.exists()


def test_a_process_of_another_user_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert is_running(4711)


def test_folders_below_are_left_alone_where_others_work(tmp_path: Path) -> None:
    (tmp_path / "unit").mkdir()
    above, below = tmp_path / ".results.json.tmp", tmp_path / "unit" / ".claim.tmp"
    for path in (above, below):
        path.write_text("nobody's")
    remove_abandoned(tmp_path, below=False)
    assert not above.exists()
    assert below.exists()
    remove_abandoned(tmp_path)
    assert not below.exists()
