"""Damage of every kind: found before a byte is used, moved aside, the one before is taken."""

import json
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint as checkpoints
from pipeline.errors import ConfigError, DamagedError


def save(folder: Path, step: int, keep: int = 3) -> checkpoints.Checkpoint:
    tensors = [(kind, "layer.weight", torch.full((4, 4), float(step))) for kind in ("weight", "exp_avg", "exp_avg_sq")]
    return checkpoints.save(folder, {"step": step}, tensors, keep)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
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
    assert torch.equal(found.tensors(checkpoints.OPTIMIZER)("exp_avg/layer.weight"), torch.full((4, 4), 10.0))
    assert (tmp_path / "LATEST").read_text() == "step_00000010\n"


@pytest.mark.parametrize("file", [checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_moved_aside_and_the_one_before_taken(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    DAMAGE[damage](tmp_path / "step_00000020" / file)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert (tmp_path / "step_00000020.damaged-1").is_dir()


@pytest.mark.parametrize("damage", ["emptied", "truncated"])
def test_damaged_manifest(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    DAMAGE[damage](tmp_path / "step_00000020" / checkpoints.MANIFEST)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found.step == 10


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
        save(tmp_path, step, keep=2)
    assert checkpoints.list_steps(tmp_path) == [3, 4]


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    save(tmp_path, 10)

    def broken():
        yield "weight", "layer.weight", torch.zeros(4)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, {"step": 20}, broken(), 3)
    assert checkpoints.list_steps(tmp_path) == [10]
    assert [path.name for path in tmp_path.glob(".tmp*")] == []


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "step_00000010"
    listed = set(json.loads((folder / checkpoints.MANIFEST).read_text())["files"])
    assert listed | {checkpoints.MANIFEST} == {path.name for path in folder.iterdir()}
