"""Damage of every kind: found before a byte is used, moved aside, the one before is taken."""

import errno
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.errors import ConfigError, DamagedError
from pipeline.faults import Faults
from pipeline.pieces import Piece
from pipeline.snapshot import BackgroundWriter, Snapshot


def snapshot_of(value: float) -> Snapshot:
    snapshot = Snapshot({"layer.weight": [4, 4], "scale": [], "none": [0]}, ("exp_avg", "exp_avg_sq"))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    halves = [(kind, torch.full((8,), value + number)) for number, kind in enumerate(kinds)]
    snapshot.take(Piece(kind, "layer.weight", offset, half) for offset in (8, 0) for kind, half in halves)
    snapshot.take(Piece(kind, "scale", 0, torch.tensor([-value])) for kind in kinds)
    return snapshot


def save(
    folder: Path, step: int, score: float | None = None, rows: str | None = None, **retention: Any
) -> checkpoints.Checkpoint:
    state = {"step": step, "score": score} | ({"scored_rows": rows} if rows else {})
    return checkpoints.save(folder, state, snapshot_of(step), checkpoints.Retention(**retention))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_unreadable(path: Path) -> None:
    """What root cannot read either."""
    path.unlink()
    path.mkdir()


FILES = {checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.MANIFEST}
DAMAGE = {
    "unreadable": make_unreadable,
    "flipped byte": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 10)
    found = checkpoints.load_newest(tmp_path)
    assert found == saved
    assert found.step == 10
    assert torch.equal(found.tensors(checkpoints.WEIGHTS)("layer.weight"), torch.full((4, 4), 10.0))
    moments = found.tensors(checkpoints.OPTIMIZER)
    assert torch.equal(moments("exp_avg/layer.weight"), torch.full((4, 4), 11.0))
    assert torch.equal(moments("exp_avg_sq/layer.weight"), torch.full((4, 4), 12.0))
    assert moments("exp_avg/scale").item() == -10 and moments("exp_avg/none").shape == (0,)
    assert found.shapes(checkpoints.WEIGHTS) == {"layer.weight": [4, 4], "scale": [], "none": [0]}
    assert (tmp_path / "LATEST").read_text() == "step_00000010\n"


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_named_and_moved_aside_and_the_one_before_taken(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    DAMAGE[damage](tmp_path / "step_00000020" / file)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.step == 10
    aside = tmp_path / "step_00000020.damaged-1"
    assert {path.name for path in aside.iterdir()} >= FILES - {file}
    assert f"step_00000020/{file}: " in caplog.text and f"moved to {aside.name}" in caplog.text


def fail_to_read(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """As a file system does that has lost its server for a while."""
    read = checkpoints.digest_file

    def digest_file(path: Path) -> str:
        if any(f"step_{step:08d}" in str(path) for step in steps):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(checkpoints, "digest_file", digest_file)


def test_what_cannot_be_read_for_a_while_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    with monkeypatch.context() as now:
        fail_to_read(now, 10, 20)
        with pytest.raises(OSError, match="no checkpoint can be read"):
            checkpoints.load_newest(tmp_path)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None and found.step == 20
    fail_to_read(monkeypatch, 20)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None and found.step == 10
    assert (tmp_path / "step_00000020.unreadable-1").is_dir()  # else a later start would go on from it


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step_00000020").mkdir()
    assert checkpoints.list_steps(tmp_path) == [10]


def test_nothing_starts_afresh_when_all_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, 10)
    flip(tmp_path / "step_00000010" / checkpoints.WEIGHTS)
    with pytest.raises(DamagedError, match=r"none of the checkpoints at steps 10 is intact; .*--force pretrain"):
        checkpoints.load_newest(tmp_path)
    with pytest.raises(DamagedError, match=r"LATEST names 'step_00000010' but there is no checkpoint"):
        checkpoints.load_newest(tmp_path)


def test_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path / "absent") is None


def test_missing_latest_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "LATEST").unlink()
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.step == 10


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 11; there are: 10"):
        checkpoints.load(tmp_path, 11)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, newest=2)
    assert checkpoints.list_steps(tmp_path) == [3, 4]


