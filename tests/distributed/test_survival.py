"""Killed, stopped, damaged, out of space, moved about, fed with NaN: short forms of what tests/soak does at length."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from pipeline.checkpoint import LATEST, load
from pipeline.goodput import Attempt, read_attempts, total_seconds
from tests.conftest import Electra, clean_environment
from tests.distributed.drill import Drill, kill, run_forked, zero
from tests.distributed.forked_ranks import ForkedRanks, Job, read_batches
from tests.pipeline.test_checkpoint import DAMAGE
from tests.soak.soak import soak

pytestmark = pytest.mark.distributed

PEER_TIMEOUT_S = 12
TWO_PROCESSES = ["launch.processes=2", f"launch.peer_timeout_seconds={PEER_TIMEOUT_S}", zero(2)]


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[ForkedRanks]:
    with ForkedRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(shared_config: Path, electra: Electra) -> Drill:
    """The run of two processes that nothing happens to."""
    return run_forked(electra, Drill(shared_config, "undisturbed", *TWO_PROCESSES))


Pretrain = Callable[..., tuple[list[int], Drill]]


@pytest.fixture
def pretrain(shared_config: Path, forked_ranks: ForkedRanks, electra: Electra) -> Pretrain:
    """Runs the pretrain stage under a stage of ZeRO in forked ranks; returns their exit codes, and where to look."""

    def start(
        name: str, stage: int, size: int, *overrides: str, fault: str = "", stop_after: int | None = None
    ) -> tuple[list[int], Drill]:
        drill = Drill(shared_config, name)
        if not (drill.folder.parent / "tokenize").exists():
            electra("tokenize", shared_config, f"run.name={name}")
        arguments = ["pretrain", str(shared_config), f"run.name={name}", zero(stage), *overrides]
        batches = str(drill.log.with_suffix(".batches"))
        job = Job(arguments, size, str(drill.log), batches, stop_after, {"ELECTRA_FAULT": fault})
        return forked_ranks.run(job), drill

    return start


def test_kills_change_nothing(shared_config: Path, electra: Electra) -> None:
    """Ranks are forked from the command, or imports would take most of the time; the soak starts them."""
    outcome = soak(shared_config.parent, kills=10, stage=1, seed=7, run_whole=partial(run_forked, electra), forks=True)
    print(outcome)
    assert outcome.differences == []
    assert sum(outcome.kills.values()) == 10
    assert sum(count for (when, _), count in outcome.kills.items() if when == "save") >= 2


def test_a_killed_and_a_stopped_rank_are_named_and_replaced_and_every_second_is_accounted_for(
    shared_config: Path, whole: Drill
) -> None:
    began = time.monotonic()
    fault = "kill@step=8,rank=1,attempt=1; slow@seconds=0.1"
    with Drill(shared_config, "struck", *TWO_PROCESSES, fault=fault) as drill:
        assert drill.until_step(12, after_attempt=1)
        stopped_at = time.monotonic()
        assert kill(drill.ranks()[1], signal.SIGSTOP)
        step = drill.attempt[1]
        assert drill.until_step(step + 1, after_attempt=2)
        assert time.monotonic() - stopped_at < 300  # a rank that waits for the other does so for half an hour
        assert drill.wait() == 0, drill.said
        wall_s = time.monotonic() - began
        assert not drill.left_over()
    said = drill.said
    assert "kill in phase step of step 8" in said
    assert f"rank 0 on {socket.gethostname()}: another process is gone, noticed in step " in said
    assert re.search(rf"rank 0 ends: no sign of life for \d+ s of rank 1 on {socket.gethostname()} \(step ", said)
    assert said.count("killed: rank 1 by signal 9") == 2
    assert drill.journal() == whole.journal() and drill.digest(20) == whole.digest(20)
    attempts = assert_seconds_add_up(drill, wall_s)
    assert attempts[2].seconds["down"] > PEER_TIMEOUT_S


def assert_seconds_add_up(drill: Drill, wall_s: float) -> list[Attempt]:
    """Those of all classes to the command's; steps slowed by 0.1 s and made again, and the time between attempts."""
    attempts = read_attempts(drill.folder)
    seconds = total_seconds(attempts)
    print(f"{wall_s:.1f} s: {seconds}")
    # What the command itself takes to start and to end is in no attempt.
    assert sum(seconds.values()) == pytest.approx(wall_s, abs=0.005 * wall_s + 5)
    assert attempts[0].seconds["down"] == 0
    assert all(attempt.seconds["down"] > 0 for attempt in attempts[1:])
    steps_again = sum(attempt.step - attempt.first_step for attempt in attempts) - attempts[-1].step
    assert steps_again >= len(attempts) - 1
    assert seconds["replayed"] > 0.1 * steps_again
    assert 0.1 * attempts[-1].step < seconds["productive"] < 0.5 * wall_s
    return attempts


