"""One model under the program's engine, its steps taken apart: seconds of a micro-batch, an update, a row; memory.

A step here is two micro-batches and one update: the first micro-batch gives its time, and what the rest takes beyond
that is the update's. Rows are made before the step and timed by themselves.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows
from data_shards.special import TRAINED
from model.batch import GlobalCounts
from model.electra import Electra
from model.kernels.select import Kernels
from pipeline.batches import MicroBatches, to_device
from pipeline.config import Config
from pipeline.devices import choose_kernels, prepare_layers
from pipeline.distributed import Process
from pipeline.engine import Engine
from pipeline.errors import ConfigError
from pipeline.log import logger
from pipeline.plan import Plan

_PARTS = 2  # micro-batches of a measured step
_DOCUMENT_TOKENS = 500  # of synthetic rows, as a web page's


@dataclass(frozen=True)
class KernelChoice:
    """Kernels that work here, and the overrides that choose them."""

    overrides: str
    kernels: Kernels


def kernel_choices(config: Config, device: str) -> list[KernelChoice]:
    """Choices of kernels that work on this device, no two alike; one that does not work is named in the log."""
    choices: list[KernelChoice] = []
    for backend in ("torch", "triton", "apex", "megatron", "auto"):
        try:
            kernels = choose_kernels(config, device, backend=backend)
        except ConfigError as error:
            logger.info("not measured: %s", error)
            continue
        if all(kernels.names != choice.kernels.names for choice in choices):
            choices.append(KernelChoice(f"kernels.backend={backend}", kernels))
    return choices


class SyntheticRows:
    """Stands in for a loader where there are no shards: uniform tokens, packed as real ones."""

    def __init__(self, config: Config):
        self._length, self._vocab_size = config.data.sequence_length, config.tokenizer.vocab_size

    def rows_at(self, step: int, first: int, count: int) -> KeyedRows:
        """Rows by ``RowLoader.rows_at``'s rule."""
        draw = np.random.default_rng((step, first))
        windows = draw.integers(len(TRAINED.all), self._vocab_size, (count, self._length), dtype=np.int32)
        windows[draw.random(windows.shape) < 1 / _DOCUMENT_TOKENS] = TRAINED.sep
        keys = draw.integers(0, 2**63, count, dtype=np.uint64)
        return KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)


class Bench:
    """The model with one choice of kernels under the program's engine, and steps of it taken apart."""

    def __init__(self, config: Config, plan: Plan, choice: KernelChoice, loader: Any, device: str):
        self._config, self._loader, self._device = config, loader, device
        self.choice, self.step_number = choice, 0
        self.row_s: list[float] = []
        self.last_step_s = 0.0
        self._plan = replace(plan, world_size=1, accumulation_steps=_PARTS, micro_batches_per_step=_PARTS)
        self._build()

    def _build(self) -> None:
        before = resident_bytes(self._device)
        torch.manual_seed(self._config.run.seed)
        model = Electra(self._config.model, self._config.objective, self._plan.vocab_size, self.choice.kernels)
        if self._config.objective.generator != "network":
            log_probabilities_V = torch.zeros(self._plan.vocab_size).log_softmax(0)
            log_probabilities_V[list(TRAINED.all)] = -torch.inf
            model.set_control(log_probabilities_V)
        prepare_layers(self._config, model)
        self._engine: Engine | None = Engine(self._config, self._plan, model, self._device)
        self._own_bytes = max(0, resident_bytes(self._device) - before)

    def rebuild(self) -> None:
        """After an error in the middle of a step: DeepSpeed would count its micro-batches from there."""
        self._engine = None
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        self._build()

    def step(self, rows: int) -> tuple[float, float | None]:
        """One optimizer step of two micro-batches of ``rows``.

        Returns:
            Seconds of a micro-batch, and of the update; None where the update was skipped, as in fp16's search for
            its loss scale.
        """
        assert self._engine
        plan = replace(self._plan, micro_batch_rows=rows)
        source = MicroBatches(self._config, plan, Process(), self._loader, self._device)
        began = self._now()
        batches = [batch for _, batch in source.of_step(self.step_number)]
        self.row_s.append((self._now() - began) / (_PARTS * rows))
        masked = sum(float(batch.num_masked) for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        counts = GlobalCounts(max(masked, 1.0), max(tokens, 1.0))
        marks: list[float] = []

        def marked() -> Iterator[Any]:
            for batch in batches:
                marks.append(self._now())
                yield to_device(batch, self._device), counts

        result = self._engine.step(marked(), self._config.optimizer.lr)
        end = self._now()
        self.step_number, self.last_step_s = self.step_number + 1, end - began
        micro_batch_s = marks[1] - marks[0]
        return micro_batch_s, max(0.0, end - marks[1] - micro_batch_s) if result.applied else None

    def peak_gib(self) -> float:
        """Peak since ``reset_peak``, without what other benches hold."""
        return (self._own_bytes + peak_bytes(self._device) - self._resting_bytes) / 2**30

    def reset_peak(self) -> None:
        """Begins to watch the memory anew."""
        reset_peak(self._device)
        self._resting_bytes = resident_bytes(self._device)

    def median_row_s(self) -> float:
        """To have a row ready."""
        return statistics.median(self.row_s)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def resident_bytes(device: str) -> int:
    """Memory in use: of the GPU's allocator, or of this process."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Highest memory use since ``reset_peak``."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def reset_peak(device: str) -> None:
    """Forgets the peak so far, and gives back what is free."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)  # else the next step would reuse it and seem to need nothing
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def _status_bytes(name: str) -> int:
    return _first_number(Path("/proc/self/status"), name) * 1024


def free_memory_bytes() -> int:
    """Of this machine, what can be had without swapping."""
    return _first_number(Path("/proc/meminfo"), "MemAvailable") * 1024


def _first_number(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
