"""Micro-batches that a thread makes in pinned memory, moved to the GPU, against those that the CPU makes."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows
from data_shards.special import TRAINED
from pipeline.batches import MicroBatches, to_device
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.plan import make_plan
from pipeline.prefetch import Prefetcher

DEVICE = "cuda"
VOCAB_SIZE, STEPS = 300, 6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none here"),
]


class Loader:
    """Rows of their own for each step."""

    def rows_at(self, step: int, first: int, count: int) -> KeyedRows:
        keys = np.arange(count, dtype=np.uint64) + np.uint64(1000 * step + first)
        windows = np.random.default_rng(int(keys[0])).integers(10, VOCAB_SIZE, (count, 32)).astype(np.uint16)
        windows[:, 12] = TRAINED.sep
        return KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)


def tensors_of(part: object) -> list[torch.Tensor]:
    values = [getattr(part, field.name) for field in fields(part)]  # type: ignore[arg-type]
    nested = [tensor for value in values if is_dataclass(value) for tensor in tensors_of(value)]
    return [value for value in values if isinstance(value, torch.Tensor)] + nested


def test_prefetched_micro_batches_are_those_of_the_cpu(config_path: Path):
    """Copies are queued while the GPU is busy and read after it; a copy too early or too late would show."""
    config = load_config(config_path, ("objective.score_special_tokens=false",))  # so that no tensor is absent
    plan = make_plan(config, 1, VOCAB_SIZE)
    on_host = MicroBatches(config, plan, Process(), Loader(), "cpu")  # type: ignore[arg-type]
    for_gpu = MicroBatches(config, plan, Process(), Loader(), DEVICE)  # type: ignore[arg-type]
    busy = torch.randn(2048, 2048, device=DEVICE)
    moved = []
    with Prefetcher(for_gpu, STEPS, DEVICE) as prefetcher:
        for step in range(STEPS):
            for number, batch in prefetcher.of_step(step):
                assert all(tensor.is_pinned() for tensor in tensors_of(batch))
                busy = torch.tanh(busy @ busy)
                moved.append((step, number, to_device(batch, DEVICE)))
                del batch
    expected = [(step, number, batch) for step in range(STEPS) for number, batch in on_host.of_step(step)]
    assert [entry[:2] for entry in moved] == [entry[:2] for entry in expected]
    for (*_, found), (*_, wanted) in zip(moved, expected, strict=True):
        assert (found.seed, found.weight) == (wanted.seed, wanted.weight)
        pairs = list(zip(tensors_of(found), tensors_of(wanted), strict=True))
        assert len(pairs) == 8
        for one, other in pairs:
            assert one.device.type == DEVICE and torch.equal(one.cpu(), other)
