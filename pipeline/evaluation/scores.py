"""Metrics of downstream tasks, from scikit-learn and scipy, as fractions of 1."""

import statistics

import numpy as np
from scipy import stats
from sklearn import metrics

Prediction = str | float


def score(metric: str, labels: list[Prediction], predictions: list[Prediction]) -> float:
    """One metric: ``accuracy``, ``f1`` (of the last class in sorted order), ``matthews``, ``pearson``, ``spearman``."""
    if metric == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if metric == "f1":
        positive = max(map(str, labels))
        return float(metrics.f1_score([y == positive for y in labels], [y == positive for y in predictions]))
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
    value = correlation(np.asarray(labels, float), np.asarray(predictions, float)).statistic
    return 0.0 if np.isnan(value) else float(value)


def median_of(values: list[float]) -> dict[str, float | list[float]]:
    """What results.json holds for a metric."""
    return {"median": statistics.median(values), "values": values}
