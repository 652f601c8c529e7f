"""Everything that a comparison found, ready to be shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.comparison.curves import AXES, Thinned, thin
from pipeline.comparison.differences import Differences, find_differences
from pipeline.comparison.measures import TRAINING_METRICS, Measure, measure
from pipeline.comparison.run import Run
from pipeline.comparison.seeds import Column, as_columns, keys_that_part, representative
from pipeline.comparison.significance import TaskScores, about_seeds, compare_scores


@dataclass(frozen=True)
class Report:
    """What text, page, pictures and JSON are made of.

    Attributes:
        runs: In the order of the columns.
        columns: What stands beside each other in the tables.
        curves: By metric name; None for a run that has no value of it.
        notes: What to bear in mind when reading it.
    """

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    differences: Differences
    measures: tuple[Measure, ...]
    curves: dict[str, tuple[Thinned | None, ...]]
    scores: tuple[TaskScores, ...]
    notes: tuple[str, ...]


def make_report(runs: Sequence[Run]) -> Report:
    """Compares two or more runs."""
    columns = as_columns(runs)
    runs = tuple(run for column in columns for run in column.runs)
    differences = find_differences([representative(column) for column in columns])
    scores = compare_scores(columns)
    notes = (*_notes(runs, differences), *_about_parted(columns), *([about_seeds(columns)] if scores else []))
    return Report(runs, columns, differences, tuple(measure(columns)), _thin_all(runs), tuple(scores), notes)


def metrics_in_order(runs: Sequence[Run]) -> list[str]:
    """Names of all metrics, the main ones first."""
    names = {name for run in runs for name in run.curves.metrics if not name.startswith(("time/", "progress/"))}
    main = [name for name in TRAINING_METRICS if name in names]
    return [*main, *sorted(names - set(main))]


def to_json(report: Report) -> dict[str, Any]:
    """All numbers, as JSON types."""
    return {
        "runs": [
            {"name": run.name, "source": run.source, "facts": run.facts, "settings": run.settings}
            for run in report.runs
        ],
        "columns": [{"name": column.name, "runs": [run.name for run in column.runs]} for column in report.columns],
        "differences": [difference.to_dict() for difference in report.differences.own],
        "following_differences": [difference.to_dict() for difference in report.differences.following],
        "recorded_by_some": list(report.differences.recorded_by_some),
        "measures": [row.to_dict() for row in report.measures],
        "scores": [row.to_dict() for row in report.scores],
        "notes": list(report.notes),
        "curves": {name: [_curve_to_json(curve) for curve in of_runs] for name, of_runs in report.curves.items()},
    }


def _curve_to_json(curve: Thinned | None) -> dict[str, Any] | None:
    if curve is None:
        return None
    axes = {axis: [_finite(place) for place in curve.axes[axis].tolist()] for axis in AXES}
    about = {"num_lines": curve.num_lines, "lines_per_point": curve.lines_per_point}
    return about | axes | {"values": curve.values.tolist()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _thin_all(runs: Sequence[Run]) -> dict[str, tuple[Thinned | None, ...]]:
    curves = {}
    for name in metrics_in_order(runs):
        thinned = (thin(run.curves, name) if name in run.curves.metrics else None for run in runs)
        of_runs = tuple(curve if curve and curve.num_lines else None for curve in thinned)
        if any(of_runs):
            curves[name] = of_runs
    return curves


def _about_parted(columns: Sequence[Column]) -> list[str]:
    return [
        f"{', '.join(run.name for run in runs)}: pretrained alike but for the seed, and still not one column, because "
        f"{' and '.join(keys)} differ{'s' if len(keys) == 1 else ''} as well."
        for runs, keys in keys_that_part(columns)
    ]


def _notes(runs: Sequence[Run], differences: Differences) -> list[str]:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [f"{run.name} has no journal: it has not trained." for run in runs if not len(run.curves.axes["step"])]
    notes += [
        f"{run.name}: not known from which data its scores on {', '.join(unknown)} are; they are taken for the others'."
        for run in runs
        if (unknown := sorted(set(run.results["tasks"]) - run.task_digests.keys() if run.results else ()))
    ]
    changed = {difference.key for difference in (*differences.own, *differences.following)}
    if any(key.startswith(("tokenizer.", "data.corpora.")) and not key.endswith(".path") for key in changed):
        notes.append("Text or tokenizer differ: losses are per token of each run's own, and not comparable.")
    if any(key.startswith("objective.") for key in changed):
        notes.append("Objectives differ: train/total_loss is not the same quantity in each run.")
    if len({run.facts.get("git") for run in runs}) > 1:
        notes.append("The runs trained with different commits of this program.")
    if differences.recorded_by_some:
        notes.append(f"Recorded by some of the runs only: {', '.join(differences.recorded_by_some)}.")
    return notes
