"""The journal: in order, no gaps, no repeats, whatever happened before."""

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
