"""Where the time of one training step of ELECTRA-Large goes: the most expensive kernels, and how long the GPU idles."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from large_step import engine_step
from section import Context
from synthetic import build_engine, join_process_group, make_config, micro_batches, write_small_buckets
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROWS, TINY_ROWS = (64, 16), (4,)
_MOST_EXPENSIVE = 25
_NAME_CHARACTERS = 100
_WARM_UP_STEPS = 3


def run(context: Context) -> None:
    """One step for each number of rows, after some that are not recorded."""
    join_process_group(context.device)
    torch.manual_seed(context.seed)
    context.results["steps"] = []
    with TemporaryDirectory() as folder:
        sections: dict[str, Any] = {}
        if context.is_tiny:
            sections["deepspeed"] = {"config": write_small_buckets(Path(folder))}
        sizes = TINY_ROWS if context.is_tiny else ROWS
        engine, _ = build_engine(make_config(context.is_tiny, sizes[0], **sections), context.device, context.seed)
        for rows in sizes:
            config = make_config(context.is_tiny, rows, **sections)
            step = engine_step(engine, micro_batches(config, context.device, 2, True, context.seed, context.is_tiny))
            for _ in range(_WARM_UP_STEPS):
                step()
            context.results["steps"].append({"rows": rows} | _profile(context.is_cuda, step))


def _profile(is_cuda: bool, step: Callable[[], None]) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as recorded:
        step()
        if is_cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    return most_expensive(events) | (idle(events) if is_cuda else {})  # a CPU's operations contain each other


def most_expensive(events: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """Kernels by name, the most expensive first.

    Args:
        events: Name, begin and end in microseconds.
    """
    times_us: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in events:
        times_us[name].append(end - begin)
    sums_us = {name: sum(times) for name, times in times_us.items()}
    total_us = sum(sums_us.values())
    return {
        "kernels_ms": total_us / 1e3,
        "launches": sum(map(len, times_us.values())),
        "most_expensive": [
            {
                "name": name[:_NAME_CHARACTERS],
                "calls": len(times_us[name]),
                "ms": sums_us[name] / 1e3,
                "pct": 100 * sums_us[name] / total_us,
            }
            for name in sorted(sums_us, key=lambda name: -sums_us[name])[:_MOST_EXPENSIVE]
        ],
    }


def idle(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """How long no kernel ran between the first and the last, and the longest of these gaps."""
    spans = sorted((begin, end) for _, begin, end in events)
    first, reached = spans[0]
    idle_us = longest_us = 0.0
    for begin, end in spans:
        gap_us = max(0.0, begin - reached)
        idle_us, longest_us, reached = idle_us + gap_us, max(longest_us, gap_us), max(reached, end)
    span_us = reached - first
    return {"span_ms": span_us / 1e3, "idle_pct": 100 * idle_us / span_us, "longest_gap_us": longest_us}


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    lines = []
    for step in results.get("steps", []):
        where = f"{step['rows']} rows"
        if "idle_pct" in step:
            text = f"{step['span_ms']:.4g} ms, idle {step['idle_pct']:.1f} % of it, {step['launches']} launches"
            lines.append((f"{where}: GPU", text))
        for kernel in step["most_expensive"]:
            lines.append((f"{where}: {kernel['name'].replace('|', ' ')}",
                          f"{kernel['ms']:.3g} ms, {kernel['pct']:.1f} %, {kernel['calls']} calls"))  # fmt: skip
    return lines
