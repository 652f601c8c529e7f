"""How things are timed: CUDA events on GPU, process time on CPU; interleaved, medians of paired ratios."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]


class Timer:
    """Seconds of device work.

    On GPU the time between two CUDA events around the work, gaps between kernels included. On CPU
    the CPU time of all threads of this process, which other processes on the machine do not stretch.
    """

    def __init__(self, device: str):
        self.device = device
        self.clock = "CUDA events" if device == "cuda" else "process time"

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Seconds of one call, as the mean over ``calls`` in a row."""
        if self.device != "cuda":
            begin = time.process_time()
            for _ in range(calls):
                work()
            return (time.process_time() - begin) / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def measure(timer: Timer, work: Work, samples: int = 10, sample_s: float = 0.02) -> list[float]:
    """Seconds of a call, ``samples`` times; each sample lasts about ``sample_s``. Warm-up is discarded."""
    for _ in range(3):
        work()
    calls = max(1, min(1000, round(sample_s / max(timer.seconds(work), 1e-7))))
    return [timer.seconds(work, calls) for _ in range(samples)]


def interleave(
    timer: Timer, contenders: dict[str, Work], rounds: int, calls: int, before: Work | None = None
) -> dict[str, list[float]]:
    """Seconds of a call of each contender, once a round, the order reversed every other round.

    Neighbours share whatever state the machine is in, so entry i of one list pairs with entry i of another.

    Args:
        timer: Clock.
        contenders: Work by name.
        rounds: Samples of each.
        calls: Calls in a sample; one more before them is discarded.
        before: Runs ahead of each sample, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            if before:
                before()
            contenders[name]()
            seconds[name].append(timer.seconds(contenders[name], calls))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of some samples, and their number."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": len(values),
    }


def paired_ratio(numerators: list[float], denominators: list[float]) -> dict[str, Any]:
    """The median of the ratios of paired samples, and the ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "values": ratios}
