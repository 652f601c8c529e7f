"""The long forms of tests/distributed/test_survival.py: every pair, every file, every stage."""

import itertools
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import Electra
from tests.distributed.drill import Drill, kill
from tests.distributed.test_survival import (
    TWO_PROCESSES,
    Pretrain,
    assert_damage_is_survived,
    assert_nan_is_skipped,
    assert_same_but_for_rounding,
    assert_seconds_add_up,
    forked_ranks,
    interrupted,
    pretrain,
    whole,
)
from tests.pipeline.test_checkpoint import DAMAGE, FILES
from tests.soak.soak import soak

__all__ = ["forked_ranks", "interrupted", "pretrain", "whole"]  # fixtures

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(7200)]

SETTINGS = list(itertools.product(range(4), range(1, 5)))


@pytest.mark.parametrize(("stage", "kills"), [(1, 100), (2, 20), (3, 20)])
def test_kills_change_nothing(tmp_path: Path, stage: int, kills: int) -> None:
    outcome = soak(tmp_path, kills, stage)
    print(outcome)
    assert outcome.differences == []
    assert sum(outcome.kills.values()) == kills


def all_pairs(count: int) -> list[int]:
    """A walk through numbers below ``count`` that takes every step from one to another, or to itself, once."""
    walk = [each for one in range(count) for each in (one, *(x for two in range(one + 1, count) for x in (one, two)))]
    return [*walk, walk[0]]


def test_every_setting_goes_on_from_every_other(shared_config: Path, pretrain: Pretrain) -> None:
    walk = all_pairs(len(SETTINGS))
    assert set(itertools.pairwise(walk)) == set(itertools.product(range(len(SETTINGS)), repeat=2))
    steps = f"train.steps={len(walk)}"
    codes, unmoved = pretrain("unmoved-256", 0, 1, steps)
    assert codes == [0]
    for number, setting in enumerate(walk, 1):
        stage, size = SETTINGS[setting]
        codes, moved = pretrain("moved-256", stage, size, steps, stop_after=number)
        assert set(codes) == ({85} if number < len(walk) else {0}), moved.said[-3000:]
    assert_same_but_for_rounding(unmoved, moved)


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_every_damage_is_survived(
    shared_config: Path, electra: Electra, interrupted: tuple[Drill, Drill], file: str, damage: str
) -> None:
    assert_damage_is_survived(shared_config, electra, *interrupted, file, damage)


def test_nan_on_one_rank_is_the_same_under_every_stage_and_precision(pretrain: Pretrain) -> None:
    for precision, relative in (("fp32", 1e-4), ("bf16", 2e-2)):
        one, *others = (assert_nan_is_skipped(pretrain, stage, precision) for stage in range(4))
        for entry, *rest in zip(one, *others, strict=True):
            for other in rest:
                assert entry.keys() == other.keys()
                if entry["step"] != 6:
                    assert other["train/total_loss"] == pytest.approx(entry["train/total_loss"], rel=relative)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_and_replaced(
    shared_config: Path, whole: Drill, rank: int, number: signal.Signals
) -> None:
    with Drill(shared_config, f"lost-{rank}-{number.name}", *TWO_PROCESSES, fault="slow@seconds=0.1") as drill:
        assert drill.until_step(7)
        struck_at = time.monotonic()
        assert kill(drill.ranks()[rank], number)
        step = drill.attempt[1]
        assert drill.until_step(step + 1, after_attempt=1)
        assert time.monotonic() - struck_at < 60
        assert drill.wait() == 0, drill.said
        assert not drill.left_over()
    assert f"killed: rank {rank} by signal 9" in drill.said
    if number == signal.SIGSTOP:
        assert f"rank {1 - rank} ends: no " in drill.said
        assert f"rank {rank} on {socket.gethostname()} (step " in drill.said
    assert drill.journal() == whole.journal() and drill.digest(20) == whole.digest(20)


def test_five_kills_and_every_second_is_accounted_for(shared_config: Path) -> None:
    fault = "; ".join(f"kill@step={3 + 3 * attempt},rank={attempt % 2},attempt={attempt}" for attempt in range(1, 6))
    began = time.monotonic()
    drill = Drill(shared_config, "five-kills", "launch.processes=2", "launch.restarts=5", "train.checkpoint_every=3",
                  fault=f"slow@seconds=0.1; {fault}")  # fmt: skip
    with drill:
        assert drill.wait(600) == 0, drill.said
        wall_s = time.monotonic() - began
    attempts = assert_seconds_add_up(drill, wall_s)
    assert len(attempts) == 6
