"""The curves that reports and slides want, as PNG."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from data_shards.temporaries import publish_bytes
from pipeline.comparison.colours import Line, line_of
from pipeline.comparison.curves import AXES, MOST_POINTS, thin
from pipeline.comparison.run import Run
from pipeline.comparison.seeds import Column
from pipeline.evaluation.plot import plot_run

_LOSSES = ("train/total_loss", "train/generator_mlm_loss", "train/discriminator_rtd_loss")
_HEADINGS = {
    "train/total_loss": "total loss",
    "train/generator_mlm_loss": "generator: MLM loss, nats",
    "train/discriminator_rtd_loss": "discriminator: RTD loss, nats",
}
_DPI = 160
_BOLD_POINTS = 150


def draw_pictures(columns: tuple[Column, ...], folder: Path) -> list[Path]:
    """Draws losses against FLOPs and tokens, and scores against FLOPs where there are some; what was drawn."""
    runs = [run for column in columns for run in column.runs]
    drawn = [_draw_losses(columns, axis, folder / f"loss_against_{axis}.png") for axis in ("flops", "tokens")]
    results = [found for run in runs for found in run.all_results]
    return [path for path in (*drawn, plot_run(results, folder) if results else None) if path]


def _draw_losses(columns: tuple[Column, ...], axis: str, path: Path) -> Path | None:
    runs = [run for column in columns for run in column.runs]
    losses = [name for name in _LOSSES if any(run.curves.last(name) is not None for run in runs)]
    if not losses:
        return None
    figure = Figure(figsize=(5.2 * len(losses), 4.2), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(losses), squeeze=False).flat)
    thinned = [_draw_loss(axes, columns, loss, axis) for axes, loss in zip(panels, losses, strict=True)]
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(columns)), frameon=False, fontsize=8)
    if max(thinned) > 1:
        figure.suptitle(f"Means of consecutive logged lines: faint {MOST_POINTS:,}, bold {_BOLD_POINTS} a curve",
                        fontsize=8, color="#555555")  # fmt: skip
    content = BytesIO()
    canvas.print_png(content)
    publish_bytes(path, content.getvalue())
    return path


def _draw_loss(axes: Axes, columns: tuple[Column, ...], loss: str, axis: str) -> int:
    """Draws one loss of all runs; returns how many lines a point of the boldest curve stands for."""
    most = 1
    for number, column in enumerate(columns):
        # Text between dollar signs would be set as mathematics, and a label that begins with _ is left out.
        labels = [column.name.replace("$", r"\$"), *["_"] * (len(column.runs) - 1)]
        for run, label in zip(column.runs, labels, strict=True):
            most = max(most, _draw_curve(axes, run, loss, axis, line_of(number), label))
    axes.set_title(_HEADINGS[loss], fontsize=10)
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    return most


def _draw_curve(axes: Axes, run: Run, loss: str, axis: str, line: Line, label: str) -> int:
    if run.curves.last(loss) is None:
        axes.plot([], [], color=line.colour, linestyle=line.matplotlib_dash, label=label)
        return 1
    faint, bold = thin(run.curves, loss), thin(run.curves, loss, _BOLD_POINTS)
    if bold.lines_per_point > 1:
        axes.plot(faint.axes[axis], faint.values, color=line.colour, linewidth=0.6, alpha=0.3)
    axes.plot(
        bold.axes[axis], bold.values, color=line.colour, linestyle=line.matplotlib_dash, linewidth=1.6, label=label,
        marker="o" if len(bold.values) == 1 else None, zorder=3,
    )  # fmt: skip
    if np.ptp(bold.values) > 0 and bold.values.max() > 3 * np.median(bold.values) and bold.values.min() > 0:
        axes.set_yscale("log")  # the first steps would press the rest flat
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(LogFormatter(minor_thresholds=(1.5, 0.5)))
    return bold.lines_per_point
