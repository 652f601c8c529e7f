"""Micro-batch sizes and kernels against each other, on the device at hand with the program's engine and optimizer.

warm up each candidate once, sizes ascending ──▶ rounds over the fastest, one after the other ──▶ medians
        stops at the end of memory, or at half the time
"""

import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.flops import training_flops_per_token
from pipeline.batches import open_rows
from pipeline.bench import Bench, SyntheticRows, free_memory_bytes, kernel_choices
from pipeline.config import Config
from pipeline.devices import choose_kernels
from pipeline.distributed import Process, init_process_group, processes_on_this_machine, resolve_device
from pipeline.engine import check_precision
from pipeline.environment import git_commit
from pipeline.errors import ConfigError
from pipeline.launch import num_processes, threads_per_process
from pipeline.log import logger
from pipeline.measured import Link, Measurement, MicroBatchTime, work_of
from pipeline.plan import Plan, make_plan
from pipeline.pretrain import choose_algorithms
from pipeline.stages import read_record, shard_folders
from pipeline.tokenize import load_tokenize_output

_ENTRANCE_SHARE = 1 / 2  # of the time, for the first two steps of each candidate
_STEPS_TO_ENTER = 2
_WORTH_ANOTHER_ROUND = 1.25  # times the fastest
_FEWEST_RUNS = 3  # before a candidate is given up, if time allows
_MEMORY_SHARE = 0.8  # of a CPU's free memory
_LINK_BYTES = 64 << 20


@dataclass
class Candidate:
    """One micro-batch size with one choice of kernels.

    Attributes:
        micro_batch_s: Forward and backward of a micro-batch, one value a step.
        update_s: What a step adds to its micro-batches.
        peak_gib: Memory: the model's own and what a step needs.
        time_ran_out: Before the next size could be tried.
    """

    bench: Bench
    rows: int
    micro_batch_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    time_ran_out: bool = False

    @property
    def seconds(self) -> float:
        """Median of a micro-batch."""
        return statistics.median(self.micro_batch_s)

    def to_time(self) -> MicroBatchTime:
        """For the file."""
        return MicroBatchTime(
            kernels=self.bench.choice.overrides,
            rows=self.rows,
            seconds=self.seconds,
            runs=len(self.micro_batch_s),
            peak_gib=self.peak_gib,
        )

    def overrides(self) -> str:
        """What chooses it."""
        return f"train.micro_batch_size={self.rows} {self.bench.choice.overrides}"


