"""The loop around a step: rows from a thread, times in the journal, a profile of some steps; none changes a result."""

import gzip
import json
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.errors import ConfigError, StoppedEarly
from pipeline.journal import without_volatile
from pipeline.profiling import StepProfiler
from tests.conftest import read_journal
from tests.distributed.drill import zero

SHORT = ("train.steps=6", "train.checkpoint_every=3", "train.held_out_rows=0")
IN_THREAD = """
from functools import partial
from pipeline import pretrain
pretrain.Prefetcher = partial(pretrain.Prefetcher, in_thread=True)
"""
DAMAGED_AT_4 = """
from data_shards.errors import DamagedDataError
from data_shards.loader import RowLoader
rows_at = RowLoader.rows_at
def fail(self, step, *rest):
    if step == 4:
        raise DamagedDataError("shard_00000.bin: damaged while training")
    return rows_at(self, step, *rest)
RowLoader.rows_at = fail
"""
SLOW = """
import time
from data_shards.loader import RowLoader
from pipeline.journal import Journal
def after(seconds, function):
    def slow(*arguments):
        time.sleep(seconds)
        return function(*arguments)
    return slow
RowLoader.rows_at = after(0.02, RowLoader.rows_at)
Journal.append = after(1.0, Journal.append)
"""
SLOW_COPY = """
import time
from pipeline.snapshot import Snapshot
take = Snapshot.take
def slow(self, pieces):
    time.sleep(4)
    take(self, pieces)
Snapshot.take = slow
"""


@pytest.fixture(scope="module")
def pretrain(electra, shared_config):
    """Pretrains under a name, in a process that first executes a few lines; returns what it printed."""

    def run(name: str, *overrides: str, first: str = "", code: int = 0) -> str:
        arguments = [str(shared_config), *SHORT, f"run.name={name}"]
        electra("tokenize", *arguments)
        return electra("pretrain", *arguments, *overrides, first=first, code=code, RANK="0", WORLD_SIZE="1").stderr

    return run


@pytest.fixture(scope="module")
def result_of(shared_config):
    """The journal's lasting part, and the checkpoints' weights and moments as bytes."""

    def read(name: str) -> tuple[list[dict], list[bytes]]:
        out = shared_config.parent / "out"
        files = sorted((out / f"runs/{name}/pretrain/checkpoints").glob("step_*/*.safetensors"))
        tensors = [file.read_bytes() for file in files]
        return [without_volatile(entry) for entry in read_journal(out, name)], tensors

    return read


@pytest.fixture(scope="module")
def plain(pretrain, result_of) -> tuple[list[dict], list[bytes]]:
    pretrain("loop_plain")
    return result_of("loop_plain")


def test_rows_from_a_thread_change_nothing(pretrain, result_of, plain):
    pretrain("loop_thread", first=IN_THREAD)
    assert len(plain[0]) == 6
    assert result_of("loop_thread") == plain


def test_a_stop_with_a_thread_saves_and_the_rest_is_the_same(pretrain, result_of, plain):
    stopped = pretrain("loop_stopped", "train.stop_after_seconds=0.001", first=IN_THREAD, code=85)
    assert "everything is saved" in stopped
    pretrain("loop_stopped", first=IN_THREAD)
    assert result_of("loop_stopped") == plain


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_waits_for_the_copy_of_a_checkpoint(pretrain, result_of, shared_config, stage, precision):
    check_late_copy(pretrain, result_of, shared_config, f"{stage}_{precision}", f"train.precision={precision}", stage)


def test_the_second_stage_waits_for_the_copy_before_it_takes_the_generators_weights(pretrain, result_of, shared_config):
    keys = "objective.training=two_stage objective.generator_steps=3 objective.sharing=none model.generator_width=1"
    check_late_copy(pretrain, result_of, shared_config, "two_stage", keys, 0)


def check_late_copy(pretrain, result_of, shared_config, name: str, keys: str, stage: int) -> None:
    """Whether a copy of four seconds, taken beside step 4, holds the state after step 3, and the time is accounted."""
    overrides = (*keys.split(), zero(stage), "train.log_every=1")
    pretrain(f"copied_{name}", *overrides)
    pretrain(f"late_{name}", *overrides, first=SLOW_COPY)
    assert result_of(f"late_{name}") == result_of(f"copied_{name}")
    assert len(result_of(f"late_{name}")[1]) == 4, "two files at steps 3 and 6"
    out = shared_config.parent / "out"
    before, entry = read_journal(out, f"late_{name}")[2:4]
    assert entry["step"] == 4 and entry["time/checkpoint_s"] > 0.3
    assert entry["time/overhead_s"] < entry["time/checkpoint_s"], "the wait belongs to one phase"
    apart_s = {key: entry[key] - before[key] for key in ("time/unix_s", "wall_s")}
    assert apart_s["wall_s"] > 0 and apart_s["time/unix_s"] - apart_s["wall_s"] > 0.3, "the wait is no part of the step"
    (account,) = (out / f"runs/late_{name}/pretrain/goodput").glob("*.json")
    assert json.loads(account.read_text())["seconds"]["checkpoint"] > 4, "beside step 4, and at the end"


