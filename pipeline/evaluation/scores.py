"""Metrics of downstream tasks, from scikit-learn, scipy and seqeval, as fractions of 1; spans of tags.

What a span is follows ``conlleval``, the script of the CoNLL shared tasks (Tjong Kim Sang and Buchholz, 2000): a
model's tags need not be well-formed, and every sequence of them has spans all the same.

The libraries are imported where they are used: together they take longer than the rest of an evaluation's start.
"""

import functools
import math
import operator
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pipeline.log import logger

_CONFIDENCE = 0.95


def score(metric: str, labels: Sequence[Any], predictions: Sequence[Any], positive: str | None = None) -> float:
    """One metric of a set of predictions.

    A correlation is undefined where the labels or the predictions are all the same. It then counts 0.0, as a
    model that says the same of every example deserves, and the log has a warning, once for each metric.

    Args:
        metric: ``accuracy`` (of words, where labels are lists of tags), ``f1`` (of the class ``positive``),
            ``matthews``, ``pearson``, ``spearman``, or ``span_f1`` (of lists of tags, micro-averaged, as conlleval).
        labels: Classes, numbers, or lists of tags.
        predictions: The same, in the same order.
        positive: The class that ``f1`` is about; the last one in sorted order by default.

    Returns:
        0 to 1; -1 to 1 for the three correlations.

    Raises:
        ValueError: No such metric, or the two differ in length, as a whole or in a sentence.
    """
    if len(labels) != len(predictions):
        raise ValueError(f"{len(labels)} labels, {len(predictions)} predictions")
    if metric == "accuracy":
        gold, found = _words(labels, predictions)
        return statistics.fmean(map(operator.eq, gold, found)) if gold else math.nan
    if metric == "f1":
        from sklearn.metrics import f1_score

        name = max(map(str, labels)) if positive is None else positive
        gold, found = ([str(value) == name for value in values] for values in (labels, predictions))
        return float(f1_score(gold, found, zero_division=0))  # pyright: ignore[reportArgumentType]
    if metric == "span_f1":
        from seqeval.metrics import f1_score as seqeval_f1

        tags = [list(map(list, sentences)) for sentences in (labels, predictions)]
        return float(seqeval_f1(*tags, zero_division=0))  # pyright: ignore[reportArgumentType]
    if metric in ("matthews", "pearson", "spearman"):
        return _correlation(metric, labels, predictions)
    raise ValueError(f"{metric!r} is not a metric: accuracy, f1, matthews, pearson, spearman, span_f1")


def _words(labels: Sequence[Any], predictions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The tags of all words, or the classes as they are."""
    if not labels or isinstance(labels[0], str | int | float):
        return list(labels), list(predictions)
    pairs = [pair for tags in zip(labels, predictions, strict=True) for pair in zip(*tags, strict=True)]
    return [gold for gold, _ in pairs], [found for _, found in pairs]


def _correlation(metric: str, labels: Sequence[Any], predictions: Sequence[Any]) -> float:
    value = math.nan
    if len(set(labels)) > 1 and len(set(predictions)) > 1:
        if metric == "matthews":
            from sklearn.metrics import matthews_corrcoef

            value = float(matthews_corrcoef(list(labels), list(predictions)))
        else:
            from scipy import stats

            correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
            value = float(correlation(np.asarray(labels, float), np.asarray(predictions, float)).statistic)
    if math.isnan(value):
        _warn_of_undefined(metric)
        return 0.0
    return value


@functools.cache
def _warn_of_undefined(metric: str) -> None:
    logger.warning("%s is undefined, as all labels or all predictions are the same; it counts 0", metric)


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """What results.json holds of a metric's values, one for each seed; at least one.

    Returns:
        ``median``, ``mean``, ``std`` (of the sample), ``ci95`` (of the mean, by Student's t) and ``values``; ``std``
        and ``ci95`` are None for a single value.
    """
    mean, std, interval = statistics.fmean(values), None, None
    if len(values) > 1:
        std = statistics.stdev(values)
        quantile = float(stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2))  # Student's t
        half = quantile * std / math.sqrt(len(values))
        interval = [mean - half, mean + half]
    return {
        "median": statistics.median(values),
        "mean": mean,
        "std": std,
        "ci95": interval,
        "values": list(values),
    }


def to_bioes(tags: Sequence[str]) -> list[str]:
    """The same spans with their last word tagged E and single words S; of tags in IOB1, BIO or BIOES."""
    return _rewrite(tags, single="S", last="E")


def to_bio(tags: Sequence[str]) -> list[str]:
    """The same spans with their first word tagged B and the rest I; of tags in IOB1, BIO or BIOES."""
    return _rewrite(tags, single="B", last="I")


def _rewrite(tags: Sequence[str], single: str, last: str) -> list[str]:
    from seqeval.metrics.sequence_labeling import get_entities

    rewritten = ["O"] * len(tags)
    for kind, begin, end in get_entities(list(tags)):
        suffix = f"-{kind}" if "-" in tags[begin] else ""
        letters = [single] if begin == end else ["B", *("I" * (end - begin - 1)), last]
        rewritten[begin : end + 1] = [letter + suffix for letter in letters]
    return rewritten
