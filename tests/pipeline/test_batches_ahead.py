"""The next step's micro-batches from a thread: the same ones, one step ahead, and nothing left behind."""

import threading
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from data_shards.errors import DamagedDataError
from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows
from data_shards.special import TRAINED
from model.batch import MicroBatch
from pipeline.batches import MicroBatches
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.plan import make_plan
from pipeline.prefetch import Prefetcher

VOCAB_SIZE, STEPS = 300, 4


class Loader:
    """In place of the loader: rows of their own for each step, and a record of who asked for which step."""

    def __init__(self, damaged_step: int | None = None, seconds: float = 0.0):
        self.asked: list[tuple[int, str]] = []
        self._damaged_step, self._seconds = damaged_step, seconds

    def rows_at(self, step: int, first: int, count: int) -> KeyedRows:
        self.asked.append((step, threading.current_thread().name))
        time.sleep(self._seconds)
        if step == self._damaged_step:
            raise DamagedDataError("shard_00000.bin: damaged")
        keys = np.arange(count, dtype=np.uint64) + np.uint64(1000 * step + first)
        windows = np.random.default_rng(int(keys[0])).integers(10, VOCAB_SIZE, (count, 32)).astype(np.uint16)
        windows[:, 12] = TRAINED.sep
        return KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)


@pytest.fixture
def batches_of(config_path) -> Callable[..., MicroBatches]:
    config = load_config(config_path, ("objective.score_special_tokens=false",))  # so that no tensor is absent
    plan = make_plan(config, 1, VOCAB_SIZE)
    return lambda loader, device="cpu": MicroBatches(config, plan, Process(), loader, device)


def tensors_of(part: object) -> list[torch.Tensor]:
    """The tensors in a micro-batch, at any depth."""
    values = [getattr(part, field.name) for field in fields(part)]  # type: ignore[arg-type]
    nested = [tensor for value in values if is_dataclass(value) for tensor in tensors_of(value)]
    return [value for value in values if isinstance(value, torch.Tensor)] + nested


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("micro-batches")]


def assert_equal(found: list[tuple[int, MicroBatch]], expected: list[tuple[int, MicroBatch]]) -> None:
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert (one.seed, one.weight, one.num_tokens) == (other.seed, other.weight, other.num_tokens)
        pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
        assert len(pairs) == 8
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("in_thread", [False, True])
def test_each_step_gets_its_own_micro_batches(batches_of, in_thread):
    loader, expected = Loader(), batches_of(Loader())
    with Prefetcher(batches_of(loader), STEPS, "cpu", in_thread) as prefetcher:
        for step in range(1, STEPS):  # as after a resume
            assert_equal(prefetcher.of_step(step), list(expected.of_step(step)))
    assert [step for step, _ in loader.asked] == sorted([*range(1, STEPS)] * 4), "each once, none beyond the last"
    assert all(name.startswith("micro-batches") == in_thread for _, name in loader.asked)


def test_on_a_cpu_the_training_thread_makes_them_by_default(batches_of):
    loader = Loader()
    with Prefetcher(batches_of(loader), STEPS, "cpu") as prefetcher:
        prefetcher.of_step(0)
    assert set(loader.asked) == {(0, threading.current_thread().name)}


def test_the_thread_is_one_step_ahead_and_never_two(batches_of):
    loader = Loader()
    with Prefetcher(batches_of(loader), STEPS, "cpu", in_thread=True) as prefetcher:
        prefetcher.of_step(0)
        deadline = time.monotonic() + 10
        while len(loader.asked) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert {step for step, _ in loader.asked} == {0, 1}


def test_what_the_thread_raises_is_raised_in_the_step_that_it_is_for(batches_of):
    loader = Loader(damaged_step=2)
    with (
        pytest.raises(DamagedDataError, match=r"shard_00000\.bin: damaged"),
        Prefetcher(batches_of(loader), STEPS, "cpu", in_thread=True) as prefetcher,
    ):
        for step in range(2):
            prefetcher.of_step(step)
        prefetcher.of_step(2)
        pytest.fail("step 2 has no rows")
    assert step == 1, "the steps before are not affected"
    assert not threads_left()


def test_leaving_waits_for_what_is_being_read_and_begins_nothing_more(batches_of):
    loader = Loader(seconds=0.1)
    with Prefetcher(batches_of(loader), STEPS, "cpu", in_thread=True) as prefetcher:
        prefetcher.of_step(0)
        assert threads_left()
    assert not threads_left()
    read = len(loader.asked)
    time.sleep(0.3)
    assert len(loader.asked) == read


def test_for_a_gpu_every_tensor_lies_in_pinned_memory(batches_of, monkeypatch):
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = list(batches_of(Loader(), "cuda").of_step(0))
    expected = list(batches_of(Loader()).of_step(0))
    assert len(pinned) == 8 * len(found)
    assert {id(tensor) for _, batch in found for tensor in tensors_of(batch)} == {id(tensor) for tensor in pinned}
    assert_equal(found, expected)