class Race:
    """Candidates against each other for so many seconds."""

    def __init__(self, benches: list[Bench], sizes: list[int], seconds: float, device: str):
        self._benches, self._sizes, self._device = benches, sizes, device
        self._begin, self._seconds = time.monotonic(), seconds
        self.candidates: list[Candidate] = []

    def run(self) -> list[Candidate]:
        """Measures every candidate that fits, the fastest ones more often.

        Raises:
            ConfigError: Not even the smallest micro-batch fits.
        """
        growing = list(self._benches)
        for rows, following in zip(self._sizes, [*self._sizes[1:], None], strict=True):
            for bench in list(growing):
                candidate = self._enter(bench, rows)
                if candidate is None or (following and not self._has_room(candidate, following)):
                    growing.remove(bench)
        if not self.candidates:
            raise ConfigError(
                f"a micro-batch of {self._sizes[0]} rows does not fit into this device's memory; take a GPU with more, "
                "or lower data.sequence_length or the model's size"
            )
        while self._left_s() > 0:
            best_s = min(candidate.seconds / candidate.rows for candidate in self.candidates)
            for candidate in self.candidates:
                is_fast = candidate.seconds / candidate.rows <= _WORTH_ANOTHER_ROUND * best_s
                if (is_fast or len(candidate.micro_batch_s) < _FEWEST_RUNS) and self._left_s() > 0:
                    self._measure(candidate)
        return self.candidates

    def _left_s(self) -> float:
        return self._begin + self._seconds - time.monotonic()

    def _measure(self, candidate: Candidate) -> None:
        micro_batch_s, update_s = candidate.bench.step(candidate.rows)
        candidate.micro_batch_s.append(micro_batch_s)
        if update_s is not None:
            candidate.update_s.append(update_s)

    def _enter(self, bench: Bench, rows: int) -> Candidate | None:
        """Warms a candidate up and measures it once; None when it does not fit."""
        candidate, problem = Candidate(bench, rows), None
        bench.reset_peak()
        try:
            bench.step(rows)
            self._measure(candidate)
        except torch.OutOfMemoryError as error:
            problem = str(error).partition("\n")[0]
        if problem is not None:  # the error is gone by now: its traceback would keep the old engine
            logger.info("%s: %d rows do not fit: %s", bench.choice.overrides, rows, problem)
            bench.rebuild()
            return None
        candidate.peak_gib = bench.peak_gib()
        self.candidates.append(candidate)
        return candidate

    def _has_room(self, candidate: Candidate, following: int) -> bool:
        """Whether ``following`` rows are worth trying: time, and on CPU, where nothing says stop, memory."""
        kernels, rows = candidate.bench.choice.overrides, candidate.rows
        takes_s = _STEPS_TO_ENTER * candidate.bench.last_step_s * following / rows
        if self._seconds - self._left_s() + takes_s > _ENTRANCE_SHARE * self._seconds:
            logger.info("%s: larger than %d rows: no time left to try", kernels, rows)
            candidate.time_ran_out = True
            return False
        needed_gib = candidate.peak_gib * following / rows  # at most: the model's own share does not grow
        free_gib = free_memory_bytes() / 2**30
        if self._device == "cpu" and needed_gib > _MEMORY_SHARE * free_gib:
            logger.info(
                "%s: %d rows would take up to %.1f GiB, and %.1f GiB are free",
                kernels, following, needed_gib, free_gib,
            )  # fmt: skip
            return False
        return True


@dataclass(frozen=True)
class Tuned:
    """What ``tune`` found.

    Attributes:
        overrides: Of the winner, ready for the command line.
        table: Lines for people.
        measurement: For estimates; None in processes other than the first.
    """

    overrides: str
    table: list[str]
    measurement: Measurement | None


