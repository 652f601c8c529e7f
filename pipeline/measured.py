"""What ``electra tune`` measured: the file's form, and the figures that an estimate takes from it; needs no torch."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from data_shards.store import write_json
from model.config import Section
from pipeline.config import Config, flatten
from pipeline.cost import (
    HARDWARE,
    Estimate,
    Figures,
    Hardware,
    Input,
    Origin,
    estimate,
    published_figures,
    with_published_link,
)
from pipeline.deepspeed_config import build_deepspeed_config, read_deepspeed_json, zero_stage
from pipeline.errors import ConfigError, UsageError
from pipeline.log import logger
from pipeline.plan import Plan

MEASURED = "measured"
"""``--hardware`` that means the one that ``electra tune`` ran on."""


class Link(Section):
    """What a collective among processes costs.

    ``bytes_per_s`` is the bus bandwidth of an all-reduce: 2 (n - 1) / n of its bytes over its seconds
    (NVIDIA nccl-tests, PERFORMANCE.md), which does not depend on the number of processes n.
    """

    processes: int = Field(ge=2, description="That it was measured with.")
    processes_per_machine: int = Field(ge=1, description="Of them on one machine.")
    bytes_per_s: float = Field(gt=0, description="Bus bandwidth of a large all-reduce.")
    latency_s: float = Field(ge=0, description="Of an all-reduce of one number.")


class MicroBatchTime(Section):
    """Forward and backward of one micro-batch."""

    kernels: str = Field(description="Overrides that choose them.")
    rows: int = Field(ge=1, description="Rows.")
    seconds: float = Field(gt=0, description="Median.")
    runs: int = Field(ge=1, description="Steps that the median is of.")
    peak_gib: float = Field(ge=0, description="Peak memory.")


class Measurement(Section):
    """What ``electra tune`` found for one piece of work on one device."""

    device: str = Field(description="The device's own name.")
    device_kind: Literal["cpu", "cuda"] = Field(description="Kind.")
    work: dict[str, Any] = Field(description="See ``work_of``; a measurement holds for equal work only.")
    flops_per_token: float = Field(gt=0, description="Nominal training FLOPs of what ran.")
    parameters: int = Field(ge=1, description="Trained.")
    processes_beside: int = Field(ge=1, description="Processes that ran on this machine at once, this one included.")
    threads: int = Field(ge=1, description="CPU threads of the process.")
    micro_batches: list[MicroBatchTime] = Field(min_length=1, description="By kernels and rows.")
    auto_kernels: str = Field(description="Kernels that ``auto`` stands for there.")
    update_s: float = Field(ge=0, description="What a step adds to its micro-batches in one process.")
    row_s: float = Field(ge=0, description="To find, read, pack and mask a row, and to move it to the device.")
    rows_from: Literal["shards", "synthetic"] = Field(description="Which rows those were.")
    link: Link | None = Field(None, description="Where several processes ran.")
    torch: str = Field(description="Version.")
    commit: str | None = Field(description="Of the program.")
    unix_s: float = Field(description="When.")


_MEASUREMENTS = TypeAdapter(list[Measurement])


def work_of(config: Config) -> dict[str, Any]:
    """What a step's time depends on besides the device, the kernels and the micro-batch's rows, by key."""
    sections = {"model": config.model, "objective": config.objective}
    return flatten({name: section.model_dump(mode="json") for name, section in sections.items()}) | {
        "data.layout": config.data.layout,
        "data.sequence_length": config.data.sequence_length,
        "tokenizer.vocab_size": config.tokenizer.vocab_size,
        "train.precision": config.train.precision,
        "train.deterministic": config.train.deterministic,
        "train.activation_checkpointing": config.train.activation_checkpointing,
        "kernels.compile_layers": config.kernels.compile_layers,
        "optimizer.name": config.optimizer.name,
        "ZeRO stage": zero_stage(read_deepspeed_json(config.deepspeed.config)),
    }


def read_measurements(path: Path) -> list[Measurement]:
    """A file that ``electra tune`` wrote.

    Raises:
        ConfigError: No such file, or not such a file.
    """
    try:
        return _MEASUREMENTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `electra tune CONFIG` writes one and prints its path") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: not what `electra tune` writes ({f'{where}: ' if where else ''}{first['msg']}); "
            "remove it and measure again"
        ) from None


def measured_folder(config: Config) -> Path:
    """Where ``electra tune`` writes, one file for each device."""
    return config.run.dir / "measured"


def measurement_file(config: Config, device: str) -> Path:
    """The file of the device of that name."""
    return measured_folder(config) / f"{re.sub(r'[^A-Za-z0-9.]+', '_', device)}.json"


def write_measurement(config: Config, measurement: Measurement) -> Path:
    """Adds it to its device's file, in place of an earlier one of the same work, processes and threads.

    Returns:
        The file.

    Raises:
        ConfigError: What is there already is not such a file.
    """
    path = measurement_file(config, measurement.device)
    kept = read_measurements(path) if path.exists() else []
    same = (measurement.work, measurement.processes_beside, measurement.threads)
    kept = [other for other in kept if (other.work, other.processes_beside, other.threads) != same]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [item.model_dump(mode="json") for item in [*kept, measurement]])
    return path


def make_estimate(
    config: Config, plan: Plan, hardware: str | None = None, measured: Path | None = None, gpus_per_node: int = 8
) -> Estimate:
    """What a run will take on the hardware that ``choose_figures`` chooses."""
    settings = build_deepspeed_config(config, plan)
    return estimate(
        plan, config.train.precision, settings, choose_figures(config, plan, hardware, measured, gpus_per_node)
    )


def choose_figures(
    config: Config, plan: Plan, hardware: str | None, file: Path | None, processes_per_node: int
) -> Figures:
    """The figures that an estimate for ``plan`` rests on.

    Args:
        config: The run.
        plan: What it does on how many processes.
        hardware: A key of ``HARDWARE``, or ``MEASURED``; None: measured if there is a measurement for this work and
            number of processes in the run's folder, else an H200.
        file: The measurements; None: those in ``<run.dir>/measured``.
        processes_per_node: GPUs of a node.

    Raises:
        UsageError: No such hardware, or a file beside another hardware.
        ConfigError: Measurements are asked for, and none of them is of this work; a file that is none.
    """
    if hardware not in (None, MEASURED, *HARDWARE):
        raise UsageError(f"--hardware {hardware}: not known; choose one of {', '.join([*HARDWARE, MEASURED])}")
    if file and hardware not in (None, MEASURED):
        raise UsageError(f"--hardware {hardware} and --measured {file} both say what to reckon with; leave one out")
    if hardware in HARDWARE:
        return published_figures(HARDWARE[hardware], config, plan, processes_per_node)
    files = [file] if file else sorted(measured_folder(config).glob("*.json"))
    found = [measurement for path in files for measurement in read_measurements(path)]
    reasons = [_why_not(measurement, config, plan, processes_per_node) for measurement in found]
    fitting = [measurement for measurement, reason in zip(found, reasons, strict=True) if not reason]
    if fitting:
        beside = min(plan.world_size, processes_per_node)
        best = max(fitting, key=lambda item: (-abs(item.processes_beside - beside), item.link is not None, item.unix_s))
        return measured_figures(best, config, plan, processes_per_node)
    where = file or measured_folder(config)
    if file or hardware == MEASURED:
        problem = reasons[-1] if found else "it holds no measurement"
        raise ConfigError(f"{where}: {problem}; run `electra tune` with this config")
    if found:
        logger.warning("%s: passed over for published figures of an H200: %s", where, reasons[-1])
    return published_figures(HARDWARE["h200"], config, plan, processes_per_node)


def _why_not(measurement: Measurement, config: Config, plan: Plan, processes_per_node: int) -> str:
    """Why a measurement says nothing about a run; empty when it does."""
    work = work_of(config)
    differ = sorted(key for key in work.keys() | measurement.work.keys() if work.get(key) != measurement.work.get(key))
    if differ:
        key = differ[0]
        return (
            f"measured for another work: {key}={measurement.work.get(key)} and not {work.get(key)}"
            f"{f', {len(differ) - 1} more keys' if len(differ) > 1 else ''}"
        )
    device, threads = config.launch.device, config.launch.threads_per_process
    if device not in ("auto", measurement.device_kind):
        return f"measured on {measurement.device_kind} and not launch.device={device}"
    if threads not in ("auto", measurement.threads):
        return f"measured with {measurement.threads} thread(s) and not launch.threads_per_process={threads}"
    if not _times(measurement, config):
        return f"nothing was measured with kernels.backend={config.kernels.backend}"
    n = plan.world_size
    if n == 1 or _link_for(measurement, n, processes_per_node) or _known(measurement):
        return ""
    if measurement.link:
        return (
            f"the link was measured within one machine, and {n} processes, {processes_per_node} a node, need more "
            "than one: start it on several with srun, or raise --gpus-per-node"
        )
    return (
        f"nothing was measured between processes, which an estimate for {n} needs: start it "
        "with `torchrun --nproc-per-node=2 -m pipeline tune`, or srun"
    )


def _link_for(measurement: Measurement, n: int, processes_per_node: int) -> Link | None:
    """The measured link, if it joins ``n`` processes: one machine says nothing about the wires between two."""
    link = measurement.link
    return link if link and (n <= processes_per_node or link.processes > link.processes_per_machine) else None


def _known(measurement: Measurement) -> Hardware | None:
    return next((item for item in HARDWARE.values() if item.name in measurement.device), None)


def _times(measurement: Measurement, config: Config) -> list[MicroBatchTime]:
    """By rows, those with the configured kernels."""
    backend = config.kernels.backend
    kernels = measurement.auto_kernels if backend == "auto" else f"kernels.backend={backend}"
    return sorted((t for t in measurement.micro_batches if t.kernels == kernels), key=lambda t: t.rows)


def measured_figures(measurement: Measurement, config: Config, plan: Plan, processes_per_node: int) -> Figures:
    """Figures of the device that was measured; between processes as measured, else as published for it."""
    rows, times = plan.micro_batch_rows, _times(measurement, config)
    seconds = _seconds_at(rows, [(time.rows, time.seconds) for time in times])
    scale = plan.flops_per_token / measurement.flops_per_token  # two_stage's steps cost less than what ran
    sizes = ", ".join(str(time.rows) for time in times)
    is_exact = rows in [time.rows for time in times] and abs(scale - 1) < 1e-6
    origin: Origin = "measured" if is_exact else "derived"
    who = f"{measurement.device}, {measurement.processes_beside} process(es) of {measurement.threads} thread(s) at once"
    how = f"torch {measurement.torch}, {measurement.commit or 'no commit'}"
    inputs = [
        Input(f"micro-batch of {rows} rows", f"{seconds * scale:.4g} s", origin, f"{who}, {how}; rows tried: {sizes}"),
        Input("clipping and update", f"{measurement.update_s:.3g} s", "measured", "one process, unsharded"),
        Input("a row", f"{measurement.row_s * 1e6:.3g} µs", "measured", f"{measurement.rows_from} rows"),
    ]
    figures = Figures(
        measurement.device, measurement.device_kind, seconds * scale, measurement.update_s, measurement.row_s,
        math.inf, 0.0, tuple(inputs),
    )  # fmt: skip
    n = plan.world_size
    if n == 1:
        return figures
    link, known = _link_for(measurement, n, processes_per_node), _known(measurement)
    if not link:
        assert known
        return with_published_link(figures, known, n, processes_per_node)
    source = f"{link.processes} processes, {link.processes_per_machine} a machine"
    inputs += [
        Input("all-reduce", f"{link.bytes_per_s / 1e9:.3g} GB/s", "measured", source),
        Input("a collective's latency", f"{link.latency_s * 1e6:.3g} µs", "measured", source),
    ]
    return replace(figures, link_bytes_per_s=link.bytes_per_s, latency_s=link.latency_s, inputs=tuple(inputs))


def _seconds_at(rows: int, points: list[tuple[int, float]]) -> float:
    """On the line through the two measured sizes around ``rows``; beyond the largest, that through both ends.

    Below the smallest it takes as long as the smallest: what launches cost does not shrink with the rows.
    """
    below = [point for point in points if point[0] <= rows]
    above = [point for point in points if point[0] >= rows]
    if not above:
        (few, few_s), (most, most_s) = points[0], points[-1]
        per_row_s = (most_s - few_s) / (most - few) if most_s > few_s else most_s / most
        return most_s + (rows - most) * per_row_s
    if not below or below[-1] == above[0]:
        return above[0][1]
    (low, low_s), (high, high_s) = below[-1], above[0]
    return low_s + (high_s - low_s) * (rows - low) / (high - low)
