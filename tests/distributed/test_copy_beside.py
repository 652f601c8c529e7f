"""Two processes whose checkpoints take seconds to copy: pieces travel beside the next step; a peer may die then."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Electra, clean_environment, free_port, read_journal
from tests.distributed.drill import zero
from tests.pipeline.test_training_loop import SLOW_COPY

pytestmark = pytest.mark.distributed

KEYS = ("train.steps=6", "train.checkpoint_every=3", "train.log_every=1", "train.held_out_rows=0")


@pytest.fixture
def pretrain(electra: Electra, shared_config: Path):
    """Pretrains with two processes that first execute a few lines; returns exit codes, and what each said."""

    def run(name: str, stage: int, first: str = "", fault: str = "") -> tuple[list[int], list[str]]:
        arguments = [str(shared_config), *KEYS, f"run.name={name}", zero(stage)]
        electra("tokenize", *arguments)
        program, port = f"{first}\nfrom pipeline.cli import main\nmain()", str(free_port())
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program, "pretrain", *arguments],
                env=clean_environment(
                    RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ELECTRA_FAULT=fault
                ),
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=300)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return [rank.returncode for rank in ranks], said

    return run


def tensors_of(config: Path, name: str) -> dict[str, bytes]:
    """The bytes of weights and moments of each checkpoint."""
    folder = config.parent / f"out/runs/{name}/pretrain/checkpoints"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("step_*/*.safetensors")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_pieces_travel_beside_the_next_step(pretrain, shared_config: Path, stage: int) -> None:
    assert pretrain(f"pair_{stage}", stage)[0] == [0, 0]
    assert pretrain(f"late_pair_{stage}", stage, SLOW_COPY)[0] == [0, 0]
    expected = tensors_of(shared_config, f"pair_{stage}")
    assert len(expected) == 4
    assert tensors_of(shared_config, f"late_pair_{stage}") == expected
    waited = read_journal(shared_config.parent / "out", f"late_pair_{stage}")[3]["time/checkpoint_s"]
    assert waited > 1, "the first process waits in step 4"


def test_a_process_that_dies_before_its_pieces_have_left_is_lost_as_in_a_step(pretrain, shared_config: Path) -> None:
    codes, said = pretrain("dies_sending", 1, SLOW_COPY, fault="kill@step=4,rank=1,phase=step")
    assert codes == [75, -9], said[0]
    assert "another process is gone, noticed in step 4" in said[0]
    assert tensors_of(shared_config, "dies_sending") == {}
    assert pretrain("dies_sending", 1)[0] == [0, 0]
    assert pretrain("undisturbed_pair", 1)[0] == [0, 0]
    assert tensors_of(shared_config, "dies_sending") == tensors_of(shared_config, "undisturbed_pair")
