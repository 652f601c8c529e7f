"""Loss spikes: what is one, and going back past the rows."""

import json
from pathlib import Path

import pytest

from pipeline import checkpoint as checkpoints
from pipeline.config_file import load_config
from pipeline.errors import DamagedError
from pipeline.spikes import (
    SkippedRows,
    SpikeWatch,
    add_skip,
    go_back,
    inherit_skips,
    read_skips,
    saved_by,
    step_of_rows,
)
from tests.conftest import Electra, read_journal
from tests.pipeline.test_checkpoint import save


def entries(*losses: float | None, name: str = "train/discriminator_rtd_loss") -> list[dict]:
    return [{"step": number, "train/total_loss": loss, name: loss} for number, loss in enumerate(losses, 1)]


STEADY = (10.0, 10.1, 9.9, 10.0, 10.2, 9.8)


@pytest.fixture
def train(config_path: Path):
    return load_config(config_path).train


def said(train, *losses: float | None) -> list[str]:
    watch = SpikeWatch(train, entries(*STEADY))
    return [watch.observe(entry) for entry in entries(*losses)]


def test_a_spike_is_named_with_its_step_and_is_no_measure_for_others(train) -> None:
    first, second = said(train, 12.0, 12.0)
    assert first == "loss spike: 12.000 in the line of step 1, 13.5 times the spread above the usual 10.000"
    assert "loss spike" in second


def test_scatter_falling_losses_and_missing_ones_are_none(train) -> None:
    assert said(train, 10.5, 5.0, None, float("nan"), 10.4, 3.0) == [""] * 6
    assert not any(SpikeWatch(train, []).observe(entry) for entry in entries(1.0, 50.0, 1.0, 50.0, 1.0))
    still = SpikeWatch(train, entries(*[10.0] * 9))
    assert not still.observe(entries(10.5)[0]) and still.observe(entries(11.0)[0])  # a spread of 1 % at least


def test_a_run_that_resumes_judges_as_one_that_did_not(train) -> None:
    """The lines that a line is compared with are good ones, however far back."""
    before = [*STEADY, *[30.0] * 25]
    unbroken = SpikeWatch(train, [])
    for entry in entries(*before):
        unbroken.observe(entry)
    resumed = SpikeWatch(train, entries(*before))
    assert unbroken.observe(entries(30.0)[0]) == resumed.observe(entries(30.0)[0]) != ""


def test_another_stage_has_other_losses(train) -> None:
    watch = SpikeWatch(train, entries(*STEADY))
    assert not watch.observe(entries(500.0, name="train/generator_mlm_loss")[0])


def test_a_line_without_a_loss_is_no_other_stage(train) -> None:
    """Every step of the interval was skipped; the lines before are still what later ones are compared with."""
    watch = SpikeWatch(train, entries(*STEADY))
    assert watch.observe({"step": 7, "train/grad_norm": None, "train/skipped_steps": 1}) == ""
    assert "loss spike" in watch.observe(entries(12.0)[0])


def test_it_can_be_switched_off(config_path: Path) -> None:
    assert said(load_config(config_path, ("train.spike_threshold=null",)).train, 1e9) == [""]


def test_rows_that_are_left_out() -> None:
    skips = [SkippedRows(10, 4), SkippedRows(20, 3)]
    assert [step_of_rows(step, skips) for step in (0, 9, 10, 19, 20, 30)] == [0, 9, 14, 23, 27, 37]


def test_a_second_way_back_beyond_the_first_reads_nothing_again() -> None:
    first, both = [SkippedRows(900, 100)], [SkippedRows(900, 100), SkippedRows(800, 130)]
    read = {step_of_rows(step, first) for step in range(930)} | {step_of_rows(step, both) for step in range(800, 1200)}
    assert [step_of_rows(step, both) for step in (799, 800, 801)] == [799, 1030, 1031]
    assert len(read) == 930 + 400


def test_a_fork_leaves_out_what_its_parent_did_however_often_it_starts(tmp_path: Path) -> None:
    parent, fork = tmp_path / "parent", tmp_path / "fork"
    for folder in (parent, fork):
        folder.mkdir()
    for skip in (SkippedRows(10, 4), SkippedRows(30, 2)):
        add_skip(parent, skip)
    for _ in range(2):
        inherit_skips(fork, parent, step=20)
    assert read_skips(fork) == [SkippedRows(10, 4, inherited=True)]
    save(fork / "checkpoints", 20)
    assert go_back(fork, 30, good_step=25, allowed=1) == ""  # the parent's do not count


