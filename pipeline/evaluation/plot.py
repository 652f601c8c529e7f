"""Scores against the FLOPs of pretraining, ours and published ones, as in figure 1 of the ELECTRA paper."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from data_shards.temporaries import publish_bytes
from pipeline.evaluation.paper import GLUE_COLUMNS, OTHER_COLUMNS, PUBLISHED
from pipeline.log import logger

GLUE = "glue"
"""Stands for the GLUE average where a task is asked for."""

PLOT_NAME = "scores_and_flops.png"

_COLUMNS = {column.task: column for column in (*reversed(OTHER_COLUMNS), *GLUE_COLUMNS)}  # of SQuAD exact match
_OURS = "this project (median; 95 % interval of the mean)"
_STYLES = {  # apart without colour vision: after Okabe and Ito, and after Tol; markers differ as well
    "ELECTRA": ("#0072B2", "o"),
    "BERT": ("#555555", "s"),
    "RoBERTa": ("#009E73", "^"),
    "XLNet": ("#AA4499", "D"),
    "other": ("#000000", "x"),
    _OURS: ("#D55E00", "*"),
}
_PANEL_INCHES, _DPI = (6.4, 4.2), 200
_MARKER_POINTS, _STAR_POINTS, _FONT_POINTS = 6.0, 12.0, 7.5
_NEAR_POINTS = 7.0
_SAME_SCORE = 0.2  # per cent: a model that two sources report is drawn once


@dataclass(frozen=True)
class ScorePoint:
    """A score of one network.

    Attributes:
        flops: Of its pretraining, in the paper's counting.
        score: Fraction of 1.
        low: Lower end of an interval around the score, if there is one.
        high: Its upper end.
        run: Points of the same run are joined.
        family: What it is drawn as.
    """

    label: str
    flops: float
    score: float
    low: float | None = None
    high: float | None = None
    run: str = ""
    family: str = _OURS


def plot_scores(points: Sequence[ScorePoint], task: str, out: Path) -> None:
    """Draws one task as a PNG: our points beside the published ones. ``task`` can be ``GLUE``."""
    _publish({task: points}, out)


def plot_run(found: Sequence[Mapping[str, Any]], folder: Path) -> Path | None:
    """Draws every task of these results, a panel each; None if nothing in them has both a score and FLOPs."""
    tasks = [GLUE, *dict.fromkeys(task for results in found for task in results["tasks"])]
    panels, without_flops = {}, set()
    for task in tasks:
        points, left_out = _points(found, task)
        without_flops |= set(left_out)
        if points:
            panels[task] = points
    if without_flops:
        logger.info("not in the plot, as its FLOPs are not known: %s", ", ".join(sorted(without_flops)))
    if not panels:
        return None
    _publish(panels, folder / PLOT_NAME)
    return folder / PLOT_NAME


def points_of(results_files: Sequence[Path], task: str) -> tuple[list[ScorePoint], list[str]]:
    """The scores of a task (or ``GLUE``), in order of FLOPs.

    Returns:
        Points of the results that have the task and FLOPs in the paper's counting; names of those that have the task
        but no FLOPs, such as models that came as a Hugging Face folder.
    """
    return _points([json.loads(path.read_text(encoding="utf-8")) for path in results_files], task)


def published_points(task: str) -> list[ScorePoint]:
    """Published scores whose FLOPs are known, without models that a second source repeats."""
    points: list[ScorePoint] = []
    for model in PUBLISHED:
        column = _COLUMNS.get(task)
        per_cent = model.glue_average if task == GLUE else model.scores.get(column.key) if column else None
        if per_cent is None or model.flops is None:
            continue
        repeated = any(
            point.family == model.family
            and point.flops == model.flops
            and abs(100 * point.score - per_cent) < _SAME_SCORE
            for point in points
        )
        if not repeated:
            run, _, stopped_at = model.model.partition(", ")
            label = stopped_at.removesuffix(" of the steps") or run.removesuffix(" (released)")
            points.append(ScorePoint(label, model.flops, per_cent / 100, run=run, family=model.family))
    return points


def _points(found: Sequence[Mapping[str, Any]], task: str) -> tuple[list[ScorePoint], list[str]]:
    points, without_flops = [], []
    one_run = len({results.get("run") for results in found}) == 1
    for results in found:
        score, interval = _score_of(results, task)
        if score is None:
            continue
        run, step, flops = str(results.get("run", "")), results.get("step"), results.get("flops_paper")
        if flops is None:
            without_flops.append(str(results["checkpoint"]))
            continue
        steps = f"step {step:,}" if step is not None else ""
        label = steps if one_run and steps else ", ".join(filter(None, [run, steps]))
        points.append(ScorePoint(label, flops, score, *interval, run=run))
    return sorted(points, key=lambda point: point.flops), without_flops


def _score_of(results: Mapping[str, Any], task: str) -> tuple[float | None, Sequence[float | None]]:
    """Median and interval by the paper's metric, or of a task that it does not have by the task's own."""
    if task == GLUE:
        return results.get("glue_average"), (None, None)
    column = _COLUMNS.get(task)
    metric = column.metric if column else results.get("score", {}).get(task)
    summary = results["tasks"].get(task, {}).get(metric)
    if summary is None:
        return None, (None, None)
    return summary["median"], summary["ci95"] or (None, None)


def _publish(panels: Mapping[str, Sequence[ScorePoint]], out: Path) -> None:
    """Draws the panels in two columns, with one legend below."""
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    drawn = {task: [*points, *published_points(task)] for task, points in panels.items()}
    for axes, (task, points) in zip(all_axes, drawn.items(), strict=False):
        _draw(axes, task, points)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.legend(
        handles=_legend_entries([point for points in drawn.values() for point in points]),
        loc="outside lower center", ncols=3, frameon=False, fontsize=_FONT_POINTS + 1,
    )  # fmt: skip
    canvas.draw()  # settles the layout, which the labels' places depend on
    figure.set_layout_engine("none")
    for axes, points in zip(all_axes, drawn.values(), strict=False):
        _place_labels(axes, points, canvas)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(out, content.getvalue())


def _legend_entries(points: Sequence[ScorePoint]) -> list[Line2D]:
    entries = []
    for family, (colour, marker) in _STYLES.items():
        names = dict.fromkeys(point.label for point in points if point.family == family)
        if names:
            label = ", ".join(names) if family == "other" else family
            size = _marker_size(family)
            entries.append(Line2D([], [], color=colour, marker=marker, markersize=size, linestyle="none", label=label))
    return entries


def _marker_size(family: str) -> float:
    return _STAR_POINTS if family == _OURS else _MARKER_POINTS


def _draw(axes: Axes, task: str, points: Sequence[ScorePoint]) -> None:
    column = _COLUMNS.get(task)
    axes.set_title("GLUE average" if task == GLUE else column.heading if column else task, fontsize=10)
    split = "test" if task == "chunk" else "dev"
    axes.set_ylabel(f"{'score' if task == GLUE else _metric_name(task)} ({split}), per cent", fontsize=9)
    axes.set_xlabel("pretraining FLOPs (as the ELECTRA paper counts them)", fontsize=9)
    axes.set_xscale("log")
    axes.margins(x=0.17, y=0.16)
    if len(places := {point.flops for point in points}) == 1:
        axes.set_xlim(min(places) / 2, max(places) * 2)  # a single place gives an axis no width
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for begin, end in _lines(points):
        colour = _STYLES[begin.family][0]
        axes.plot([begin.flops, end.flops], [100 * begin.score, 100 * end.score], color=colour, linewidth=0.9)
    for point in points:
        colour, marker = _STYLES[point.family]
        size, order = _marker_size(point.family), 4 if point.family == _OURS else 3
        if point.low is not None and point.high is not None:
            axes.vlines(point.flops, 100 * point.low, 100 * point.high, color=colour, linewidth=1.4, zorder=order)
        axes.plot(point.flops, 100 * point.score, color=colour, marker=marker, markersize=size, zorder=order)


def _lines(points: Sequence[ScorePoint]) -> Iterator[tuple[ScorePoint, ScorePoint]]:
    """Neighbours in FLOPs of the same run."""
    for run in dict.fromkeys((point.family, point.run) for point in points if point.run):
        members = [point for point in points if (point.family, point.run) == run]
        yield from pairwise(sorted(members, key=lambda point: point.flops))


def _metric_name(task: str) -> str:
    column = _COLUMNS.get(task)
    names = {"matthews": "Matthews correlation", "spearman": "Spearman correlation", "exact": "exact match"}
    return names.get(column.metric, column.metric.removeprefix("span_").replace("f1", "F1")) if column else "score"


def _place_labels(axes: Axes, points: Sequence[ScorePoint], canvas: FigureCanvasAgg) -> None:
    """Puts each label where it covers nothing, ours first; a published one that finds no such place is left out."""
    taken = list(_obstacles(axes, points))
    for point in sorted(points, key=lambda point: (point.family != _OURS, point.family != "ELECTRA", -point.flops)):
        is_ours = point.family == _OURS
        label = axes.annotate(
            point.label, (point.flops, 100 * point.score), xytext=(0, 0), textcoords="offset points",
            color=_STYLES[point.family][0], fontsize=_FONT_POINTS, fontweight="bold" if is_ours else "normal",
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        covered = _find_place(label, taken, canvas, axes)
        taken += covered
        label.set_visible(is_ours or bool(covered))


def _find_place(label: Annotation, taken: Sequence[Bbox], canvas: FigureCanvasAgg, axes: Axes) -> list[Bbox]:
    """Moves the label to the first free place in the axes; what it covers then, with the line to a far one."""
    renderer, bounds = canvas.get_renderer(), axes.bbox
    marker = axes.transData.transform(label.xy)
    for distance, place in _places():
        label.set(**place)
        label.update_positions(renderer)
        is_far = distance > _NEAR_POINTS
        if label.arrow_patch:
            label.arrow_patch.set_visible(is_far)
        box = Text.get_window_extent(label, renderer)
        tip = np.clip(marker, box.min, box.max)
        begin = marker + (tip - marker) * min(1.0, _NEAR_POINTS / distance)
        covered = [box, *(_box(at, 0.5) for at in np.linspace(begin, tip, num=10) if is_far)]
        inside = bounds.x0 < box.x0 and box.x1 < bounds.x1 and bounds.y0 < box.y0 and box.y1 < bounds.y1
        if inside and not any(mine.overlaps(other) for mine in covered for other in taken):
            return covered
    return []


def _places() -> Iterator[tuple[float, dict[str, Any]]]:
    """Where a label may stand: beside its marker, above, below, and farther away."""
    for far in (_NEAR_POINTS, 12.0, 20.0, 30.0, 42.0):
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)):
            horizontal = "left" if x > 0 else "right" if x < 0 else "center"
            vertical = "bottom" if y > 0 else "top" if y < 0 else "center"
            yield far, {"position": (far * x, far * y), "ha": horizontal, "va": vertical}


def _obstacles(axes: Axes, points: Sequence[ScorePoint]) -> Iterator[Bbox]:
    """What markers, intervals and lines cover, in pixels; a line as many small boxes."""

    def pixels(flops: float, score: float) -> np.ndarray:
        return axes.transData.transform((flops, 100 * score))

    for point in points:
        yield _box(pixels(point.flops, point.score), _marker_size(point.family) / 2)
    lines = [(pixels(a.flops, a.score), pixels(b.flops, b.score)) for a, b in _lines(points)]
    for point in points:
        if point.low is not None and point.high is not None:
            lines.append((pixels(point.flops, point.low), pixels(point.flops, point.high)))
    for begin, end in lines:
        for place in np.linspace(begin, end, num=50):
            yield _box(place, 0.5)


def _box(place: np.ndarray, half_points: float) -> Bbox:
    half = half_points * _DPI / 72
    return Bbox([place - half, place + half])
