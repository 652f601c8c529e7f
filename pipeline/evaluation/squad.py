"""SQuAD's scores as ``evaluate-v1.1.py`` and ``evaluate-v2.0.py``, its official scripts, compute them; fractions of 1.

An answer is compared after lower-casing and without ASCII punctuation, the words *a*, *an*, *the*, and surplus
whitespace. Exact match and F1 of the words left are taken against the nearest of the gold answers. The two scripts
part ways where nothing is left of an answer:

- 1.1: F1 is 0 if no word is shared, also where both answers come to nothing (and so match exactly).
- 2.0: F1 is then 1 if both come to nothing, and gold answers that come to nothing are dropped; a question left
  without any expects no answer, although it goes on counting as one that has an answer.

A question without a prediction is an error here; the official scripts score it 0 (1.1) or leave it out (2.0).
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.errors import ConfigError

Answers = Mapping[str, Sequence[str]]
Scores = dict[str, float]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_METRICS = ("exact", "f1")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> list[str]:
    """The words of an answer that count."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def evaluate_squad1(answers: Answers, predictions: Mapping[str, str]) -> Scores:
    """Scores of SQuAD 1.1.

    Args:
        answers: Gold answers by question id, at least one for each.
        predictions: Answers by question id; those of other questions are ignored.

    Returns:
        ``exact`` and ``f1``, from 0 to 1.

    Raises:
        ConfigError: A question has no gold answer.
        ValueError: A question has no prediction, or there is no question.
    """
    _check(answers, predictions)
    exact, f1 = [], []
    for name, golds in answers.items():
        if not golds:
            raise ConfigError(f"question {name!r} has no answer, which SQuAD 1.1 cannot score; set no_answer: true")
        words = normalize_answer(predictions[name])
        gold_words = [normalize_answer(gold) for gold in golds]
        exact.append(float(words in gold_words))
        f1.append(max(_overlap(words, gold) for gold in gold_words))
    return {"exact": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}


def evaluate_squad2(
    answers: Answers, predictions: Mapping[str, str], null_scores: Mapping[str, float], threshold: float
) -> Scores:
    """Scores of SQuAD 2.0.

    Args:
        answers: Gold answers by question id; none where the text has no answer.
        predictions: Answers by question id, also to questions that are better left unanswered.
        null_scores: By question id, how much speaks for no answer, on any scale.
        threshold: A question whose null score is higher counts as left unanswered.

    Returns:
        From 0 to 1: ``exact`` and ``f1`` at the threshold; the same with the prefixes ``has_answer_`` and
        ``no_answer_`` over the questions of either sort, if there are any; ``best_exact`` and ``best_f1`` at the
        thresholds that are best for them on these very questions. Those are ``best_exact_threshold`` and
        ``best_f1_threshold``: null scores, or 0 where it is best to answer nothing.

    Raises:
        ValueError: A question has no prediction or no null score, or there is no question.
    """
    _check(answers, predictions)
    _check(answers, null_scores)
    raw = {name: _score_answer(golds, predictions[name]) for name, golds in answers.items()}
    has_answer = {name: bool(golds) for name, golds in answers.items()}
    kept = {
        name: (float(not has_answer[name]),) * 2 if null_scores[name] > threshold else pair
        for name, pair in raw.items()
    }
    groups = {
        "": list(answers),
        "has_answer_": [name for name in answers if has_answer[name]],
        "no_answer_": [name for name in answers if not has_answer[name]],
    }
    scores: Scores = {
        f"{prefix}{metric}": sum(kept[name][number] for name in names) / len(names)
        for prefix, names in groups.items()
        for number, metric in enumerate(_METRICS)
        if names
    }
    for number, metric in enumerate(_METRICS):
        gains = {name: raw[name][number] if has_answer[name] else -float(bool(predictions[name])) for name in answers}
        best, best_threshold = _best_threshold(gains, null_scores, len(groups["no_answer_"]))
        scores |= {f"best_{metric}": best, f"best_{metric}_threshold": best_threshold}
    return scores


def _check(answers: Answers, by_question: Mapping[str, str] | Mapping[str, float]) -> None:
    missing = [name for name in answers if name not in by_question]
    if missing or not answers:
        example = f", {missing[0]!r} for one" if missing else ""
        raise ValueError(f"{len(missing)} of {len(answers)} questions have no prediction{example}")


def _overlap(words: list[str], gold: list[str]) -> float:
    shared = (Counter(words) & Counter(gold)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def _score_answer(golds: Sequence[str], prediction: str) -> tuple[float, float]:
    """Exact match and F1 by the rules of 2.0."""
    gold_words = [words for words in map(normalize_answer, golds) if words] or [[]]
    words = normalize_answer(prediction)
    exact = float(words in gold_words)
    return exact, max(_overlap(words, gold) if words and gold else float(words == gold) for gold in gold_words)


def _best_threshold(
    gains: Mapping[str, float], null_scores: Mapping[str, float], num_unanswerable: int
) -> tuple[float, float]:
    """The best score, and the null score up to which questions are answered to get it.

    Among equal null scores every question counts as a place to stop, in the order in which ``null_scores`` has
    them, as in the official script: with ties its best score can be one that no threshold reaches.
    """
    total = best = float(num_unanswerable)
    threshold = 0.0
    for name in sorted((name for name in null_scores if name in gains), key=null_scores.__getitem__):
        total += gains[name]
        if total > best:
            best, threshold = total, null_scores[name]
    return best / len(gains), threshold
