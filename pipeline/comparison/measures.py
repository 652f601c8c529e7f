"""Numbers of runs side by side: where they ended, what they measured there, and at equal FLOPs and tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from pipeline.comparison.curves import FLOPS_PAPER, largest_common
from pipeline.comparison.run import Run
from pipeline.comparison.seeds import Column, spread

TRAINING_METRICS = (
    "train/total_loss", "train/generator_mlm_loss", "train/mask_token_loss", "train/discriminator_rtd_loss",
    "train/generator_accuracy", "train/discriminator_accuracy", "train/discriminator_auc",
    "train/discriminator_recall", "train/prediction_loss", "train/prediction_accuracy", "train/replaced_fraction",
    "train/grad_norm", "train/learning_rate",
)  # fmt: skip
"""The main ones, in the order of the table; those that no run has are left out."""

_AT_EQUAL = TRAINING_METRICS[:10]
Kind = Literal["number", "count", "flops", "seconds", "text"]


@dataclass(frozen=True)
class OverSeeds:
    """A number of several pretrainings.

    Attributes:
        std: None if only one of them has it.
        values: One for each; None where it is not known.
    """

    mean: float
    std: float | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Attributes:
        group: Heading that it stands under.
        kind: How it is shown.
        values: One for each column; None where it is not known.
    """

    group: str
    name: str
    kind: Kind
    values: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(columns: Sequence[Column]) -> list[Measure]:
    """All rows that at least one run has a value for."""
    runs = [run for column in columns for run in column.runs]
    rows = [*_about_runs(runs), *_at_ends(runs), *_at_equal(runs, "flops", "FLOPs"), *_at_equal(runs, "tokens")]
    return [_by_column(row, columns) for row in rows if any(value is not None for value in row.values)]


def _by_column(row: Measure, columns: Sequence[Column]) -> Measure:
    """A row of values of all runs as one of the columns that they stand in."""
    values = iter(row.values)
    of_columns = [tuple(islice(values, len(column.runs))) for column in columns]
    return replace(row, values=tuple(_over_seeds(of_column, row.kind) for of_column in of_columns))


def _over_seeds(values: tuple[Any, ...], kind: Kind) -> Any:
    known = [value for value in values if value is not None]
    if len(set(values)) == 1 or not known:
        return values[0]
    if kind == "text":
        return ", ".join(dict.fromkeys(map(str, known)))
    return OverSeeds(float(np.mean(known)), spread(known), values)


def _about_runs(runs: Sequence[Run]) -> Iterable[Measure]:
    group = "the runs"

    def row(name: str, kind: Kind, values: Iterable[Any]) -> Measure:
        return Measure(group, name, kind, tuple(values))

    yield row("status", "text", (run.facts.get("status") for run in runs))
    yield row("step", "count", (run.curves.end("step") for run in runs))
    yield row("steps planned", "count", (_whole(run.settings.get("train.steps")) for run in runs))
    skipped = [run.curves.last("train/skipped_steps") for run in runs]
    yield row("steps skipped", "count", skipped if any(skipped) else ())
    yield row("tokens", "count", (run.curves.end("tokens") for run in runs))
    yield row("FLOPs (nominal)", "flops", (run.curves.end("flops") for run in runs))
    yield row("FLOPs (paper's count)", "flops", (run.curves.last(FLOPS_PAPER) for run in runs))
    yield row("training time", "seconds", (run.curves.end("wall_s") for run in runs))
    yield row("tokens/s (median)", "count", (_median(run, "speed/tokens_per_s") for run in runs))
    yield row("tokens/s a device (median)", "count", (_median(run, "speed/tokens_per_s_per_device") for run in runs))
    yield row("MFU, % (median)", "number", (_median(run, "speed/mfu_pct") for run in runs))
    yield row("peak memory, GiB", "number", (_largest(run, "memory/peak_gib") for run in runs))
    yield row("goodput, % productive", "number", (_goodput(run) for run in runs))
    yield row("attempts", "count", (run.facts.get("attempts") for run in runs))
    yield row("git commit", "text", (run.facts.get("git") for run in runs))


def _at_ends(runs: Sequence[Run]) -> Iterable[Measure]:
    for name in TRAINING_METRICS:
        yield Measure("at each run's end", name, "number", tuple(run.curves.at_end(name) for run in runs))
    for name in sorted({name for run in runs for name in run.curves.metrics if name.startswith("held_out/")}):
        yield Measure("held-out text, last scores", name, "number", tuple(run.curves.last(name) for run in runs))


def _at_equal(runs: Sequence[Run], axis: str, heading: str | None = None) -> Iterable[Measure]:
    """Values at the farthest place that every run has reached."""
    place = largest_common((run.curves for run in runs), axis)
    if place is None:
        return
    shown = f"{place:.4g}" if axis == "flops" else f"{place:,.0f}"
    for name in _AT_EQUAL:
        values = tuple(run.curves.value_at(name, axis, place) for run in runs)
        yield Measure(f"at {shown} {heading or axis}, the most that all have", name, "number", values)


def _goodput(run: Run) -> float | None:
    """Over all attempts where the account is at hand, else what the last attempt logged last."""
    known = run.facts.get("goodput_pct")
    return run.curves.last("goodput/productive_pct") if known is None else known


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _median(run: Run, metric: str) -> float | None:
    values = _finite(run, metric)
    return float(np.median(values)) if len(values) else None


def _largest(run: Run, metric: str) -> float | None:
    values = _finite(run, metric)
    return float(values.max()) if len(values) else None


def _finite(run: Run, metric: str) -> np.ndarray:
    values = run.curves.metrics.get(metric, np.empty(0))
    return values[np.isfinite(values)]


def show(value: Any, kind: Kind) -> str:
    """A value as people read it; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, OverSeeds):
        return show(value.mean, kind) + ("" if value.std is None else f" ± {show(value.std, kind)}")
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "seconds":
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"
    if kind == "flops":
        return f"{value:.3e}".replace("e+", "e")
    return str(value) if kind == "text" else f"{value:.4g}"
