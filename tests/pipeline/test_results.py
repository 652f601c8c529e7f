"""What units say together, and outcomes: points of a grid, submissions, scores, offsets, windows, null scores."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.store import write_json
from data_shards.tokenizer import Tokenizer
from data_shards.tokenizer_files import install
from model.finetuning import LinearHead
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.evaluation.features import collate
from pipeline.evaluation.paper import GLUE_COLUMNS
from pipeline.evaluation.pretrained import Pretrained
from pipeline.evaluation.results import gather, set_aside_others, write_submissions
from pipeline.evaluation.stored import read_results
from pipeline.evaluation.table import markdown_table
from pipeline.evaluation.tasks import Task
from pipeline.evaluation.text import TextProcessor
from pipeline.evaluation.units import Unit
from pipeline.stages import StageRecord
from tests.data_shards.made_tokenizers import sentencepiece_model
from tests.pipeline.test_finetune import CONFIG, Letters, candidates, make_task, question, recipe, span_processor

RECORD = StageRecord("evaluate", "running", {"made": "up"})
BY_MEAN, BY_MEDIAN = "lr_2e-05-layer_decay_0.8", "lr_0.0001-layer_decay_0.8"  # by lr the first, by name the last
GRID = {BY_MEAN: (2e-5, [0.9, 0.5, 0.5]), BY_MEDIAN: (1e-4, [0.6, 0.7, 0.3])}


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


def task_in(folder: Path, **more: Any) -> Task:
    folder.mkdir()
    rows = [{"id": str(n), "a": "abc", "b": "d", "label": "xy"[n % 2]} for n in range(4)]
    return make_task(folder, rows, "pair", metrics=["accuracy", "f1"], **more)


def pretrained_in(folder: Path) -> Pretrained:
    return Pretrained(folder, "label", "digest", 0, CONFIG, 40, Letters(), dict)  # type: ignore[arg-type]


def finish(unit: Unit, score: float) -> None:
    """Its result, and answers on the test file that tell whose they are."""
    unit.folder.mkdir(parents=True)
    metrics = {"accuracy": score, "f1": 1 - score}
    write_json(unit.folder / "result.json", {"fingerprint": unit.fingerprint, "metrics": metrics})
    for test in unit.task.tests():
        write_json(unit.folder / f"test_{test}.json", [f"{unit.point}/{unit.seed}", "x"])


@pytest.fixture
def units(tmp_path: Path) -> list[Unit]:
    """Of a grid, all done; of a task of which one seed failed; of one of which nothing is done."""
    pretrained, blind = pretrained_in(tmp_path), {"test": {"QNLI": "blind.jsonl"}}
    searched = task_in(tmp_path / "searched", name="searched", **blind)
    searched.files["QNLI"] = (tmp_path / "blind.jsonl",)
    made = []
    for point, (lr, scores) in GRID.items():
        for seed, score in enumerate(scores, 1):
            folder = tmp_path / "units" / point / f"seed_{seed}"
            settings = recipe(lr=lr, layer_decay=0.8)
            made.append(Unit(pretrained, searched, settings, point, seed, folder, f"{point}/{seed}"))
            finish(made[-1], score)
    for name, scores in (("broken", [0.25, None, 0.75]), ("absent", [None])):
        task = task_in(tmp_path / name, name=name)
        for seed, score in enumerate(scores, 1):
            folder = tmp_path / "units" / name / f"seed_{seed}"
            made.append(Unit(pretrained, task, recipe(), "", seed, folder, f"{name}/{seed}"))
            if score is not None:
                finish(made[-1], score)
    return made[::-1]


def test_the_point_with_the_best_median_is_reported(config: Config, units: list[Unit]) -> None:
    failed = next(unit for unit in units if unit.fingerprint == "broken/2")
    failed.write_failure(RuntimeError("sick"), "one")
    recovered = next(unit for unit in units if unit.fingerprint == "broken/3")
    recovered.write_failure(RuntimeError("sick"), "one")
    replace(units[0], fingerprint="of before").write_failure(RuntimeError("sick"), "one")
    results = gather(config, units, RECORD)
    assert results["fingerprint"] == RECORD.fingerprint
    points = [
        {"lr": 2e-5, "layer_decay": 0.8, "score": 0.5, "seeds": 3},
        {"lr": 1e-4, "layer_decay": 0.8, "score": 0.6, "seeds": 3},
    ]
    assert results["grid"] == {"searched": {"points": points, "chosen": 1, "chosen_on": "dev"}}
    assert results["tasks"].keys() == {"searched", "broken"}
    assert results["tasks"]["searched"]["accuracy"]["values"] == [0.6, 0.7, 0.3]
    assert results["tasks"]["searched"]["accuracy"]["median"] == 0.6
    assert results["tasks"]["searched"]["f1"]["values"] == pytest.approx([0.4, 0.3, 0.7])
    assert results["tasks"]["broken"]["accuracy"]["values"] == [0.25, 0.75]
    assert results["seeds"] == {"searched": [1, 2, 3], "broken": [1, 3]}
    assert results["score"] == {"searched": "accuracy", "broken": "accuracy"}
    assert results["recipes"]["searched"] == recipe(lr=1e-4, layer_decay=0.8).to_dict()
    assert results["complete"] == ["searched"]
    assert results["units"] == {"done": 8, "of": 10}
    assert results["failed"] == [{"task": "broken", "point": "", "seed": 2, "error": "RuntimeError: sick"}]
    assert (results["step"], results["flops"], results["checkpoint"]) == (None, None, str(units[0].pretrained.folder))


def test_a_failed_unit_of_a_grid_is_told_with_its_point(config: Config, units: list[Unit]) -> None:
    unit = next(unit for unit in units if unit.fingerprint == f"{BY_MEDIAN}/2")
    (unit.folder / "result.json").unlink()
    unit.write_failure(RuntimeError("sick"), "one")
    results = gather(config, units, RECORD)
    assert results["failed"] == [{"task": "searched", "point": BY_MEDIAN, "seed": 2, "error": "RuntimeError: sick"}]
    assert results["complete"] == []
    assert results["grid"]["searched"]["chosen"] == 0
    assert [point["seeds"] for point in results["grid"]["searched"]["points"]] == [3, 2]
    assert results["seeds"]["searched"] == [1, 2, 3]


def test_of_equal_points_the_least_learning_rate_is_chosen(config: Config, units: list[Unit]) -> None:
    for unit in units:
        if unit.point:
            write_json(
                unit.folder / "result.json", {"fingerprint": unit.fingerprint, "metrics": {"accuracy": 0.5, "f1": 0.5}}
            )
    assert gather(config, units, RECORD)["grid"]["searched"]["chosen"] == 0


def test_the_best_seed_of_the_chosen_point_is_submitted(config: Config, units: list[Unit], tmp_path: Path) -> None:
    folder = tmp_path / "submission"
    folder.mkdir()
    for name in ("gone.tsv", "my_own.zip"):
        (folder / name).write_text("index\tprediction\n")
    (folder / "chosen.json").write_text('{"gone.tsv": {}}')
    write_submissions(folder, gather(config, units, RECORD), units)
    assert sorted(path.name for path in folder.iterdir()) == ["QNLI.tsv", "chosen.json", "my_own.zip"]
    assert (folder / "QNLI.tsv").read_text() == f"index\tprediction\n0\t{BY_MEDIAN}/2\n1\tx\n"
    assert json.loads((folder / "chosen.json").read_text()) == {
        "QNLI.tsv": {"task": "searched", "seed": 2, "point": BY_MEDIAN, "chosen_on": "dev"}
    }
    without = [unit for unit in units if not unit.point]
    write_submissions(folder, gather(config, without, RECORD), without)
    assert [path.name for path in folder.iterdir()] == ["my_own.zip"]  # not written here


def test_predictions_of_two_tasks_on_one_test_file_do_not_meet(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained, units = pretrained_in(tmp_path), []
    for name in ("first", "second"):
        task = task_in(tmp_path / name, name=name, test={"QNLI": "blind.jsonl"})
        task.files["QNLI"] = (tmp_path / "blind.jsonl",)
        place = ("first", "second").index(name)
        units.insert(0, Unit(pretrained, task, recipe(), name, 1, tmp_path / "units" / name, name, place=place))
        finish(units[0], 0.5)
    folder = tmp_path / "submission"
    for names in (("first", "second"), ("second",)):
        some = [unit for unit in units if unit.task.name in names]
        write_submissions(folder, gather(config, some, RECORD), some)
        for name, path in zip(names, ("QNLI.tsv", "second/QNLI.tsv"), strict=False):
            assert f"{name}/1" in (folder / path).read_text()
            assert json.loads((folder / "chosen.json").read_text())[path]["task"] == name
    assert not (folder / "second/QNLI.tsv").exists(), "it was of a task that is the only one now"
    assert f"{folder / 'second'}: predictions of second on QNLI, beside those of first" in caplog.text


@pytest.mark.parametrize("rte_counts", [True, False])
def test_the_glue_average_is_of_tasks_that_say_so(config: Config, tmp_path: Path, rte_counts: bool) -> None:
    pretrained, units = pretrained_in(tmp_path), []
    for name, metric in [(column.task, column.metric) for column in GLUE_COLUMNS] + [("mine", "accuracy")]:
        task = task_in(tmp_path / name, name=name, in_glue_average=rte_counts or name != "rte")
        units.append(Unit(pretrained, task, recipe(), "", 1, tmp_path / "units" / name, name))
        units[-1].folder.mkdir(parents=True)
        metrics = {"accuracy": 0.5, metric: 0.1 if name == "mine" else 0.5}
        write_json(units[-1].folder / "result.json", {"fingerprint": name, "metrics": metrics})
    results = gather(config, units, RECORD)
    assert results["glue_average"] == (0.5 if rte_counts else None)
    assert ("say `in_glue_average: true`" in markdown_table(results, "small")) != rte_counts


def test_f1_is_that_of_the_positive_class(tmp_path: Path) -> None:
    rows = [{"id": str(n), "a": "abc", "label": label} for n, label in enumerate("yyxx")]
    outputs = ["y", "x", "y", "y"]
    for positive, f1 in ((None, 0.0), ("x", 0.0), ("y", 0.4)):  # of x nothing is right
        task = make_task(
            tmp_path, rows, "classification", labels=["y", "x"], metrics=["f1", "accuracy"], positive=positive
        )
        processor = TextProcessor(task, recipe("classification"), Letters())  # type: ignore[arg-type]
        features = processor.features("dev")
        assert [feature.target for feature in features] == [0.0, 0.0, 1.0, 1.0]
        outcome = processor.outcome("dev", features, outputs)
        assert outcome.metrics == {"f1": pytest.approx(f1), "accuracy": 0.25}
        lines = list(map(json.loads, outcome.files["predictions.jsonl"].splitlines()))
        assert [line["prediction"] for line in lines] == outcome.answers == outputs
        head = LinearHead(CONFIG, 2, 0.0).eval()
        torch.nn.init.zeros_(head.output.weight)
        head.output.bias.data.copy_(torch.tensor([1.0, 0.0]))
        examples = collate(features, "cpu")
        hidden_PH = torch.zeros(len(features), CONFIG.hidden_size)
        assert processor.outputs(head, hidden_PH, examples, features) == ["y"] * 4


@pytest.mark.parametrize(
    ("label_range", "labels", "targets", "predicted"),
    [
        ([-2, 3], [-2, 0.5, 3], [0.0, 0.5, 1.0], [-2.0, -0.75, 4.25]),
        (None, [10, 20, 30], [-0.6, -0.475, -0.35], [10.0, 15.0, 35.0]),
        (None, [7, 7, 7], [-9.0, -6.5, -4.0], [7.0, 7.25, 8.25]),
    ],
)
def test_scores_are_scaled_by_the_range_of_the_task_or_of_train(
    tmp_path: Path, label_range: list | None, labels: list, targets: list, predicted: list
) -> None:
    """Not by that of dev, whose scores are -2, 0.5 and 3."""
    train = [{"id": str(n), "a": "abc", "label": label} for n, label in enumerate(labels)]
    dev = [{"id": str(n), "a": "abc", "label": label} for n, label in enumerate([-2, 0.5, 3])]
    task = make_task(tmp_path, train, "regression", dev, label_range=label_range)
    processor = TextProcessor(task, recipe("regression"), Letters())  # type: ignore[arg-type]
    features = processor.features("dev")
    assert [feature.target for feature in features] == pytest.approx(targets)
    head = LinearHead(CONFIG, 1, 0.0).eval()
    torch.nn.init.zeros_(head.output.weight)
    head.output.weight.data[0, 0] = 1.0
    examples = collate(features, "cpu")
    hidden_PH = torch.zeros(len(features), CONFIG.hidden_size)
    hidden_PH[:, 0] = torch.tensor([0.0, 0.25, 1.25])  # also beyond the range
    assert processor.outputs(head, hidden_PH, examples, features) == pytest.approx(predicted)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"tasks score checkpoint"', "{}", '{"tasks": {}}'])
def test_damaged_results_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    assert read_results(path) is None
    path.write_text(content)
    assert read_results(path) is None
    path.write_bytes(b"\xff\xfe")
    assert read_results(path) is None
    whole = {"tasks": {}, "score": {}, "checkpoint": "there"}
    write_json(path, whole)
    assert read_results(path) == whole


def test_results_of_other_inputs_are_set_aside(tmp_path: Path) -> None:
    set_aside_others(tmp_path, "ours")
    content = {"tasks": {}, "score": {}, "checkpoint": "there", "fingerprint": "ours"}
    write_json(tmp_path / "results.json", content)
    (tmp_path / "results.md").write_text("table")
    (tmp_path / "results_so_far.json").write_text("{}")
    set_aside_others(tmp_path, "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results_so_far.json"}
    set_aside_others(tmp_path, "others")
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.before-1.json", "results.before-1.md", "results_so_far.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "results.before-1.json").read_text()) == content
    assert (tmp_path / "results.before-1.md").read_text() == "table"
    write_json(tmp_path / "results.json", content | {"fingerprint": "others"})
    set_aside_others(tmp_path, "ours")
    assert json.loads((tmp_path / "results.before-1.json").read_text()) == content
    assert json.loads((tmp_path / "results.before-2.json").read_text())["fingerprint"] == "others"
    (tmp_path / "results.before-1.json").unlink()
    (tmp_path / "results.before-1.md").unlink()
    for fingerprint in ("third", "fourth"):
        write_json(tmp_path / "results.json", content | {"fingerprint": fingerprint})
        set_aside_others(tmp_path, "ours")
    kept = {number: read_results(tmp_path / f"results.before-{number}.json") for number in (1, 2, 3)}
    assert {number: of and of["fingerprint"] for number, of in kept.items()} == {1: "third", 2: "others", 3: "fourth"}


def test_another_element_of_an_array_may_set_them_aside_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results.json", "results.md"):
        (tmp_path / name).write_text("{}")
    replace_file = os.replace

    def overtaken(source: Path, target: Path) -> None:
        replace_file(source, target)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    set_aside_others(tmp_path, "others")
    assert {path.name for path in tmp_path.iterdir()} == {"results.before-1.json", "results.before-1.md"}


@pytest.fixture(scope="module")
def of_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    install(folder, sentencepiece_model(["naïve café x a b. " * 20]))
    return Tokenizer(folder)


@pytest.mark.parametrize("text", ["a😀b", "naïve\r\ncafe\u0301 x", "  a😀😀 naïve cafe\u0301\n"])
def test_offsets_of_sentencepiece_count_characters(of_sentencepiece: Tokenizer, text: str) -> None:
    ids, offsets = of_sentencepiece.encode_with_offsets(text)
    assert ids == of_sentencepiece.encode(text)
    parts = [text[begin:end] for begin, end in offsets]
    assert "".join(parts) == "".join(text.split())
    assert [begin for begin, _ in offsets] == sorted(begin for begin, _ in offsets)
    for piece, part in zip(of_sentencepiece.pieces(ids), parts, strict=True):
        if piece != "[UNK]":
            assert unicodedata.normalize("NFKC", part) == piece.strip("▁")
    assert ("[UNK]" in of_sentencepiece.pieces(ids)) == ("😀" in text)


def test_a_letter_of_two_characters_is_in_the_token_before(of_sentencepiece: Tokenizer) -> None:
    text = "naïve\r\ncafe\u0301 x"
    _, offsets = of_sentencepiece.encode_with_offsets(text)
    assert offsets[-1] == (13, 14)
    assert max(end for _, end in offsets[:-1]) == 12
    assert all(not text[begin:].startswith("\u0301") for begin, _ in offsets)


def test_offsets_of_wordpiece_keep_the_marks_that_it_drops(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "na", "##ive", "x", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    install(tmp_path / "tokenizer", tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    text = "Cafe\u0301 nai\u0308ve cafe\u0301s x\u0301\u0308"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.pieces(ids) == ["cafe", "na", "##ive", "cafe", "##s", "x"]
    assert [text[begin:end] for begin, end in offsets] == [
        "Cafe\u0301", "na", "i\u0308ve", "cafe\u0301", "s", "x\u0301\u0308",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("f g", [(9, 10), (6, 7), (0, 0)]),  # the first window holds a to g
        ("f gh", [(0, 0), (6, 8), (0, 0)]),
        ("g", [(10, 10), (7, 7), (4, 4)]),
        ("h", [(0, 0), (8, 8), (5, 5)]),
        ("ijk", [(0, 0), (0, 0), (6, 8)]),
    ],
)
def test_an_answer_is_where_a_window_holds_all_of_it(tmp_path: Path, answer: str, expected: list) -> None:
    processor = span_processor(tmp_path, [question(1, "ab cd ef gh ijk", answer)])
    windows = processor.features("train")
    assert [(window.start, window.end) for window in windows] == expected
    assert not any(window.is_impossible for window in windows)
    for window in windows:
        if window.start:
            held = [chr(ord("a") + int(number) - 10) for number in window.token_ids[window.start : window.end + 1]]
            assert "".join(held) == answer.replace(" ", "")


@pytest.mark.parametrize(("null_score", "prediction"), [(0.5, "b"), (0.5001, ""), (0.4999, "b")])
def test_a_null_score_at_the_threshold_keeps_the_answer(tmp_path: Path, null_score: float, prediction: str) -> None:
    rows = [question(1, "abc", "b")]
    processor = span_processor(tmp_path, rows, no_answer_threshold=0.5)
    outcome = processor.outcome("dev", processor.features("dev"), [candidates([(-1.0, 1, 1)], null_score)])
    assert outcome.answers == json.loads(outcome.files["predictions.json"]) == {"1": prediction}
    assert json.loads(outcome.files["predictions_answered.json"]) == {"1": "b"}
    assert outcome.metrics["exact"] == float(prediction == "b")