def test_going_back_moves_aside_what_holds_the_spike(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step)
    assert go_back(tmp_path, 30, good_step=25, allowed=1) == ""
    assert checkpoints.list_steps(tmp_path / "checkpoints") == [10, 20]
    assert (tmp_path / "checkpoints/step_00000030.spiked-1").is_dir()
    assert read_skips(tmp_path) == [SkippedRows(20, 10)]
    assert "another loss spike after train.spike_rollbacks=1" in go_back(tmp_path, 40, 35, allowed=1)
    assert (saved_by(tmp_path, 9), saved_by(tmp_path, 20)) == ([], [10, 20])
    assert read_skips(tmp_path) == [SkippedRows(20, 10)]


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    assert read_skips(tmp_path) == []
    add_skip(tmp_path, SkippedRows(1, 2))
    (tmp_path / "skipped_rows.json").write_text("[{")
    with pytest.raises(DamagedError, match=r"skipped_rows.json: unreadable"):
        read_skips(tmp_path)


def test_a_run_goes_back_by_itself_and_reads_other_rows(config_path: Path, electra: Electra) -> None:
    """Of a model that learns nothing any loss above the usual is a spike, at this threshold."""
    arguments = [
        "run", config_path, "train.checkpoint_every=1", "train.keep_checkpoints=20", "train.held_out_rows=0",
        "optimizer.lr=1e-12",
    ]  # fmt: skip
    electra(*arguments, "run.name=plain")
    plain = read_journal(config_path.parent / "out", "plain")
    easily = ["train.spike_threshold=1e-9", "train.spike_rollbacks=1"]
    ended = electra(*arguments, "run.name=jumpy", *easily, code=93).stderr
    assert "loss spike: " in ended and "going back to step" in ended
    assert "the same command goes on from before it" in ended  # slurm/_common.sh looks for that
    assert "another loss spike after train.spike_rollbacks=1" in ended
    folder = config_path.parent / "out/runs/jumpy/pretrain"
    (skip,) = json.loads((folder / "skipped_rows.json").read_text())
    assert list(folder.glob("checkpoints/step_*.spiked-1"))
    electra(*arguments, "run.name=jumpy", "train.spike_threshold=null")
    jumpy = read_journal(config_path.parent / "out", "jumpy")
    assert [entry["step"] for entry in jumpy] == list(range(1, 21))
    same = [a["train/total_loss"] == b["train/total_loss"] for a, b in zip(plain, jumpy, strict=True)]
    assert same == [True] * skip["after_step"] + [False] * (20 - skip["after_step"])


def test_a_spike_before_the_first_checkpoint_is_lived_with(config_path: Path, electra: Electra) -> None:
    easily = ["train.spike_threshold=1e-9", "train.spike_rollbacks=1", "optimizer.lr=1e-12"]
    ended = electra("run", config_path, "run.name=early", "train.checkpoint_every=20", *easily).stderr
    assert "loss spike: " in ended and "no checkpoint of this run is from before the spike" in ended
    folder = config_path.parent / "out/runs/early/pretrain"
    assert not (folder / "skipped_rows.json").exists()
    assert len(read_journal(config_path.parent / "out", "early")) == 20


def test_all_processes_of_a_fork_leave_out_what_its_parent_did(shared_config: Path, electra: Electra) -> None:
    """Before the first process has restored the parent's state, the fork has no list of them."""
    arguments = ["run", shared_config, "train.steps=8", "train.checkpoint_every=4", "train.held_out_rows=0"]
    electra(*arguments, "run.name=forked-from")
    out = shared_config.parent / "out"
    add_skip(out / "runs/forked-from/pretrain", SkippedRows(4, 3))
    losses = {}
    for processes in (1, 2):
        name = f"fork-{processes}"
        electra(*arguments, f"run.name={name}", "run.fork_from=forked-from@4", f"launch.processes={processes}")
        losses[name] = [entry["train/total_loss"] for entry in read_journal(out, name)]
    parent = [entry["train/total_loss"] for entry in read_journal(out, "forked-from")]
    assert losses["fork-2"] == pytest.approx(losses["fork-1"], rel=1e-4)
    assert losses["fork-1"][:4] == parent[:4] and abs(losses["fork-1"][4] / parent[4] - 1) > 1e-3
