"""Metrics, their summary, and spans of tags."""

import itertools
import logging
import random
import statistics

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from pipeline.evaluation import scores
from pipeline.evaluation.scores import score, summarize, to_bio, to_bioes

LABELS, PREDICTIONS = ["a", "b", "b", "a", "b"], ["a", "b", "a", "a", "a"]


def test_metrics_of_classes():
    assert score("accuracy", LABELS, PREDICTIONS) == pytest.approx(3 / 5)
    assert score("f1", LABELS, PREDICTIONS) == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))  # of b
    assert score("f1", LABELS, PREDICTIONS, positive="a") == pytest.approx(2 * 2 / (2 * 2 + 2 + 0))
    tp, tn, fp, fn = 1, 2, 0, 2
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert score("matthews", LABELS, PREDICTIONS) == pytest.approx(expected)
    assert score("f1", ["a", "b"], ["a", "a"], positive="b") == 0.0


def test_metrics_of_numbers():
    gold, found = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 100.0]
    assert score("spearman", gold, found) == pytest.approx(1.0)
    assert score("pearson", gold, found) == pytest.approx(statistics.correlation(gold, found))
    assert score("spearman", gold, [-x for x in found]) == pytest.approx(-1.0)


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman"])
def test_an_undefined_correlation_is_zero_and_said_once(metric, caplog, monkeypatch):
    monkeypatch.setattr(scores.logger, "propagate", True)
    scores._warn_of_undefined.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert score(metric, [1, 0, 1], [1, 1, 1]) == 0.0
        assert score(metric, [1, 1, 1], [1, 0, 1]) == 0.0
    assert [metric in message for message in caplog.messages] == [True]


def test_metrics_of_tags():
    gold = [["B-NP", "I-NP", "O"], ["B-VP", "B-NP"]]
    found = [["B-NP", "I-NP", "O"], ["B-VP", "I-NP"]]  # I after another type begins a span
    assert score("span_f1", gold, found) == 1.0
    assert score("accuracy", gold, found) == pytest.approx(4 / 5)
    shorter = [["B-NP", "O", "O"], ["B-VP", "B-NP"]]
    assert score("span_f1", gold, shorter) == pytest.approx(2 * 2 / (3 + 3))
    assert score("span_f1", gold, [["O"] * 3, ["O"] * 2]) == 0.0
    # A span does not go on into the next sentence.
    assert score("span_f1", [["B-A"], ["I-A"]], [["B-A"], ["B-A"]]) == 1.0


@pytest.mark.parametrize("metric", ["accuracy", "span_f1"])
def test_words_without_a_prediction_are_refused(metric):
    with pytest.raises(ValueError):
        score(metric, [["O", "O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="2 labels, 1 predictions"):
        score(metric, [["O"], ["O"]], [["O"]])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'bleu' is not a metric: accuracy"):
        score("bleu", ["a"], ["a"])


def test_summary():
    summary = summarize([0.5, 0.7, 0.9])
    assert summary["median"] == 0.7
    assert summary["mean"] == pytest.approx(0.7)
    assert summary["std"] == pytest.approx(0.2)
    half = 4.302652729911275 * 0.2 / 3**0.5  # the 0.975 quantile of Student's t with 2 degrees of freedom
    assert summary["ci95"] == pytest.approx([0.7 - half, 0.7 + half])
    assert summary["values"] == [0.5, 0.7, 0.9]


def test_summary_of_one_seed_has_no_spread():
    assert summarize([0.5]) == {"median": 0.5, "mean": 0.5, "std": None, "ci95": None, "values": [0.5]}
    assert summarize([0.5, 0.5])["ci95"] == [0.5, 0.5]


def test_schemes_of_tags():
    bio = ["B-NP", "I-NP", "I-NP", "B-NP", "O", "B-geo-loc", "I-geo-loc"]
    bioes = ["B-NP", "I-NP", "E-NP", "S-NP", "O", "B-geo-loc", "E-geo-loc"]
    assert to_bioes(bio) == bioes
    assert to_bio(bioes) == bio
    assert to_bio(["I-NP", "I-NP", "B-NP", "I-VP"]) == ["B-NP", "I-NP", "B-NP", "B-VP"]  # IOB1
    assert to_bioes(["B", "I", "O", "I"]) == ["B", "E", "O", "S"]
    assert to_bioes([]) == to_bio([]) == []


def is_bioes(tags: list[str]) -> bool:
    """Whether S and B come outside of spans, I and E within one of their type."""
    inside = None
    for tag in tags:
        letter, _, kind = tag.partition("-")
        if (letter in "IE") != (inside is not None) or (inside is not None and kind != inside):
            return False
        inside = kind if letter in "BI" else None
    return inside is None


def test_spans_survive_whatever_a_model_says():
    draw = random.Random(0)
    letters = [f"{letter}-{kind}" for letter, kind in itertools.product("BIES", ("NP", "VP", "a-b"))]
    changed = 0
    for _ in range(2000):
        tags = [draw.choice([*letters, "O", "O", "O"]) for _ in range(draw.randrange(12))]
        spans = get_entities(tags)
        assert get_entities(to_bioes(tags)) == get_entities(to_bio(tags)) == spans
        assert get_entities(to_bio(to_bioes(tags))) == spans
        assert is_bioes(to_bioes(tags))
        assert not {tag[0] for tag in to_bio(tags)} & set("ES")
        assert to_bioes(to_bio(tags)) == to_bioes(tags)
        assert [tag == "O" for tag in to_bio(tags)] == [tag == "O" for tag in tags]
        changed += to_bioes(tags) != tags
    assert changed > 1000