def tune(config: Config, process: Process | None, world_size: int | None, seconds: float) -> Tuned:
    """Measures for about ``seconds`` after start-up.

    Args:
        config: The run; nothing of it is written to.
        process: This one, where torchrun or srun started several: then the link between them is measured first, and
            all measure at once, each a model of its own.
        world_size: Processes that the run will have; None: as many as there are here.
        seconds: Time for measuring.

    Raises:
        ConfigError: What cannot run here, or does not fit.
    """
    device = resolve_device(config.launch.device)
    check_precision(config, device)
    beside = processes_on_this_machine(process) if process else 1
    world_size = world_size or (process.world_size if process else num_processes(config, "pretrain"))
    if not process and num_processes(config, "pretrain") > 1:
        logger.info(
            "one process is measured, not %d; torchrun --nproc-per-node=%d -m pipeline tune … measures all at once, "
            "and the link between them", num_processes(config, "pretrain"), num_processes(config, "pretrain"),
        )  # fmt: skip
    threads = threads_per_process(config, beside)
    torch.set_num_threads(threads)
    choose_algorithms(config.train.deterministic)
    link = _join(process or Process(), device, beside)
    loader, vocab_size = _open_rows(config)
    plan = make_plan(config, world_size, vocab_size)
    benches = [Bench(config, plan, choice, loader, device) for choice in kernel_choices(config, device)]
    most_rows = -(-plan.global_batch_rows // world_size)
    sizes = [rows for rows in range(1, most_rows + 1) if plan.global_batch_rows % rows == 0]
    candidates = Race(benches, sizes, seconds, device).run()
    winner = choose_winner(candidates, plan)
    table = [_row(candidate, plan, candidate is winner) for candidate in candidates]
    if process and process.rank:
        return Tuned(winner.overrides(), table, None)
    chosen_by_auto = choose_kernels(config, device, backend="auto").names
    shape = config.model, config.objective, plan.vocab_size, plan.sequence_length_tokens
    measurement = Measurement(
        device=device_name(device),
        device_kind="cuda" if device == "cuda" else "cpu",
        work=work_of(config),
        flops_per_token=training_flops_per_token(*shape),
        parameters=plan.parameters_trained,
        processes_beside=beside,
        threads=threads,
        micro_batches=[candidate.to_time() for candidate in candidates],
        auto_kernels=next(b.choice.overrides for b in benches if b.choice.kernels.names == chosen_by_auto),
        update_s=statistics.median(winner.update_s or [0.0]),
        row_s=winner.bench.median_row_s(),
        rows_from="synthetic" if isinstance(loader, SyntheticRows) else "shards",
        link=link,
        torch=torch.__version__,
        commit=git_commit(),
        unix_s=time.time(),
    )
    return Tuned(winner.overrides(), table, measurement)


def choose_winner(candidates: list[Candidate], plan: Plan) -> Candidate:
    """The fastest for a step of ``plan``; warns where time ended the search right above it."""
    winner = min(candidates, key=lambda candidate: _compute_s(candidate, plan))
    if winner.time_ran_out:
        logger.warning(
            "%s: the fastest is the largest size that there was time for, and larger ones may be faster; "
            "raise --seconds", winner.overrides(),
        )  # fmt: skip
    return winner


def _compute_s(candidate: Candidate, plan: Plan) -> float:
    """Forward and backward of a step on the plan's processes: rows that none of them needs count too."""
    micro_batches = plan.global_batch_rows // candidate.rows
    return -(-micro_batches // plan.world_size) * candidate.seconds


def _row(candidate: Candidate, plan: Plan, wins: bool) -> str:
    tokens_per_s = candidate.rows * plan.sequence_length_tokens / candidate.seconds
    return (
        f"{candidate.overrides():55} {tokens_per_s:12,.0f} tokens/s {candidate.peak_gib:8.2f} GiB "
        f"{len(candidate.micro_batch_s):4} runs{' *' if wins else ''}"
    )


def _open_rows(config: Config) -> tuple[Any, int | None]:
    """The run's rows and its vocabulary, or rows made here where it has none yet."""
    record = read_record(config, "tokenize")
    if record is None or record.state != "done":
        logger.info("no finished tokenize stage for run %r: rows are synthetic", config.run.name)
        return SyntheticRows(config), None
    tokenized = load_tokenize_output(config)
    return open_rows(config, *shard_folders(config, tokenized)), tokenized["vocab_size"]


def device_name(device: str) -> str:
    """The GPU's or the processor's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _join(process: Process, device: str, beside: int) -> Link | None:
    """Measures the link between several processes, and then makes each the only one of a group."""
    link = None
    if process.world_size > 1:
        init_process_group(process, device)
        link = measure_link(process.world_size, beside, device)
        torch.distributed.destroy_process_group()
    init_process_group(Process(local_rank=process.local_rank), device)
    return link


def measure_link(world_size: int, beside: int, device: str) -> Link:
    """An all-reduce of one number and of 64 MiB over all processes, ``beside`` of which share this machine."""
    latency_s = _all_reduce_s(torch.zeros(1, device=device))
    large = torch.zeros(_LINK_BYTES // 4, device=device)
    large_s = _all_reduce_s(large)
    on_the_bus = 2 * (world_size - 1) / world_size * _LINK_BYTES
    return Link(
        processes=world_size,
        processes_per_machine=beside,
        bytes_per_s=on_the_bus / max(large_s - latency_s, 1e-9),
        latency_s=latency_s,
    )


def _all_reduce_s(tensor: torch.Tensor) -> float:
    """Median of a few; the first ones, which connect the processes, do not count."""
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])
