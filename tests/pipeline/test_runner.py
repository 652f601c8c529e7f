"""Units done on a small folder of the hub's form: weights, seeds, starts, files, failures, shifts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data_shards.store import write_json
from model.config import ModelConfig
from pipeline.config import Config, EvaluateConfig
from pipeline.config_file import load_config
from pipeline.evaluation import runner, units
from pipeline.evaluation.finetune import DivergedError, predict
from pipeline.evaluation.partial import fingerprint_of
from pipeline.evaluation.pretrained import Pretrained, find_pretrained
from pipeline.evaluation.recipes import Recipe, Span, recipes_for
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.tagging import TaggingProcessor
from pipeline.evaluation.task_file import TaskConfig
from pipeline.evaluation.tasks import Task
from pipeline.evaluation.text import TextProcessor
from pipeline.evaluation.units import Shift, Unit, plan_units
from tests.conftest import TINY
from tests.parity.google_folders import make_folders
from tests.pipeline.test_finetune import METRIC, TASK, TEXT, make_task, recipe

STANDING_STILL = 1e-12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path) -> Config:
    folder = tmp_path_factory.mktemp("hub")
    published, _ = make_folders(folder, num_hidden_layers=1)
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(run_dir=folder / "out", corpus=corpus_path))
    return load_config(path, (f"evaluate.checkpoint={published}",))


@pytest.fixture(scope="module")
def pretrained(config: Config) -> Pretrained:
    return find_pretrained(config)


def rows_of(split: str, count: int, labels: str = "xy") -> list[dict]:
    words = ["bada", "zozo", "fi", "ku", "mere"]
    return [
        {"id": f"{split}-{n}", "a": " ".join(words[: 1 + n % 5]), "b": words[n % 3], "label": labels[n % len(labels)]}
        for n in range(count)
    ]


def task_in(folder: Path, labels: str = "xy", **more: object) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    return make_task(folder, rows_of("train", 12, labels), "pair", rows_of("dev", 5, labels), **more)


def unit_of(pretrained: Pretrained, task: Task, folder: Path, seed: int = 1, **more) -> Unit:
    settings = more.pop("recipe", recipe(lr=STANDING_STILL, epochs=1, batch_size=4))
    return Unit(pretrained, task, settings, "", seed, folder / f"seed_{seed}", f"fingerprint {seed}", **more)


def do(run: Runner, unit: Unit) -> dict:
    """In its folder, which the claim to it makes."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    result = run.run(unit, lambda: False)
    assert result
    return result


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The fine-tuned models of all runs."""
    seen: list[nn.Module] = []

    def spy(model, *rest):
        seen.append(model)
        return predict(model, *rest)

    monkeypatch.setattr(runner, "predict", spy)
    return seen


def test_a_unit_that_learns_nothing_keeps_the_pretrained_weights(
    config: Config, pretrained: Pretrained, tmp_path: Path
) -> None:
    unit = unit_of(pretrained, task_in(tmp_path), tmp_path, keeps_weights=True)
    assert unit.finished() is None
    result = do(Runner(config, "cpu"), unit)
    assert result == unit.finished() == json.loads((unit.folder / "result.json").read_text())
    assert fingerprint_of(unit.weights_path) == unit.fingerprint
    kept = load_file(unit.weights_path)
    assert not [name for name in kept if name.startswith("head")]
    expected = {name.replace("encoder.", "discriminator.", 1): t for name, t in pretrained.weights.items()}
    expected = {name: t for name, t in expected.items() if not name.startswith("head.")}
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9, msg=name)
    assert result["training"] == {"features": 12, "steps": 3, "tokens": result["training"]["tokens"]}
    assert result["recipe"] == unit.recipe.to_dict()
    assert sorted(path.name for path in unit.folder.iterdir()) == [
        "predictions.jsonl", "result.json", "weights.safetensors",
    ]  # fmt: skip


def test_a_unit_whose_weights_are_damaged_or_anothers_is_not_finished(
    config: Config, pretrained: Pretrained, tmp_path: Path
) -> None:
    unit = unit_of(pretrained, task_in(tmp_path), tmp_path, keeps_weights=True)
    do(Runner(config, "cpu"), unit)
    whole = unit.weights_path.read_bytes()
    assert unit.finished()
    unit.weights_path.write_bytes(whole[:100])
    assert unit.finished() is None
    assert replace(unit, keeps_weights=False).finished()
    unit.weights_path.write_bytes(whole.replace(unit.fingerprint.encode(), b"fingerprint 7"))
    assert fingerprint_of(unit.weights_path) == "fingerprint 7"
    assert unit.finished() is None
    unit.weights_path.unlink()
    assert unit.finished() is None
    unit.weights_path.write_bytes(whole)
    assert unit.finished()
    (unit.folder / "result.json").write_text('{"fingerprint": "fingerprint 1"}')
    assert unit.finished() is None
    (unit.folder / "result.json").write_text("[")
    assert unit.finished() is None


def test_a_unit_that_is_told_to_stop_leaves_a_partial_state_only(
    config: Config, pretrained: Pretrained, tmp_path: Path
) -> None:
    unit = unit_of(pretrained, task_in(tmp_path), tmp_path)
    unit.folder.mkdir()
    assert Runner(config, "cpu").run(unit, lambda: True) is None
    assert [path.name for path in unit.folder.iterdir()] == ["partial.safetensors"]


def test_heads_follow_from_the_seed_alone(config: Config, pretrained: Pretrained, tmp_path: Path, models: list) -> None:
    task, run = task_in(tmp_path), Runner(config, "cpu")
    for seed, folder in ((1, "a"), (2, "a"), (1, "b")):
        torch.manual_seed(100 + len(models))
        do(run, unit_of(pretrained, task, tmp_path / folder, seed))
    first, second, again = (model.head.output.weight for model in models)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-9)
    assert (first - second).abs().max() > 0.01
    encoders = [dict(model.discriminator.named_parameters()) for model in models[:2]]
    for name, weight in encoders[0].items():
        torch.testing.assert_close(weight, encoders[1][name], rtol=0, atol=1e-9)


def test_dropout_is_the_recipes(config: Config, pretrained: Pretrained, tmp_path: Path, models: list) -> None:
    task = task_in(tmp_path)
    for number, dropout in enumerate((0.0, 0.25)):
        settings = recipe(lr=STANDING_STILL, epochs=1, dropout=dropout)
        do(Runner(config, "cpu"), unit_of(pretrained, task, tmp_path / str(number), recipe=settings))
        model, encoder = models[number], models[number].discriminator
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [dropout]  # of the head
        assert [layer.attention.attention_dropout for layer in encoder.layers] == [dropout]
        assert [encoder.embedding_dropout, *(layer.dropout for layer in encoder.layers)] == [dropout] * 2
    assert pretrained.model.dropout == pretrained.model.attention_dropout == 0.1


def test_a_unit_starts_from_the_encoder_that_it_needs_of_the_same_seed(
    config: Config, pretrained: Pretrained, tmp_path: Path, models: list
) -> None:
    mnli = task_in(tmp_path / "mnli", name="mnli", recipe={"lr": 1e-2})
    other = task_in(tmp_path / "other", "xyz", name="other", mnli_init=True, recipe={"lr": STANDING_STILL})
    evaluate = config.evaluate.model_copy(update={"mnli_init": True})
    planned = plan_units(config.model_copy(update={"evaluate": evaluate}), tmp_path, pretrained, [other, mnli])
    assert len({unit.fingerprint for unit in planned}) == 4
    of = {(unit.task.name, unit.seed): unit for unit in planned}
    run = Runner(config, "cpu")
    for seed in (1, 2):
        assert of["other", seed].needs is of["mnli", seed]
        assert (of["mnli", seed].keeps_weights, of["other", seed].keeps_weights) == (True, False)
        do(run, of["mnli", seed])
    for seed in (2, 1):
        do(run, of["other", seed])
        starts = load_file(of["mnli", seed].weights_path)
        for name, weight in models[-1].named_parameters():
            if not name.startswith("head."):
                torch.testing.assert_close(weight, starts[name], rtol=0, atol=1e-9, msg=name)
        assert models[-1].head.output.weight.shape[0] == 3
    name = "discriminator.layers.0.feed_forward_in.weight"
    weights = [load_file(of["mnli", seed].weights_path)[name] for seed in (1, 2)]
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    assert (weights[0] - pretrained.weights[name.replace("discriminator", "encoder")]).abs().max() > 1e-3


def test_files_of_further_parts_and_tests_stand_beside_those_of_dev(
    config: Config, pretrained: Pretrained, tmp_path: Path
) -> None:
    task = task_in(tmp_path, also={"other": "other.jsonl"}, test={"blind": "blind.jsonl"})
    for name, rows in (("other", rows_of("other", 4)), ("blind", rows_of("blind", 3))):
        unlabelled = [{key: row[key] for key in row if name != "blind" or key != "label"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
        task.files[name] = (tmp_path / f"{name}.jsonl",)
    unit = unit_of(pretrained, task, tmp_path)
    result = do(Runner(config, "cpu"), unit)
    predictions = {}
    for split, suffix, count in (("dev", "", 5), ("other", "_other", 4), ("blind", "_blind", 3)):
        rows = list(map(json.loads, (unit.folder / f"predictions{suffix}.jsonl").read_text().splitlines()))
        assert [row["id"] for row in rows] == [f"{split}-{n}" for n in range(count)]
        predictions[split] = rows
    assert result["metrics"].keys() == {"accuracy", "accuracy_other"}
    for split, name in (("dev", "accuracy"), ("other", "accuracy_other")):
        right = [row["label"] == row["prediction"] for row in predictions[split]]
        assert result["metrics"][name] == sum(right) / len(right)
    answers = json.loads((unit.folder / "test_blind.json").read_text())
    assert answers == [row["prediction"] for row in predictions["blind"]]
    assert unit.finished()
    (unit.folder / "test_blind.json").unlink()
    assert unit.finished() is None


def test_a_task_is_prepared_once_for_all_seeds_of_a_recipe(
    config: Config, pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    features = TextProcessor.features
    monkeypatch.setattr(TextProcessor, "features", lambda self, split: made.append(split) or features(self, split))
    task, run = task_in(tmp_path), Runner(config, "cpu")
    for seed in (1, 2, 3):
        do(run, unit_of(pretrained, task, tmp_path, seed))
    assert made == ["train", "dev"]
    shorter = recipe(lr=STANDING_STILL, epochs=1, batch_size=4, max_length=8)
    result = do(run, unit_of(pretrained, task, tmp_path / "shorter", recipe=shorter))
    assert made == ["train", "dev"] * 2
    assert result["training"]["tokens"] <= 12 * 8


def test_each_kind_has_its_processor(config: Config, pretrained: Pretrained, tmp_path: Path) -> None:
    rows = [{"id": str(n), "a": ["bada", "zozo"], "label": ["O", "B-X"]} for n in range(4)]
    unit = unit_of(
        pretrained, make_task(tmp_path, rows, "tagging"), tmp_path, recipe=recipe("tagging", lr=1e-3, epochs=1)
    )
    run = Runner(config, "cpu")
    result = do(run, unit)
    assert result["metrics"].keys() == {"span_f1"}
    assert run._prepared
    assert isinstance(run._prepared.processor, TaggingProcessor)


COMMON: dict[str, Any] = {
    "lr": 3e-4, "layer_decay": 0.8, "layer_decay_depth": "released", "epochs": 3, "batch_size": 32,
    "batch_loss": "sum", "warmup_fraction": 0.1, "weight_decay": 0.0, "max_length": 128, "dropout": 0.1,
    "both_orders": False, "precision": "fp32", "init_from": None, "span": None,
}  # fmt: skip
JOINT = Span(
    span_head="joint", max_question_length=64, stride=128, max_answer_length=30, beam_size=20, answerable_weight=0.5,
    no_answer_threshold=-2.75,
)  # fmt: skip


def recipe_of(kind: str, evaluate: EvaluateConfig | None = None, **more: object) -> Recipe:
    """At the small size with 512 positions."""
    about = TASK | {"kind": kind, "metrics": METRIC[kind], "text": TEXT[kind]} | more
    model = ModelConfig(size="small")  # type: ignore[call-arg]
    return recipes_for(evaluate or EvaluateConfig(), TaskConfig.model_validate(about), model)[""]  # type: ignore


@pytest.mark.parametrize(
    ("kind", "differs"),
    [
        ("classification", {}),
        ("pair", {}),
        ("regression", {}),
        ("tagging", {"max_length": 256}),
        ("question_answering", {"max_length": 512, "span": JOINT}),
    ],
)
def test_each_kind_has_the_published_recipe(kind: str, differs: dict) -> None:
    assert recipe_of(kind) == Recipe(**(COMMON | differs))


def test_both_orders_are_for_symmetric_pairs_unless_they_are_refused() -> None:
    assert recipe_of("pair", symmetric=True).both_orders
    assert not recipe_of("pair", symmetric=True, recipe={"both_orders": False}).both_orders
    refused = EvaluateConfig(both_orders=False)  # type: ignore[call-arg]
    assert not recipe_of("pair", refused, symmetric=True).both_orders
    assert not recipe_of("pair", EvaluateConfig(both_orders=True)).both_orders  # type: ignore[call-arg]


def test_mnli_is_started_from_where_both_the_config_and_the_task_say_so() -> None:
    asked = EvaluateConfig(mnli_init=True)  # type: ignore[call-arg]
    assert recipe_of("pair", asked, mnli_init=True) == replace(Recipe(**COMMON), init_from="mnli")
    assert recipe_of("pair", asked).init_from is None
    assert recipe_of("pair", mnli_init=True).init_from is None


def test_an_error_that_is_foreseen_is_final(pretrained: Pretrained, tmp_path: Path) -> None:
    unit = unit_of(pretrained, task_in(tmp_path), tmp_path)
    assert not unit.is_lost("one")
    assert unit.failure() is None
    unit.write_failure(DivergedError("lower evaluate.lr"), "one")
    assert unit.failure() == "lower evaluate.lr"
    assert unit.is_lost("one")
    assert unit.is_lost("another")
    assert not replace(unit, fingerprint="changed").is_lost("one")
    unit.forget_failure()
    assert not unit.is_lost("one")


def test_any_other_error_is_tried_again_by_one_other_process(pretrained: Pretrained, tmp_path: Path) -> None:
    unit = unit_of(pretrained, task_in(tmp_path), tmp_path)
    unit.write_failure(RuntimeError("sick " + 3000 * "x"), "one")
    assert unit.failure() == ("RuntimeError: sick " + 3000 * "x")[:2000]
    assert unit.is_lost("one")
    assert not unit.is_lost("another")
    changed = replace(unit, fingerprint="changed")
    unit.write_failure(RuntimeError("sick"), "another")
    assert unit.is_lost("a third")
    changed.write_failure(RuntimeError("sick"), "another")
    assert not changed.is_lost("one")  # what others tried was another unit


def finish(unit: Unit) -> None:
    unit.folder.mkdir(exist_ok=True)
    write_json(unit.folder / "result.json", {"fingerprint": unit.fingerprint, "metrics": {"accuracy": 1.0}})


def done_by(shift: Shift, failing: tuple[int, ...] = ()) -> list[int]:
    """Seeds in the order in which their units came."""
    seeds = []
    for unit, claim in shift.claims(lambda: False):
        with claim:
            assert (unit.folder / "claim").exists()
            seeds.append(unit.seed)
            if unit.seed in failing:
                unit.write_failure(RuntimeError("sick"), shift.process)
            else:
                finish(unit)
    return seeds


@pytest.fixture
def five(pretrained: Pretrained, tmp_path: Path) -> list[Unit]:
    task = task_in(tmp_path)
    return [unit_of(pretrained, task, tmp_path, seed) for seed in range(5)]


def test_a_shift_begins_with_its_share_and_does_the_rest_then(five: list[Unit]) -> None:
    shift = Shift(five, 1, 2)
    assert done_by(shift) == [1, 3, 0, 2, 4]
    assert shift.pending() == []
    assert not list(five[0].folder.parent.rglob("*claim*"))


def test_a_shift_leaves_out_what_is_done_and_does_a_failed_unit_once(five: list[Unit]) -> None:
    finish(five[2])
    assert done_by(Shift(five, 0, 1), failing=(0, 3)) == [0, 1, 3, 4]
    assert done_by(Shift(five, 0, 1)) == [0, 3]  # a process that starts forgets the failures of its share


def test_a_shift_forgets_the_failures_of_its_share_only(five: list[Unit]) -> None:
    for unit in five[:2]:
        unit.write_failure(DivergedError("lower evaluate.lr"), "before")
    assert done_by(Shift(five, 1, 2)) == [1, 3, 2, 4]


def test_a_shift_ends_when_it_is_told_to(five: list[Unit]) -> None:
    seen: list[int] = []
    for unit, claim in Shift(five, 0, 1).claims(lambda: len(seen) == 2):
        with claim:
            seen.append(unit.seed)
            finish(unit)
    assert seen == [0, 1]


def test_a_unit_waits_for_the_one_that_it_needs_and_is_lost_with_it(five: list[Unit]) -> None:
    first, *_, last = five
    waiting = replace(first, needs=last)
    assert done_by(Shift([waiting, last], 0, 1)) == [4, 0]
    for unit in (first, last):
        (unit.folder / "result.json").unlink()
    assert done_by(Shift([waiting, last], 0, 1), failing=(4,)) == [4]


def test_a_unit_that_another_process_has_is_left_to_it(five: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(units, "_LOOK_AGAIN_S", 0.01)
    take = units.take

    def busy_twice(folder: Path, watch: object):
        if folder == five[0].folder and len(taken) < 2:
            taken.append(1)
            return None
        return take(folder, watch)  # type: ignore[arg-type]

    monkeypatch.setattr(units, "take", busy_twice)
    assert done_by(Shift(five[:2], 0, 1)) == [1, 0]
    monkeypatch.setattr(units, "take", lambda *_: None)
    monkeypatch.setattr(units, "is_beating", lambda *_: True)
    assert done_by(Shift(five[2:], 0, 1, may_leave=True)) == []
