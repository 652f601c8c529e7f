"""Question answering through the command line: learned, scored as the definition says, with and without no-answers."""

import json
import random
from pathlib import Path

import pytest

from pipeline.evaluation.squad import evaluate_squad2
from tests.conftest import Electra

WORDS = ["bada", "fi", "ku", "mere", "lala", "tino", "gopu"]


def write_squad(folder: Path, name: str, no_answer: bool) -> Path:
    """The answer is the word "zozo" of a context; without that word there is none."""
    draw = random.Random(4)
    for split, count in (("train", 300), ("dev", 40)):
        paragraphs = []
        for number in range(count):
            words = draw.choices(WORDS, k=draw.randint(3, 30))
            has_answer = not no_answer or draw.random() < 0.5
            if has_answer:
                words.insert(draw.randrange(len(words)), "zozo")
            context = " ".join(words)
            answers = [{"text": "zozo", "answer_start": context.index("zozo")}] if has_answer else []
            question = {"id": f"{split}-{number}", "question": "zozo", "answers": answers}
            more = {"is_impossible": not has_answer} if no_answer else {}
            paragraphs.append({"context": context, "qas": [question | more]})
        content = {"version": "made up", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{name}_{split}.json").write_text(json.dumps(content))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\nkind: question_answering\ntrain: {name}_train.json\ndev: {name}_dev.json\n"
        f"text: [question, context]\nlabel: answers\nmetrics: [exact, f1]\nno_answer: {str(no_answer).lower()}\n"
        "recipe: {max_question_length: 6, stride: 10}\ntest: {%s_blind: %s_dev.json}\n" % (name, name)
    )
    return path


@pytest.mark.parametrize("head", ["joint", "simple"])
def test_spans_are_learned_and_scored(shared_config: Path, electra: Electra, tmp_path: Path, head: str) -> None:
    name = f"spans_{head}"
    tasks = [write_squad(tmp_path, "answered", False), write_squad(tmp_path, "sometimes", True)]
    arguments = [
        shared_config, f"run.name={name}", "train.steps=1", "train.held_out_rows=0", "evaluate.seeds=1",
        f"evaluate.tasks={json.dumps(list(map(str, tasks)))}", "evaluate.epochs=6", "evaluate.lr=3e-3",
        f"evaluate.span_head={head}", "evaluate.no_answer_threshold=0", "evaluate.max_length=32",
    ]  # fmt: skip
    electra("run", *arguments)
    folder = shared_config.parent / f"out/runs/{name}/evaluate"
    results = json.loads((folder / "results.json").read_text())["tasks"]
    assert results["answered"]["exact"]["median"] > 0.9
    assert results["sometimes"]["exact"]["median"] > 0.8
    unit = folder / "step_00000001/sometimes/seed_1"
    files = {
        name: json.loads((unit / f"{name}.json").read_text())
        for name in ("predictions", "predictions_answered", "null_odds", "test_sometimes_blind")
    }
    dev = json.loads((tmp_path / "sometimes_dev.json").read_text())["data"][0]["paragraphs"]
    answers = {q["id"]: [answer["text"] for answer in q["answers"]] for p in dev for q in p["qas"]}
    again = evaluate_squad2(answers, files["predictions_answered"], files["null_odds"], 0.0)
    assert {metric: summary["median"] for metric, summary in results["sometimes"].items()} == again
    assert files["predictions"] == {
        name: "" if files["null_odds"][name] > 0 else text for name, text in files["predictions_answered"].items()
    }
    submitted = folder / "step_00000001/submission/sometimes_blind.json"
    assert json.loads(submitted.read_text()) == files["test_sometimes_blind"]
    assert set(map(type, files["predictions"].values())) == {str}
