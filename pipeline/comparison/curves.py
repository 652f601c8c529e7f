"""A journal as columns: values at a place between logged lines, and curves thinned for drawing."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

AXES = {
    "step": "step",
    "tokens": "tokens",
    "flops": "FLOPs (nominal)",
    "wall_s": "seconds of training",
}
"""What a curve can be drawn against, with its heading."""

FLOPS_PAPER = "progress/flops_paper"
"""FLOPs in the paper's counting, by MLflow's name."""

MOST_POINTS = 2000


@dataclass(frozen=True)
class Curves:
    """Columns of one length, in step order.

    Attributes:
        axes: By the keys of ``AXES``.
        metrics: By metric name; NaN where a line has no finite value.
    """

    axes: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]

    def last(self, metric: str) -> float | None:
        """The last finite value, None without one."""
        values = self.metrics.get(metric, np.empty(0))
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def at_end(self, metric: str) -> float | None:
        """The last line's value, None if that is not finite: a diverged run's last finite one is from long before."""
        values = self.metrics.get(metric, np.empty(0))
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    def end(self, axis: str) -> float | None:
        """Where the run ended on an axis; None if it has no line."""
        values = self.axes[axis]
        return float(values[-1]) if len(values) else None

    def value_at(self, metric: str, axis: str, place: float) -> float | None:
        """On the straight line between the logged lines next to ``place``; None beyond the first and the last one."""
        if metric not in self.metrics:
            return None
        known = np.isfinite(self.metrics[metric]) & np.isfinite(self.axes[axis])
        at, values = self.axes[axis][known], self.metrics[metric][known]
        if not len(at) or not at[0] <= place <= at[-1]:
            return None
        return float(np.interp(place, at, values))


@dataclass(frozen=True)
class Thinned:
    """A curve for drawing.

    Attributes:
        axes: By the keys of ``AXES``, of the same length as ``values``.
        num_lines: Logged lines with a value.
        lines_per_point: Most lines whose mean is a point; 1: the values as they are.
    """

    axes: dict[str, np.ndarray]
    values: np.ndarray
    num_lines: int
    lines_per_point: int


def columns_of(entries: Iterable[Mapping[str, Any]]) -> Curves:
    """The columns of journal entries; takes eight bytes for each number, however many lines there are."""
    columns: dict[str, array] = {}
    count = 0
    for count, entry in enumerate(entries, 1):
        for name, value in entry.items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = array("d")
            if len(column) < count - 1:
                column.extend([np.nan] * (count - 1 - len(column)))
            column.append(np.nan if value is None else value)
    filled = {name: np.full(count, np.nan) for name in (*AXES, *columns)}
    for name, column in columns.items():
        filled[name][: len(column)] = column
    axes = {axis: filled.pop(axis) for axis in AXES}
    metrics = {name: values for name, values in filled.items() if "/" in name}
    if "flops_paper" in filled:
        metrics[FLOPS_PAPER] = filled["flops_paper"]
    return Curves(axes, metrics)


def thin(curves: Curves, metric: str, most: int = MOST_POINTS) -> Thinned:
    """The lines that have the metric; of more than ``most`` the means of consecutive ones, on each axis too."""
    known = np.isfinite(curves.metrics[metric])
    axes = {name: values[known] for name, values in curves.axes.items()}
    values, count = curves.metrics[metric][known], int(known.sum())
    if count <= most:
        return Thinned(axes, values, count, 1)
    edges = np.arange(most + 1) * count // most
    sizes = np.diff(edges)

    def mean(column: np.ndarray) -> np.ndarray:
        return np.add.reduceat(column, edges[:-1]) / sizes

    return Thinned({name: mean(column) for name, column in axes.items()}, mean(values), count, int(sizes.max()))


def largest_common(all_curves: Iterable[Curves], axis: str) -> float | None:
    """The farthest place that every run has reached; None if one has no line."""
    ends = [curves.end(axis) for curves in all_curves]
    known = [end for end in ends if end is not None and np.isfinite(end)]
    return min(known) if ends and len(known) == len(ends) else None
