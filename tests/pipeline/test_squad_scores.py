"""SQuAD's scores: by hand, and against the definition written out plainly."""

import itertools
import random
import string

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.squad import evaluate_squad1, evaluate_squad2


def one(golds: list[str], prediction: str) -> tuple[float, float]:
    found = evaluate_squad1({"q": golds}, {"q": prediction})
    return found["exact"], found["f1"]


def one_of_2(golds: list[str], prediction: str) -> tuple[float, float]:
    found = evaluate_squad2({"q": golds}, {"q": prediction}, {"q": 0.0}, 0.0)
    return found["exact"], found["f1"]


@pytest.mark.parametrize("score", [one, one_of_2])
@pytest.mark.parametrize(
    ("golds", "prediction", "exact", "f1"),
    [
        (["The Cat!"], "cat", 1, 1),
        (["cat", "black dog"], "the dog", 0, 2 * 1 * 0.5 / 1.5),
        (["a b b"], "b b b", 0, 2 * (2 / 3) / (2 / 3 + 1)),  # "a" is an article
        (["theory"], "the ory", 0, 0),
        (["O'Neil"], "ONeil", 1, 1),
        (["re-use"], "re use", 0, 0),
        (["1895\u00a0AD"], "1895 AD", 1, 1),
        (["naïve"], "naive", 0, 0),
        (["“cat”"], "cat", 0, 0),  # punctuation outside ASCII stays
        (["cat"], "dog", 0, 0),
        (["cat—the—dog"], "cat— —dog", 1, 1),  # an article leaves a space
        (["a.n. other"], "the other", 1, 1),  # punctuation goes first, then articles
    ],
)
def test_one_answer(score, golds, prediction, exact, f1):
    assert score(golds, prediction) == (exact, pytest.approx(f1))


def test_where_the_scripts_differ():
    assert one(["the"], "...") == (1, 0)
    assert one_of_2(["the"], "...") == (1, 1)
    assert one(["the", "cat"], "") == (1, 0)
    assert one_of_2(["the", "cat"], "") == (0, 0)
    assert one_of_2([], "a") == (1, 1)
    assert one_of_2([], "cat") == (0, 0)


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="1 of 2 questions have no prediction, 'r' for one"):
        evaluate_squad1({"q": ["a"], "r": ["b"]}, {"q": "a"})
    with pytest.raises(ValueError, match="1 of 1 questions have no prediction"):
        evaluate_squad2({"q": []}, {"q": ""}, {}, 0.0)
    with pytest.raises(ConfigError, match="question 'q' has no answer"):
        evaluate_squad1({"q": []}, {"q": ""})


def test_thresholds_by_hand():
    answers = {"a": ["red"], "b": ["blue sky"], "c": [], "d": []}
    predictions = {"a": "red", "b": "sky", "c": "green", "d": "..."}
    null_scores = {"a": -3.0, "b": 1.0, "c": 2.0, "d": -1.0}
    found = evaluate_squad2(answers, predictions, null_scores, 0.0)
    # b and c are blanked; d is answered, with nothing
    assert found["exact"] == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert found["f1"] == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert (found["has_answer_exact"], found["has_answer_f1"]) == (0.5, 0.5)
    assert (found["no_answer_exact"], found["no_answer_f1"]) == (1.0, 1.0)
    # Answering nothing scores 2 of 4, a alone 3. Then d costs its point, as it is not the empty string.
    assert (found["best_exact"], found["best_exact_threshold"]) == (0.75, -3.0)
    assert (found["best_f1"], found["best_f1_threshold"]) == (0.75, -3.0)
    at_the_limit = evaluate_squad2(answers, predictions, null_scores, 1.0)  # not above: b is answered
    assert at_the_limit["f1"] == pytest.approx((1 + 2 / 3 + 1 + 1) / 4)
    assert at_the_limit["best_f1"] == found["best_f1"]


def test_answering_nothing_can_be_best():
    answers, predictions = {"a": [], "b": ["x"], "c": []}, {"a": "y", "b": "z", "c": ""}
    found = evaluate_squad2(answers, predictions, {"a": 5.0, "b": 6.0, "c": -1.0}, 100.0)
    # Up to -1 the score is the same: not better, so the threshold stays 0.
    assert (found["best_exact"], found["best_exact_threshold"], found["exact"]) == (2 / 3, 0.0, 1 / 3)