def test_a_rank_that_dies_again_and_again_ends_the_command(shared_config: Path, electra: Electra) -> None:
    settings = ["launch.processes=2", "launch.restarts=1"]
    drill = run_forked(electra, Drill(shared_config, "doomed", *settings, fault="kill@step=7,rank=1"), code=1)
    assert "not started again: 1 restarts in a row have gained nothing" in drill.said
    assert drill.said.count("killed: rank 1 by signal 9") == 2  # the first had gained step 5
    assert drill.steps() == [5] and drill.journal()[-1]["step"] == 6


SETTINGS = [(2, 4), *((stage, size) for size in (2, 3, 1) for stage in (0, 3, 1, 2)), (1, 4)]


def test_every_zero_stage_and_world_size_goes_on_from_another(shared_config: Path, pretrain: Pretrain) -> None:
    """A chain of each; the soak goes through all pairs. Three do not share four micro-batches evenly."""
    steps = f"train.steps={len(SETTINGS)}"
    codes, unmoved = pretrain("unmoved", 0, 1, steps)
    assert codes == [0]
    for number, (stage, size) in enumerate(SETTINGS, 1):
        codes, moved = pretrain("moved-about", stage, size, steps, stop_after=number)
        assert set(codes) == ({85} if number < len(SETTINGS) else {0}), moved.said[-3000:]
    assert_same_but_for_rounding(unmoved, moved)


def assert_same_but_for_rounding(whole: Drill, moved: Drill) -> None:
    """The same rows, masks and seeds; losses within 1e-4."""
    assert read_batches(moved.log.with_suffix(".batches")) == read_batches(whole.log.with_suffix(".batches"))
    for one, other in zip(whole.journal(), moved.journal(), strict=True):
        assert one["step"] == other["step"]
        for metric in ("train/total_loss", "train/generator_mlm_loss", "train/discriminator_rtd_loss"):
            assert other[metric] == pytest.approx(one[metric], rel=1e-4), (one["step"], metric)


@pytest.fixture(scope="module")
def interrupted(shared_config: Path, electra: Electra) -> tuple[Drill, Drill]:
    """A run of 20 steps, and one killed in step 13 with checkpoints of 5 and 10."""
    settings = ["train.keep_checkpoints=9"]
    whole = run_forked(electra, Drill(shared_config, "uninterrupted", *settings))
    killed = Drill(shared_config, "interrupted", *settings, "launch.restarts=0", fault="kill@step=13")
    return whole, run_forked(electra, killed, code=1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("optimizer.safetensors", "flipped byte"), ("MANIFEST.json", "truncated")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    shared_config: Path, electra: Electra, interrupted: tuple[Drill, Drill], file: str, damage: str
) -> None:
    assert_damage_is_survived(shared_config, electra, *interrupted, file, damage)


