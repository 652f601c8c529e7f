"""What a run will take, from what a step is made of; needs no torch. The formula stands in pipeline/README.md.

The inputs come from what ``electra tune`` measured (``pipeline.measured``) or from the table here. Each one
carries its origin, and an estimate says how many of them were measured.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from pipeline.config import Config
from pipeline.deepspeed_config import zero_stage
from pipeline.plan import Plan

Origin = Literal["measured", "published", "derived", "assumed"]

_BACKWARD_SHARE = 2 / 3  # of a micro-batch's time, as of its FLOPs: what a reduction can hide behind
_SMALL_EXCHANGES = 3  # a step: the losses' denominators, overflow, gradient norm
_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_KERNELS_PER_LAYER = 60  # launched forward and backward, unfused
# Gradient, and weight and both moments read and written, in fp32; LAMB reads weight and update again, and keeps it.
_UPDATE_BYTES = {"adamw": 28, "lamb": 44}


@dataclass(frozen=True)
class Input:
    """One number that an estimate rests on, as text with unit."""

    name: str
    value: str
    origin: Origin
    source: str

    @classmethod
    def of(cls, name: str, value: str, source: str) -> "Input":
        """From a source that begins with its origin."""
        return cls(name, value, cast(Origin, source.partition(":")[0]), source.partition(": ")[2])


@dataclass(frozen=True)
class Hardware:
    """A GPU in a cluster of nodes of eight, as published.

    Attributes:
        name: Of the GPU; also how a measured device is recognised.
        product: bf16 or fp16 matrix products, FLOP/s.
        product_fp32: The same in fp32 without TF32.
        memory: Bytes/s that element-wise kernels reach.
        link: Bus bandwidth of an all-reduce in a node, bytes/s.
        rail: What each GPU of a node adds to that between nodes, bytes/s.
    """

    name: str
    product: tuple[float, str]
    product_fp32: tuple[float, str]
    memory: tuple[float, str]
    link: tuple[float, str]
    rail: tuple[float, str]


_MAMF = "derived: 790 of 794.5, the maximum achievable matmul FLOPS of H100 and H200 SXM by stas00/ml-engineering"
_FP32 = (67e12, "published: NVIDIA's datasheet, fp32 outside the tensor cores")
_NVLINK = (350e9, "derived: 78 % of NVLink's 450 GB/s in one direction (NVIDIA's datasheet)")
_RAIL = (43.75e9, "derived: 87.5 % of a 400 Gbit/s adapter per GPU")
HARDWARE = {
    "h200": Hardware(
        "H200", (790e12, _MAMF), _FP32, (4.3e12, "derived: 90 % of the datasheet's 4.8 TB/s"), _NVLINK, _RAIL
    ),
    "h100": Hardware(
        "H100", (790e12, _MAMF), _FP32, (3.0e12, "derived: 90 % of the datasheet's 3.35 TB/s"), _NVLINK, _RAIL
    ),
}
_REACHED_SHARE = (0.4, "assumed: MLPerf 4.1's BERT-Large on H200 reaches 0.63 of it with FP8 (500 TFLOP/s)")
_LAUNCH_S = (8e-6, f"assumed: {_KERNELS_PER_LAYER} kernels a layer and micro-batch from Python")
_LATENCY_S = (4e-5, "assumed: of NCCL, tens of µs")
_ROW_S = (4.2e-6, "derived: 1.46 + 2.73 µs, rows of 512 tokens packed and masked on a CPU core, data_shards/README.md")


@dataclass(frozen=True)
class Figures:
    """What one process needs for its parts of a step.

    Attributes:
        hardware: For people.
        device_kind: ``cpu`` or ``cuda``.
        micro_batch_s: Forward and backward of the plan's micro-batch.
        update_s: Clipping and update of all parameters, unsharded.
        row_s: To have a row ready.
        link_bytes_per_s: Bus bandwidth between the processes, see ``Link``; inf for one process.
        latency_s: Of a small collective; 0 for one process.
        inputs: The numbers behind these.
    """

    hardware: str
    device_kind: str
    micro_batch_s: float
    update_s: float
    row_s: float
    link_bytes_per_s: float
    latency_s: float
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class Estimate:
    """A step's parts and a run's length; seconds, of the process with the most work.

    Attributes:
        basis: Whether the inputs were measured.
        reduce_exposed_s: Gradient reduction that the device waits for.
        reduce_hidden_s: The rest of it, behind the backward pass.
        gather_s: All-gathers of weights.
        data_s: Making of rows that the device waits for.
        days: All steps; checkpoints, held-out scores, start-ups and waiting for Slurm come on top.
        device_hours: ``days`` of all processes.
    """

    hardware: str
    device_kind: str
    basis: str
    world_size: int
    compute_s: float
    reduce_exposed_s: float
    reduce_hidden_s: float
    gather_s: float
    exchange_s: float
    update_s: float
    data_s: float
    step_s: float
    tokens_per_s: float
    tflop_per_s_per_device: float
    days: float
    device_hours: float
    inputs: tuple[Input, ...]

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types."""
        return asdict(self)