def test_damage_that_the_thread_finds_has_its_exit_code_in_its_step(pretrain, shared_config):
    message = pretrain("loop_damaged", first=DAMAGED_AT_4 + IN_THREAD, code=65)
    assert message.splitlines()[-1] == "electra: shard_00000.bin: damaged while training"
    assert "Traceback" not in message
    assert [entry["step"] for entry in read_journal(shared_config.parent / "out", "loop_damaged")] == [1, 2, 3, 4]


def test_the_journal_says_what_steps_wait_for(pretrain, result_of, plain, shared_config):
    pretrain("loop_slow", "train.log_every=2", first=SLOW)
    entries = read_journal(shared_config.parent / "out", "loop_slow")
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert all(entry["time/data_s"] >= 4 * 0.02 for entry in entries), "four micro-batches a step"
    _, *rest = (entry["time/overhead_s"] for entry in entries)
    assert all(overhead >= 1.0 / 2 for overhead in rest), "the entry before is written in the time of two steps"
    assert result_of("loop_slow")[1] == plain[1]


def test_a_profile_shows_the_steps_asked_for_and_changes_nothing(pretrain, result_of, plain, shared_config):
    pretrain("loop_profile", "train.profile_steps=[3, 5]")
    folder = shared_config.parent / "out/runs/loop_profile/pretrain/profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps_3-4_rank0.json.gz", "steps_3-4_rank0.txt"]
    steps, operations = read_trace(folder / "steps_3-4_rank0.json.gz")
    assert list(steps) == ["step 3", "step 4"]
    for begin, end in steps.values():
        within = {name for name, moment in operations if begin <= moment <= end}
        assert within >= {"aten::embedding", "aten::addmm", "aten::native_layer_norm", "aten::scatter"}
        assert any("ackward" in name for name in within)
    table = (folder / "steps_3-4_rank0.txt").read_text()
    rows = [line for line in table.splitlines() if line.lstrip().startswith(("aten::", "step ", "autograd::"))]
    assert 10 < len(rows) <= 30
    assert "Self CPU" in table
    assert result_of("loop_profile") == plain


def test_a_window_broken_off_is_written_as_far_as_it_went(pretrain, shared_config):
    pretrain("loop_broken", "train.profile_steps=[2, 7]", first=DAMAGED_AT_4, code=65)
    (trace,) = (shared_config.parent / "out/runs/loop_broken/pretrain/profile").glob("*.json.gz")
    assert trace.name == "steps_2-5_rank0.json.gz"
    assert list(read_trace(trace)[0]) == ["step 2", "step 3", "step 4", "step 5"]


def test_a_profile_that_cannot_be_written_ends_no_run(pretrain, result_of, plain, shared_config):
    folder = shared_config.parent / "out/runs/loop_unwritable/pretrain"
    folder.mkdir(parents=True)
    (folder / "profile").touch()
    assert "not written" in pretrain("loop_unwritable", "train.profile_steps=[1, 2]")
    assert result_of("loop_unwritable") == plain


def read_trace(path: Path) -> tuple[dict[str, tuple[float, float]], list[tuple[str, float]]]:
    """Begin and end of each annotated step, in order, and (name, begin) of each operation, in microseconds."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    marks = sorted((e for e in spans if e["cat"] == "user_annotation"), key=lambda event: event["ts"])
    steps = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in marks if e["name"].startswith("step ")}
    return steps, [(event["name"], event["ts"]) for event in spans if event["cat"] == "cpu_op"]


@pytest.mark.parametrize("window", ["[4, 4]", "[5, 3]", "[3, 8]", "[7, 8]"])
def test_a_window_without_steps_or_beyond_the_run_is_refused(config_path, window):
    with pytest.raises(ConfigError) as refused:
        load_config(config_path, ("train.steps=6", f"train.profile_steps={window}"))
    assert f"train.profile_steps={window}" in str(refused.value)
    assert "must rise, to train.steps + 1 = 7 at most" in str(refused.value)
    assert "correct it, or raise train.steps" in str(refused.value)


@pytest.mark.parametrize("window", ["[0, 2]", "[1]", "[1, 2, 3]"])
def test_a_window_is_two_counts(config_path, window):
    with pytest.raises(ConfigError, match=r"train\.profile_steps"):
        load_config(config_path, (f"train.profile_steps={window}",))


def test_a_long_window_is_refused(config_path):
    with pytest.raises(ConfigError, match=r"profile_steps=\[2, 23\] are 21 steps.* 20 at most; choose a shorter"):
        load_config(config_path, ("train.steps=30", "train.profile_steps=[2, 23]"))
    load_config(config_path, ("train.steps=30", "train.profile_steps=[2, 22]"))


@pytest.mark.parametrize(("stopped_at", "written"), [(2, set()), (4, {"steps_2-3_rank0"})])
def test_a_step_before_which_the_run_was_stopped_is_not_in_the_name(config_path, tmp_path, stopped_at, written):
    config = load_config(config_path, ("train.steps=6", "train.profile_steps=[2, 7]"))
    with pytest.raises(StoppedEarly), StepProfiler(config, Process(), tmp_path, "cpu") as profiler:
        for number in range(1, 7):
            with profiler.step(number):
                if number == stopped_at:
                    raise StoppedEarly("stopped")
    assert {path.name.partition(".")[0] for path in tmp_path.glob("profile/*")} == written


def test_the_whole_run_may_be_profiled(config_path):
    config = load_config(config_path, ("train.steps=6", "train.profile_steps=[1, 7]"))
    assert config.train.profile_steps == (1, 7)