def assert_damage_is_survived(
    config: Path, electra: Electra, whole: Drill, killed: Drill, file: str, damage: str
) -> None:
    """A copy of the killed run with one file of its newest checkpoint damaged is run to its end."""
    name = f"{damage.replace(' ', '-')}-{file}"
    mended = Drill(config, name, "train.keep_checkpoints=9")
    shutil.copytree(killed.folder.parent, mended.folder.parent)
    checkpoints = mended.folder / "checkpoints"
    DAMAGE[damage](checkpoints / "step_00000010" / file)
    before = contents(checkpoints)
    run_forked(electra, mended)
    assert f"step_00000010/{file}: " in mended.said
    assert "moved to step_00000010.damaged-1, trying the one before" in mended.said
    assert "training from step 5" in mended.said
    assert mended.journal() == whole.journal() and mended.digest(20) == whole.digest(20)
    after = contents(checkpoints)
    for path, content in before.items():
        kept = path.replace("step_00000010/", "step_00000010.damaged-1/")
        assert path == "LATEST" or after[kept] == content, path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class SmallDisk:
    """The file system of a run's folder, to be filled: a real one for root, else a limit on the size of files."""

    def __init__(self, drill: Drill, folder: Path):
        self._drill, self._folder = drill, folder
        self._folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(self._folder)]
        self.is_mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode

    def fill(self) -> None:
        if self.is_mounted:
            with suppress(OSError), open(self._folder / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"0" * 4096)
        self._limit(50_000)

    def free(self) -> None:
        (self._folder / "filler").unlink(missing_ok=True)
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        if not self.is_mounted:
            resource.prlimit(self._drill.ranks()[0], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", str(self._folder)], check=True)


@pytest.fixture
def small_disk() -> Iterator[Callable[[Drill, Path], SmallDisk]]:
    disks: list[SmallDisk] = []

    def make(drill: Drill, folder: Path) -> SmallDisk:
        disks.append(SmallDisk(drill, folder))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("part", ["checkpoints", "everything"])
def test_a_full_disk_is_survived_once_it_has_room_again(
    shared_config: Path, whole: Drill, small_disk: Callable[[Drill, Path], SmallDisk], part: str
) -> None:
    drill = Drill(shared_config, f"full-disk-{part}", *TWO_PROCESSES, fault="slow@seconds=0.4", forks=True)
    disk = small_disk(drill, drill.folder / "checkpoints" if part == "checkpoints" else drill.folder.parent)
    with drill:
        assert drill.until((drill.folder / "checkpoints" / LATEST).exists)  # written last
        disk.fill()
        assert drill.until(lambda: "checkpoint of step 10: " in drill.said)
        disk.free()
        assert drill.wait() == 0, drill.said
        assert not drill.left_over()
    said = drill.said
    assert "earlier checkpoints are intact" in said
    if part == "everything" and disk.is_mounted:
        problem = f"No space left on device: '{drill.folder / 'journal.jsonl'}'"
        assert said.count(f"{problem}; the journal's lines are kept in memory") == 1
        assert f"checkpoint of step 10: [Errno 28] {problem}; earlier checkpoints are intact" in said
        assert f"{drill.folder / 'journal.jsonl'}: written again, all lines are there" in said
    assert drill.steps() == [5, 15, 20]
    assert drill.journal() == whole.journal() and drill.digest(20) == whole.digest(20)


def test_a_disk_that_stays_full_ends_the_run_with_the_older_checkpoints_intact(
    shared_config: Path, electra: Electra
) -> None:
    drill = Drill(shared_config, "stays-full", "launch.restarts=0", fault="full@step=10-20")
    run_forked(electra, drill, code=1)
    assert "a checkpoint could not be written" in drill.said
    assert "earlier ones are intact: mend the disk and start again" in drill.said
    assert drill.steps() == [5]
    assert load(drill.folder / "checkpoints", 5).step == 5  # verified


ANOTHER_NODE = """
import fcntl
from data_shards import temporaries
from pipeline.cli import main
fcntl.flock = lambda *_: None
temporaries._host = lambda: "node08"
main()
"""
"""Of a file system whose locks end at the node, as they do by default on BeeGFS."""


def test_a_second_job_is_refused_where_locks_end_at_the_node(shared_config: Path, whole: Drill) -> None:
    drill = Drill(shared_config, "twice", *TWO_PROCESSES, fault="slow@seconds=1", forks=True)
    with drill:
        assert drill.until_step(3)
        command = [sys.executable, "-c", ANOTHER_NODE, "run", str(shared_config), "run.name=twice"]
        refused = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=400)
        assert drill.wait() == 0, drill.said
        assert not drill.left_over()
    assert refused.returncode == 78, refused.stderr
    node = os.uname().nodename.partition(".")[0]
    assert f"is in use by process {drill.command_pid} on {node}, which is seen at work, at step " in refused.stderr
    assert "Traceback" not in refused.stderr and "started again" not in drill.said
    assert drill.journal() == whole.journal() and drill.digest(20) == whole.digest(20)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_nan_on_one_rank_skips_the_step_on_all(pretrain: Pretrain, stage: int, precision: str) -> None:
    assert_nan_is_skipped(pretrain, stage, precision)


def assert_nan_is_skipped(pretrain: Pretrain, stage: int, precision: str) -> list[dict]:
    """Step 6 has NaN on rank 1: nothing is changed by it. With 7 and 8 it is over the budget. Returns the journal."""
    name, settings = f"nan-{stage}-{precision}", [f"train.precision={precision}", "train.max_skipped_steps=2"]
    fault = "nan@step=6,rank=1"
    codes, drill = pretrain(name, stage, 2, *settings, fault=fault, stop_after=6)
    assert codes == [85, 85], drill.said[-3000:]
    assert drill.digest(6) == drill.digest(5)
    codes, drill = pretrain(name, stage, 2, *settings, fault=fault)
    assert codes == [0, 0], drill.said[-3000:]
    entries = drill.journal()
    assert [entry["train/skipped_steps"] for entry in entries] == [0] * 5 + [1] * 15
    assert "step 6: NaN or inf in the gradients; the update is skipped (1 so far)" in drill.said
    rates = [entry["train/learning_rate"] for entry in entries]
    assert rates[6] == rates[5]  # the schedule counts updates
    codes, ended = pretrain(f"{name}-93", stage, 2, *settings, fault="nan@step=6-8,rank=1")
    assert codes == [93, 93]
    assert "3 steps with NaN or inf, more than train.max_skipped_steps=2" in ended.said
    assert ended.steps() == [5]
    return entries
