"""Where the time and memory of a few steps go: ``train.profile_steps``, by torch's profiler."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.config import Config
from pipeline.distributed import Process
from pipeline.errors import StoppedEarly
from pipeline.log import logger

_TABLE_ROWS = 30


class StepProfiler:
    """Rank 0's profile of the configured steps; a context, at whose end what was recorded is on disk.

    Writes ``profile/steps_<first>-<last>_rank0.json.gz`` (for chrome://tracing or ui.perfetto.dev), a ``.txt`` with
    the most expensive operations, and on a GPU a ``.pickle`` with the allocations (for pytorch.org/memory_viz).
    A run that is stopped within the window writes the steps it took, one that fails the failing step too.
    """

    def __init__(self, config: Config, process: Process, folder: Path, device: str):
        """``folder`` is the stage's."""
        wanted = config.train.profile_steps if process.rank == 0 else None
        self._window = range(*wanted) if wanted else range(0)
        self._folder, self._on_gpu = folder / "profile", device == "cuda"
        self._profile: profile | None = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step that the journal calls ``number``; named ``step <number>`` in the trace."""
        if number not in self._window:
            yield
            return
        if self._profile is None:
            self._start(number)
        self._last = number
        try:
            with record_function(f"step {number}"):
                yield
        except StoppedEarly:
            self._last = number - 1  # the stop came before the step
            raise
        if number == self._window[-1]:
            self._finish()

    def _start(self, number: int) -> None:
        self._first = number
        gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python")
        self._profile.start()

    def _finish(self) -> None:
        """Ends the recording, and writes it; a profile that cannot be written is no reason to end a run."""
        if self._profile is None:
            return
        began = time.monotonic()
        recorded, self._profile = self._profile, None
        recorded.stop()
        path = self._folder / f"steps_{self._first}-{self._last}_rank0"
        try:
            if self._last >= self._first:
                self._write(recorded, path)
                logger.info("profile %s.json.gz and .txt written in %.1f s", path, time.monotonic() - began)
        except OSError as error:
            logger.warning("profile %s.*: not written (%s); free space or correct permissions", path, error)
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile, path: Path) -> None:
        self._folder.mkdir(exist_ok=True)
        order = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        path.with_suffix(".txt").write_text(table, encoding="utf-8")
        recorded.export_chrome_trace(f"{path}.json.gz")
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(f"{path}.pickle")

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._finish()