def test_some_steps_stay_for_ever_and_so_does_the_best(tmp_path: Path) -> None:
    for step, score in enumerate((3.0, 2.0, 1.5, None, 1.7, 1.6, None), 1):
        save(tmp_path, step, score, newest=1, every=4, best=True)
    assert checkpoints.list_steps(tmp_path) == [3, 4, 7]
    save(tmp_path, 8, 1.4, newest=1, every=4, best=True)
    assert checkpoints.list_steps(tmp_path) == [4, 8]


def test_the_best_is_that_of_the_same_rows_and_the_best_of_other_rows_stays(tmp_path: Path) -> None:
    stays = []
    scored = ((1.0, None), (3.0, "a"), (2.0, "a"), (2.5, "a"), (None, "b"), (9.0, "b"), (9.5, "b"))
    for step, (score, rows) in enumerate(scored, 1):  # the first without a word of which rows, as once was
        save(tmp_path, step, score, rows, newest=1, best=True)
        stays.append(checkpoints.list_steps(tmp_path))
    assert stays == [[1], [1, 2], [1, 3], [1, 3, 4], [1, 3, 5], [1, 3, 6], [1, 3, 6, 7]]


def test_one_stays_from_before_the_line_of_a_spike(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, newest=1, before=20)
    assert checkpoints.list_steps(tmp_path) == [20, 30, 40]
    for step in (47, 58, 79):
        save(tmp_path, step, newest=1, before=20)
    assert checkpoints.list_steps(tmp_path) == [58, 79]


def test_nan_is_no_score_and_an_undeletable_checkpoint_no_failure(tmp_path: Path, monkeypatch, caplog) -> None:
    for step, score in ((1, math.nan), (2, 3.0), (3, 4.0)):
        save(tmp_path, step, score, newest=1, best=True)
    assert checkpoints.list_steps(tmp_path) == [2, 3]

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoints, "_prune", busy)
    assert save(tmp_path, 4).step == 4
    assert "an old checkpoint could not be deleted" in caplog.text


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    save(tmp_path, 10)

    faults = Faults(0, 1, "full@step=20")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(
            tmp_path, {"step": 20}, snapshot_of(20), checkpoints.Retention(), lambda phase: faults.strike(phase, 20)
        )
    assert checkpoints.list_steps(tmp_path) == [10]
    assert [path.name for path in tmp_path.glob(".tmp*")] == []


def test_what_reads_otherwise_than_it_was_written_is_not_published(tmp_path: Path) -> None:
    save(tmp_path, 10)

    def damage(phase: str) -> None:
        if phase == "write":  # the weights are on disk by then
            flip(tmp_path / ".tmp-step_00000020" / checkpoints.WEIGHTS)

    with pytest.raises(OSError, match="reads otherwise than it was written"):
        checkpoints.save(tmp_path, {"step": 20}, snapshot_of(20), checkpoints.Retention(), damage)
    assert checkpoints.list_steps(tmp_path) == [10]


def test_a_snapshot_is_a_copy_and_is_written_in_the_background(tmp_path: Path) -> None:
    weight, go = torch.ones(3), threading.Event()
    snapshot, writer = Snapshot({"w": [3]}, ()), BackgroundWriter()
    snapshot.take([Piece("weight", "w", 0, weight)])
    weight.zero_()

    def write() -> None:
        assert go.wait(10)
        checkpoints.save(tmp_path, {"step": 1}, snapshot, checkpoints.Retention())

    writer.begin(write)
    assert checkpoints.list_steps(tmp_path) == []
    go.set()
    assert writer.wait() is None
    assert checkpoints.load(tmp_path, 1).tensors(checkpoints.WEIGHTS)("w").tolist() == [1, 1, 1]
    writer.begin(lambda: (tmp_path / "absent" / "file").write_text(""))
    assert isinstance(writer.wait(), FileNotFoundError)
    assert writer.wait() is None


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "step_00000010"
    listed = set(json.loads((folder / checkpoints.MANIFEST).read_text())["files"])
    assert listed | {checkpoints.MANIFEST} == {path.name for path in folder.iterdir()}