def estimate(plan: Plan, precision: str, settings: dict[str, Any], figures: Figures) -> Estimate:
    """The model of a step.

    Args:
        plan: The run.
        precision: ``train.precision``.
        settings: What DeepSpeed gets: stage, overlap, buckets.
        figures: Of the hardware.
    """
    zero, n, parts = settings["zero_optimization"], plan.world_size, plan.accumulation_steps
    stage = zero_stage(settings)
    ring = (n - 1) / n
    # fp32 on the wire. DeepSpeed 0.19 all-reduces under stages 1 and 2 too; stage 3 scatters. From stage 2 on
    # gradients are sharded, so every micro-batch is reduced.
    reductions = parts if stage >= 2 else 1
    num_bytes = 4 * plan.parameters_trained * (1 if stage == 3 else 2) * ring
    buckets = -(-plan.parameters_trained // zero.get("reduce_bucket_size", _DEFAULT_BUCKET))
    reduce_s = reductions * (num_bytes / figures.link_bytes_per_s + buckets * figures.latency_s)
    overlap = zero.get("overlap_comm")
    overlaps = stage > 0 and (stage == 3 if overlap is None else overlap)
    hidden_s = min(reduce_s, reductions * _BACKWARD_SHARE * figures.micro_batch_s) if overlaps else 0.0
    weight_bytes = (4 if precision == "fp32" else 2) * plan.parameters_trained * ring
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * parts}[stage]
    gather_s = gathers * (weight_bytes / figures.link_bytes_per_s + figures.latency_s)
    compute_s = parts * figures.micro_batch_s
    update_s = figures.update_s / (n if stage else 1)
    exchange_s = _SMALL_EXCHANGES * figures.latency_s
    busy_s = compute_s + reduce_s - hidden_s + gather_s + exchange_s + update_s
    data_s = parts * plan.micro_batch_rows * figures.row_s
    if figures.device_kind == "cuda":  # a thread makes the next step's rows while the GPU works
        data_s = max(0.0, data_s - busy_s)
    step_s = busy_s + data_s
    seconds = step_s * plan.steps
    return Estimate(
        figures.hardware, figures.device_kind, _basis(figures.inputs), n, compute_s, reduce_s - hidden_s, hidden_s,
        gather_s, exchange_s, update_s, data_s, step_s,
        tokens_per_s=plan.tokens_per_step / step_s,
        tflop_per_s_per_device=plan.flops_per_step / step_s / n / 1e12,
        days=seconds / 86400,
        device_hours=n * seconds / 3600,
        inputs=figures.inputs,
    )  # fmt: skip


def _basis(inputs: Sequence[Input]) -> str:
    measured = sum(item.origin == "measured" for item in inputs)
    if measured == len(inputs):
        return "modelled from measurements"
    return f"modelled, {measured} of {len(inputs)} inputs measured" if measured else "modelled, not measured"