def test_without_questions_of_a_sort_there_is_no_score_of_it():
    assert "has_answer_exact" not in evaluate_squad2({"q": []}, {"q": ""}, {"q": 0.0}, 0.0)
    assert "no_answer_f1" not in evaluate_squad2({"q": ["x"]}, {"q": ""}, {"q": 0.0}, 0.0)


# The definition, as plainly as it can be written.


def plain_words(text: str) -> list[str]:
    kept = [character for character in text.lower() if character not in string.punctuation]
    pieces = ["".join(group) for _, group in itertools.groupby(kept, str.isalnum)]
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def plain_f1(words: list[str], gold: list[str]) -> float:
    left, shared = list(gold), 0
    for word in words:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(words) + len(gold)) if shared else 0.0


def plain_scores_2(golds: list[str], prediction: str) -> tuple[float, float]:
    words = plain_words(prediction)
    sets = [plain_words(gold) for gold in golds if plain_words(gold)]
    if not sets:
        return float(not words), float(not words)
    return float(any(words == gold for gold in sets)), max(plain_f1(words, gold) for gold in sets)


PIECES = ["the", "a", "An", "cat", "Cat's", "dog", ".", "?!", "", "—", "“sky”", "blue", "\u00a0", "é", "3.5", "the-end"]


def drawn(draw: random.Random) -> str:
    return " ".join(draw.choice(PIECES) for _ in range(draw.randrange(4)))


def test_against_the_definition():
    draw = random.Random(1)
    for round_number in range(60):
        names = [str(number) for number in range(40)]
        answers = {name: [drawn(draw) for _ in range(draw.randrange(4))] for name in names}
        predictions = {name: draw.choice([*answers[name], drawn(draw)]) for name in names}
        raw = {name: plain_scores_2(answers[name], predictions[name]) for name in names}

        some = {name: golds for name, golds in answers.items() if golds}
        found = evaluate_squad1(some, predictions)
        exact = [any(plain_words(predictions[n]) == plain_words(g) for g in golds) for n, golds in some.items()]
        f1 = [max(plain_f1(plain_words(predictions[n]), plain_words(g)) for g in golds) for n, golds in some.items()]
        assert found == {"exact": pytest.approx(sum(exact) / len(some)), "f1": pytest.approx(sum(f1) / len(some))}

        null_scores = {name: draw.gauss(0, 1) for name in names}
        threshold = draw.gauss(0, 1)
        found = evaluate_squad2(answers, predictions, null_scores, threshold)
        for number, metric in enumerate(("exact", "f1")):

            def value(threshold: float, names: list[str] = names, number: int = number) -> float:
                kept = [
                    raw[n][number] if null_scores[n] <= threshold else float(not answers[n])  # noqa: B023
                    for n in names
                ]
                return sum(kept) / len(kept)

            assert found[metric] == pytest.approx(value(threshold))
            assert found[f"has_answer_{metric}"] == pytest.approx(value(threshold, list(some)))
            unanswerable = [name for name in names if not answers[name]]
            if unanswerable:
                assert found[f"no_answer_{metric}"] == pytest.approx(value(threshold, unanswerable))
            # The official search takes any text but "" as an answer to a question that has none.
            for name in unanswerable:
                if predictions[name]:
                    raw[name] = (0.0, 0.0)
            attainable = [value(limit) for limit in (float("-inf"), *null_scores.values())]
            assert found[f"best_{metric}"] == pytest.approx(max(attainable)), round_number
            if max(attainable) > attainable[0]:
                assert value(found[f"best_{metric}_threshold"]) == pytest.approx(max(attainable))
            raw = {name: plain_scores_2(answers[name], predictions[name]) for name in names}


def test_ties_among_null_scores_count_one_by_one_as_in_the_official_script():
    answers, predictions = {"a": ["x"], "b": []}, {"a": "x", "b": "y"}
    found = evaluate_squad2(answers, predictions, {"a": 1.0, "b": 1.0}, 1.0)
    assert (found["best_exact"], found["exact"]) == (1.0, 0.5)
    turned = evaluate_squad2(answers, predictions, {"b": 1.0, "a": 1.0}, 1.0)
    assert turned["best_exact"] == 0.5
