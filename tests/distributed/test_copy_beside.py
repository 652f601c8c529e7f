"""Two processes whose checkpoints take seconds to copy: pieces travel beside the next step; a peer may die then."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import Electra, read_journal
from tests.distributed.drill import zero
from tests.distributed.forked_ranks import ForkedRanks, Job
from tests.pipeline.test_training_loop import SLOW_COPY

pytestmark = pytest.mark.distributed

KEYS = ("train.steps=6", "train.checkpoint_every=3", "train.log_every=1", "train.held_out_rows=0")
Pretrain = Callable[..., tuple[list[int], str]]
Tensors = dict[str, bytes]


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[ForkedRanks]:
    with ForkedRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def pretrain(electra: Electra, shared_config: Path, forked_ranks: ForkedRanks) -> Pretrain:
    """Pretrains with two processes that first execute a few lines; returns exit codes, and what they said."""

    def run(name: str, stage: int, first: str = "", fault: str = "") -> tuple[list[int], str]:
        arguments = [str(shared_config), *KEYS, f"run.name={name}", zero(stage)]
        electra("tokenize", *arguments)
        log = shared_config.parent / f"{name}.log"
        job = Job(["pretrain", *arguments], 2, str(log), environment={"ELECTRA_FAULT": fault}, first=first)
        return forked_ranks.run(job), log.read_text()

    return run


@pytest.fixture(scope="module")
def undisturbed(pretrain: Pretrain, shared_config: Path) -> Callable[[int], Tensors]:
    """Pretrains once under a stage of ZeRO, with nothing in the way; returns the bytes of its checkpoints."""

    @cache
    def run(stage: int) -> Tensors:
        assert pretrain(f"pair_{stage}", stage)[0] == [0, 0]
        return tensors_of(shared_config, f"pair_{stage}")

    return run


def tensors_of(config: Path, name: str) -> Tensors:
    """The bytes of weights and moments of each checkpoint."""
    folder = config.parent / f"out/runs/{name}/pretrain/checkpoints"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("step_*/*.safetensors")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pieces_travel_beside_the_next_step(pretrain, undisturbed, shared_config: Path, stage: int) -> None:
    assert pretrain(f"late_pair_{stage}", stage, SLOW_COPY)[0] == [0, 0]
    expected = undisturbed(stage)
    assert len(expected) == 4
    assert tensors_of(shared_config, f"late_pair_{stage}") == expected
    waited = read_journal(shared_config.parent / "out", f"late_pair_{stage}")[3]["time/checkpoint_s"]
    assert waited > 0.3, "the first process waits in step 4"


def test_a_process_that_dies_before_its_pieces_have_left_is_lost_as_in_a_step(
    pretrain, undisturbed, shared_config: Path
) -> None:
    codes, said = pretrain("dies_sending", 1, SLOW_COPY, fault="kill@step=4,rank=1,phase=step")
    assert codes == [75, -9], said
    assert "rank 0 on " in said and "another process is gone, noticed in step 4" in said
    assert tensors_of(shared_config, "dies_sending") == {}
    assert pretrain("dies_sending", 1)[0] == [0, 0]
    assert tensors_of(shared_config, "dies_sending") == undisturbed(1)
