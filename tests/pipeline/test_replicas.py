"""Weights that differ between processes: found, named, not saved."""

from pathlib import Path

import pytest
import torch

from pipeline.replicas import deviating, digest_of
from tests.conftest import REPOSITORY, Electra, read_journal
from tests.distributed.test_resume import same_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_counts_and_so_does_its_place(dtype: torch.dtype) -> None:
    weights = [torch.randn(70_001).to(dtype), torch.randn(3, 4).to(dtype), torch.zeros(0, dtype=dtype)]
    before = digest_of(weights)
    assert digest_of(weights) == before
    integers = {2: torch.int16, 4: torch.int32}[weights[0].element_size()]
    for bit in (0, 3, 8 * weights[0].element_size() - 1):
        damaged = [weight.clone() for weight in weights]
        bits = damaged[1].view(integers)
        bits[1, 2] ^= -(1 << bit) if bit == 8 * weights[0].element_size() - 1 else 1 << bit
        assert digest_of(damaged) != before
    weights[0][5], weights[0][66_000] = 1.0, 2.0
    before = digest_of(weights)
    exchanged = [weight.clone() for weight in weights]
    exchanged[0][[5, 66_000]] = weights[0][[66_000, 5]]
    assert digest_of(exchanged) != before
    assert digest_of([]) == []


def test_those_are_named_who_differ_from_most() -> None:
    assert deviating([[1], [1], [1]]) == []
    assert deviating([[1], [2], [1], [3]]) == [1, 3]
    assert deviating([[1], [2]]) == [0, 1]  # who of them is right cannot be told


@pytest.mark.distributed
def test_a_flipped_bit_is_found_and_nothing_of_it_stays(config_path: Path, electra: Electra) -> None:
    zero0 = f"deepspeed.config={REPOSITORY / 'configs/deepspeed/zero0.json'}"
    arguments = ["run", config_path, "launch.processes=2", zero0, "train.check_replicas_every=2"]
    electra(*arguments, "run.name=sound")
    done = electra(*arguments, "run.name=hit", ELECTRA_FAULT="flip@step=8,rank=1,attempt=1")
    assert "after step 8 the weights of rank 0 on " in done.stderr and ", rank 1 on " in done.stderr
    assert "the same command goes on from the last checkpoint" in done.stderr  # slurm/_common.sh looks for that
    assert "restored step 5" in done.stderr
    assert same_run(*(read_journal(config_path.parent / "out", name) for name in ("sound", "hit")))


@pytest.mark.distributed
def test_it_is_said_once_that_zero_3_has_nothing_to_compare(config_path: Path, electra: Electra) -> None:
    short = ["run", config_path, "train.steps=1", "train.check_replicas_every=1", "launch.processes=2"]
    said = electra(*short, f"deepspeed.config={REPOSITORY / 'configs/deepspeed/zero3.json'}").stderr
    assert said.count("train.check_replicas_every=1 compares nothing under ZeRO 3") == 1
