"""Scores of runs beside each other, and what the spread over seeds lets one say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline.comparison.run import Run
from pipeline.comparison.seeds import FEWEST_SEEDS, Column, spread

MOST_SPLITS, RANDOM_SPLITS = 200_000, 99_999

_FINE_TUNING = (
    "Seeds are those of fine-tuning, from one pretrained network for each run. They do not cover the spread over "
    "pretraining seeds: a difference that is significant here may still be one between two pretrainings by chance."
)
_PRETRAINING = (
    "A column of several seeds has one score for each pretraining, the median over its fine-tuning seeds; its spread "
    "and its tests are over pretrainings. "
)


@dataclass(frozen=True)
class Score:
    """A score on a task, fractions of 1, over seeds; ``std`` is None for one seed.

    Attributes:
        values: Of a run one for each fine-tuning seed; of several runs their medians.
        seeds: Which seeds these are.
    """

    values: tuple[float, ...]
    median: float
    mean: float
    std: float | None
    seeds: Literal["fine-tuning", "pretraining"] = "fine-tuning"


@dataclass(frozen=True)
class Test:
    """A column against the first one on a task.

    Attributes:
        difference: Of the means, this column's less the first one's.
        p: Of the permutation test, two-sided; None where it was not made.
        p_holm: The same after Holm's correction over all tests of the table.
        exact: Whether all splits were tried.
        reason: Why no test was made.
    """

    difference: float | None
    p: float | None = None
    p_holm: float | None = None
    exact: bool = True
    reason: str = ""


@dataclass(frozen=True)
class TaskScores:
    """A row of the table.

    Attributes:
        scores: One for each column; None where it has not done the task.
        tests: One for each column but the first.
    """

    task: str
    metric: str
    scores: tuple[Score | None, ...]
    tests: tuple[Test, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_scores(columns: Sequence[Column]) -> list[TaskScores]:
    """Every task that a run has results of, by the task's own metric."""
    runs = [run for column in columns for run in column.runs]
    tasks = dict.fromkeys(task for run in runs if run.results for task in run.results["tasks"])
    rows = [_compare_task(task, columns) for task in tasks]
    made = [test.p for row in rows for test in row.tests if test.p is not None]
    corrected = iter(holm(made))
    return [TaskScores(row.task, row.metric, row.scores, _with_correction(row.tests, corrected)) for row in rows]


def about_seeds(columns: Sequence[Column]) -> str:
    """Which of the two spreads the scores have."""
    several = [len(column.runs) > 1 for column in columns]
    if not any(several):
        return _FINE_TUNING
    return _PRETRAINING + ("" if all(several) else f"Elsewhere: {_FINE_TUNING}")


def permutation_p(first: Sequence[float], second: Sequence[float]) -> tuple[float, bool]:
    """Share of the splits of all values into two such groups whose means lie at least as far apart.

    Returns:
        The two-sided p-value, and whether all splits were tried; a sample of them is the same at every call.
    """
    from scipy.stats import permutation_test

    def distance(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(np.mean(one, axis=axis) - np.mean(other, axis=axis))

    exact = math.comb(len(first) + len(second), len(first)) <= MOST_SPLITS
    result = permutation_test(
        (np.asarray(first), np.asarray(second)), distance, permutation_type="independent", alternative="greater",
        n_resamples=MOST_SPLITS if exact else RANDOM_SPLITS, vectorized=True, batch=10_000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(result.pvalue), exact


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _compare_task(task: str, columns: Sequence[Column]) -> TaskScores:
    runs = [run for column in columns for run in column.runs]
    metric = next(run.results["score"][task] for run in runs if run.results and task in run.results["score"])
    scores = tuple(_score(column, task, metric) for column in columns)
    tests = tuple(
        _test(task, columns[0], column, scores[0], score) for column, score in zip(columns[1:], scores[1:], strict=True)
    )
    return TaskScores(task, metric, scores, tests)


def _score(column: Column, task: str, metric: str) -> Score | None:
    summaries = [run.results["tasks"].get(task, {}).get(metric) for run in column.runs if run.results]
    known = [summary for summary in summaries if summary]
    if not known:
        return None
    if len(column.runs) == 1:
        (summary,) = known
        return Score(tuple(summary["values"]), summary["median"], summary["mean"], summary["std"])
    medians = [summary["median"] for summary in known]
    return Score(tuple(medians), statistics.median(medians), statistics.fmean(medians), spread(medians), "pretraining")


def _test(task: str, first: Column, column: Column, base: Score | None, score: Score | None) -> Test:
    if base is None or score is None:
        return Test(None, reason="not done by both")
    difference = score.mean - base.mean
    reason = _why_not(task, *first.runs, *column.runs) or _too_few(base, score)
    if reason:
        return Test(difference, reason=reason)
    p, exact = permutation_p(base.values, score.values)
    return Test(difference, p, exact=exact)


def _why_not(task: str, *runs: Run) -> str:
    """What makes the scores of runs those of different tasks."""
    done = [run for run in runs if run.results and task in run.results["tasks"]]
    digests = [digest for run in done if (digest := run.task_digests.get(task))]  # earlier versions left none in MLflow
    kept = min(map(len, digests), default=0)  # MLflow keeps the first characters
    if len({digest[:kept] for digest in digests}) > 1:
        return "another task file or other data"
    recipes = [run.results.get("recipes", {}).get(task, {}) for run in done if run.results]
    changed = sorted(
        key for key in set().union(*recipes) if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)
    )
    return f"another recipe: {', '.join(changed)}" if changed else ""


def _too_few(*scores: Score) -> str:
    if len({score.seeds for score in scores}) > 1:
        return f"one pretraining on a side, fewer than {FEWEST_SEEDS}"
    fewest = min(len(score.values) for score in scores)
    return f"n = {fewest}, fewer than {FEWEST_SEEDS} seeds" if fewest < FEWEST_SEEDS else ""


def _with_correction(tests: Sequence[Test], corrected: Any) -> tuple[Test, ...]:
    return tuple(
        test if test.p is None else Test(test.difference, test.p, next(corrected), test.exact, test.reason)
        for test in tests
    )
