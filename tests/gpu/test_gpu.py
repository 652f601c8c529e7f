"""What only a GPU can show of training: half precision, draws as on a CPU, deterministic algorithms."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from kernel_case import relative_error
from kernels import ERROR_LIMITS
from synthetic import TINY_MODEL, build_engine, join_process_group, make_config, micro_batches, random_pieces

from data_shards.special import TRAINED
from model.batch import GlobalCounts
from model.kernels.attention import ATTENTION, Packing, reference_attention
from model.kernels.dropout import Dropout, keep_mask
from model.masking import MaskingRule, select_and_mask
from pipeline.config import Config
from pipeline.engine import Engine, StepResult

DEVICE = "cuda"
HAS_DEVICE = torch.cuda.is_available()
MAX_SCALE_SEARCH_STEPS = 20  # fp16 halves its loss scale from 2^16 until nothing overflows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device, and PyTorch finds none here"),
]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    join_process_group(DEVICE)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tiny_config(precision: str) -> Config:
    return make_config(True, 8, precision, model=TINY_MODEL | {"attention_heads": 1})  # heads of 64


def step(engine: Engine, config: Config, number: int) -> StepResult:
    (batch,) = micro_batches(config, DEVICE, 1, True, seed=100 + number, is_tiny=True)
    counts = GlobalCounts(float(batch.num_masked), batch.num_tokens)
    return engine.step([(batch, counts)], 1e-3)


@pytest.mark.parametrize("knows_lengths", [False, True])
def test_dropout_is_that_of_the_cpu(knows_lengths: bool):
    """Masks are the same to the bit; so attention by piece drops the same probabilities."""
    for shape in ((7, 5), (300, 513), (2048, 768)):
        on_cpu, on_gpu = (keep_mask(Dropout(0.1, torch.tensor(77, device=d)), *shape) for d in ("cpu", DEVICE))
        assert torch.equal(on_cpu, on_gpu.cpu())
    packing = Packing(random_pieces(3, 128, True))
    qkv_BT3HD = torch.randn(3, 128, 3, 4, 64)
    expected = reference_attention(qkv_BT3HD, packing, Dropout(0.1, torch.tensor(77)))
    moved = Packing(packing.pieces_BT.to(DEVICE), packing.lengths if knows_lengths else None)
    attention = ATTENTION["torch" if knows_lengths else "reference"]
    found = attention(qkv_BT3HD.to(DEVICE), moved, Dropout(0.1, torch.tensor(77, device=DEVICE)))
    assert relative_error(found.cpu(), expected.double()) < ERROR_LIMITS["float32"]


def test_masks_are_those_of_the_cpu():
    token_ids_BT = torch.randint(0, 500, (16, 128))
    keys_B = torch.randint(-(2**63), 2**63 - 1, (16,))
    on_cpu, on_gpu = (
        select_and_mask(
            token_ids_BT.to(device), keys_B.to(device), MaskingRule(32, 0.85, TRAINED.mask, TRAINED.never_masked)
        )
        for device in ("cpu", DEVICE)
    )
    assert torch.equal(on_cpu.positions_BM, on_gpu.positions_BM.cpu())
    assert torch.equal(on_cpu.weights_BM, on_gpu.weights_BM.cpu())
    assert torch.equal(on_cpu.generator_ids_BT, on_gpu.generator_ids_BT.cpu())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_engine_step_changes_weights_and_stays_finite(process_group: None, precision: str):
    config = tiny_config(precision)
    engine, _ = build_engine(config, DEVICE, seed=1)
    before = {name: value.clone() for kind, name, value in engine.full_state() if kind == "weight"}
    allowed = MAX_SCALE_SEARCH_STEPS if precision == "fp16" else 1
    result = next((r for number in range(allowed) if (r := step(engine, config, number)).applied), None)
    assert result, f"no update in {allowed} steps"
    assert 0 < result.gradient_norm < float("inf")
    assert torch.isfinite(result.statistics.sums).all()
    after = {name: value for kind, name, value in engine.full_state() if kind == "weight"}
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert set(changed) == set(before)


def test_deterministic_steps_twice_are_bitwise_equal(process_group: None, deterministic: None):
    config = tiny_config("bf16")
    runs = []
    for _ in range(2):
        engine, _ = build_engine(config, DEVICE, seed=1)
        results = [step(engine, config, number) for number in range(3)]
        state = {(kind, name): value for kind, name, value in engine.full_state()}
        runs.append(([(r.gradient_norm, r.statistics.sums.tolist()) for r in results], state))
    (first_results, first_state), (second_results, second_state) = runs
    assert first_results == second_results
    assert first_state.keys() == second_state.keys()
    different = [key for key, value in first_state.items() if not torch.equal(value, second_state[key])]
    assert different == []
