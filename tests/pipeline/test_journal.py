"""The journal: in order, no gaps, no repeats, whatever happened before."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import DamagedError
from pipeline.journal import Journal, is_volatile, read_entries, without_volatile


def test_reopening_drops_what_will_be_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 0)
    for step in range(1, 8):
        journal.append({"step": step})
    journal = Journal(path, 5)
    journal.append({"step": 6})
    assert [entry["step"] for entry in read_entries(path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert [entry["step"] for entry in read_entries(path)] == [1]
    Journal(path, 2).append({"step": 2})
    assert [entry["step"] for entry in read_entries(path)] == [1, 2]


def test_floats_survive_exactly(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": 2.0**-1074}
    Journal(path, 0).append({"step": 1, **values})
    assert read_entries(path)[0] == {"step": 1, **values}


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, 0).append({"step": 1, "train/grad_norm": float("inf"), "train/total_loss": float("nan")})
    assert read_entries(path) == [{"step": 1, "train/grad_norm": None, "train/total_loss": None}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DamagedError, match=r"journal\.jsonl: line 2 is not JSON"):
        read_entries(path)


def test_volatile_fields() -> None:
    assert all(map(is_volatile, ["wall_s", "speed/tokens_per_s", "memory/peak_gib", "goodput/x", "time/unix_s"]))
    assert without_volatile({"step": 1, "wall_s": 2.0, "train/total_loss": 3.0}) == {"step": 1, "train/total_loss": 3.0}


class FullDisk:
    """Stands between the journal and the system: takes so many bytes more, then none until it has room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left_bytes, self.syncs, self._pwrite, self._fsync = 1 << 30, True, os.pwrite, os.fsync
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "fsync", self._sync)

    def _write(self, file: int, content: bytes, offset: int) -> int:
        taken = content[: self.left_bytes]
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left_bytes -= len(taken)
        return self._pwrite(file, taken, offset)

    def _sync(self, file: int) -> None:
        if not self.syncs:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        self._fsync(file)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_entries(path)]


@pytest.mark.parametrize("left_bytes", [0, 7, len('{"step": 3}\n')])
def test_lines_wait_for_room_and_one_cut_short_is_mended(
    tmp_path: Path, disk: FullDisk, caplog: pytest.LogCaptureFixture, left_bytes: int
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 0)
    journal.append({"step": 1})
    journal.sync()
    journal.append({"step": 2})
    disk.left_bytes = left_bytes
    for step in (3, 4, 5):
        journal.append({"step": step})
    assert steps(path) == [1, 2] + [3] * (left_bytes == 12)
    assert caplog.text.count("the journal's lines are kept in memory") == 1
    assert f"No space left on device: '{path}'" in caplog.text
    with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'"):
        journal.sync()
    disk.left_bytes = 1 << 30
    journal.append({"step": 6})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 7))


def test_lines_that_a_disk_took_and_lost_are_written_again(tmp_path: Path, disk: FullDisk) -> None:
    """Network file systems find out at fsync that there is no room."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 0)
    journal.append({"step": 1})
    journal.sync()
    journal.append({"step": 2})
    disk.syncs = False
    with pytest.raises(OSError, match=r"quota exceeded: '.*journal\.jsonl'"):
        journal.sync()
    os.truncate(path, len('{"step": 1}\n'))
    disk.syncs = True
    journal.append({"step": 3})
    journal.sync()
    journal.append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