def published_figures(hardware: Hardware, config: Config, plan: Plan, processes_per_node: int) -> Figures:
    """Figures of a GPU of the table, on nodes with so many of them."""
    rate, rate_source = hardware.product_fp32 if config.train.precision == "fp32" else hardware.product
    share, share_source = _REACHED_SHARE
    layers = config.model.discriminator.layers + config.model.generator.layers * config.objective.has_generator
    tokens = plan.micro_batch_rows * plan.sequence_length_tokens
    launch_s = layers * _KERNELS_PER_LAYER * _LAUNCH_S[0]
    num_bytes = _UPDATE_BYTES[config.optimizer.name]
    inputs = [
        Input.of("matrix products", f"{rate / 1e12:.0f} TFLOP/s", rate_source),
        Input.of("reached share of them", f"{share:g}", share_source),
        Input.of("a kernel's launch", f"{_LAUNCH_S[0] * 1e6:g} µs", _LAUNCH_S[1]),
        Input.of("memory", f"{hardware.memory[0] / 1e12:g} TB/s", hardware.memory[1]),
        Input.of("update", f"{num_bytes} bytes a parameter", f"derived: what {config.optimizer.name} reads and writes"),
        Input.of("a row", f"{_ROW_S[0] * 1e6:g} µs", _ROW_S[1]),
    ]
    figures = Figures(
        hardware.name, "cuda",
        micro_batch_s=max(tokens * plan.flops_per_token / (rate * share), launch_s),
        update_s=plan.parameters_trained * num_bytes / hardware.memory[0],
        row_s=_ROW_S[0], link_bytes_per_s=math.inf, latency_s=0.0, inputs=tuple(inputs),
    )  # fmt: skip
    return with_published_link(figures, hardware, plan.world_size, processes_per_node)


def with_published_link(figures: Figures, hardware: Hardware, n: int, processes_per_node: int) -> Figures:
    """The figures for ``n`` processes, joined as the table says."""
    if n == 1:
        return figures
    bandwidth, source = hardware.link
    between = processes_per_node * hardware.rail[0]
    if n > processes_per_node and between <= bandwidth:
        bandwidth, source = between, f"{hardware.rail[1]}, {processes_per_node} GPUs a node"
    more = (
        Input.of("all-reduce", f"{bandwidth / 1e9:.0f} GB/s", source),
        Input.of("a collective's latency", f"{_LATENCY_S[0] * 1e6:g} µs", _LATENCY_S[1]),
    )
    return replace(figures, link_bytes_per_s=bandwidth, latency_s=_LATENCY_S[0], inputs=(*figures.inputs, *more))


def describe_estimate(found: Estimate) -> list[tuple[str, str]]:
    """The estimate as lines for people: name and value with unit, then its inputs."""
    parts = {
        "forward and backward": found.compute_s,
        "exposed gradient reduction": found.reduce_exposed_s,
        "(hidden gradient reduction)": found.reduce_hidden_s,
        "all-gather of weights": found.gather_s,
        "small exchanges": found.exchange_s,
        "clipping and update": found.update_s,
        "rows that are waited for": found.data_s,
    }
    device = "GPU" if found.device_kind == "cuda" else "process"
    return [
        ("estimate", f"{found.basis}: {found.hardware}"),
        ("a step", f"{found.step_s:.4g} s, of which"),
        *((f"  {name}", f"{seconds:.3g} s") for name, seconds in parts.items()),
        ("tokens per second", f"{found.tokens_per_s:,.0f}, {found.tflop_per_s_per_device:.3g} TFLOP/s per {device}"),
        ("the whole run", f"{found.days:.3g} days, {found.device_hours:,.4g} {device} hours; steps only"),
        *((f"  {item.name}", f"{item.value} ({item.origin}: {item.source})") for item in found.inputs),
    ]
