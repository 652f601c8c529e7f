"""Features, learning rates, steps and predictions of fine-tuning."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from data_shards.special import TRAINED, SpecialIds
from data_shards.tokenizer import Tokenizer
from model.config import ModelConfig
from model.finetuning import FineTunedElectra, LinearHead
from model.kernels.select import select_kernels
from pipeline.config import EvaluateConfig, FineTuning
from pipeline.errors import ConfigError
from pipeline.evaluation import finetune
from pipeline.evaluation.features import collate, cut_pair, split_by_tokens
from pipeline.evaluation.finetune import DivergedError, layer_learning_rates, predict
from pipeline.evaluation.finetune import FineTuning as Run
from pipeline.evaluation.partial import PartialState
from pipeline.evaluation.recipes import Recipe, recipes_for
from pipeline.evaluation.span import Candidates, SpanProcessor, Window, _ranges, _window_with_most_context
from pipeline.evaluation.tagging import TaggingProcessor
from pipeline.evaluation.task_file import TaskConfig
from pipeline.evaluation.tasks import Task
from pipeline.evaluation.text import TextProcessor

CONFIG = ModelConfig(
    size="tiny", hidden_layers=2, hidden_size=32, attention_heads=2, feed_forward_size=64, embedding_size=24,
    max_positions=64,
)  # type: ignore[call-arg]  # fmt: skip


class Letters:
    """A tokenizer whose ids are letters, from a given one on; white space is nothing to it."""

    def __init__(self, special: SpecialIds = TRAINED, first: int = 10):
        self.special, self._first, self.dtype = special, first, np.dtype(np.uint16)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        places = [i for i, letter in enumerate(text) if letter.isalpha()]
        return [self._first + ord(text[i]) - ord("a") for i in places], [(i, i + 1) for i in places]

    def encode_texts(self, texts: list[str]) -> list[bytes]:
        return [np.array(self.encode_with_offsets(text)[0], self.dtype).tobytes() for text in texts]


def recipe(kind: str = "pair", **changes: object) -> Recipe:
    """A recipe of the small size with changes."""
    task = TaskConfig.model_validate(TASK | {"kind": kind, "metrics": METRIC[kind], "text": TEXT[kind]})
    return recipes_for(EvaluateConfig(**changes), task, CONFIG)[""]  # type: ignore[arg-type]


TASK = {"name": "made_up", "train": "train.jsonl", "dev": "dev.jsonl"}
TEXT = {"pair": ["a", "b"], "classification": ["a"], "tagging": ["a"], "question_answering": ["question", "context"],
        "regression": ["a"]}  # fmt: skip
METRIC = {"pair": ["accuracy"], "classification": ["accuracy"], "tagging": ["span_f1"],
          "question_answering": ["exact", "f1"], "regression": ["spearman"]}  # fmt: skip


def make_task(folder: Path, rows: list[dict], kind: str, dev: list[dict] | None = None, **more: object) -> Task:
    for split, of_split in (("train", rows), ("dev", dev or rows)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    config = TaskConfig.model_validate(TASK | {"kind": kind, "text": TEXT[kind], "metrics": METRIC[kind], **more})
    return Task(config, {"train": (folder / "train.jsonl",), "dev": (folder / "dev.jsonl",)})


def test_learning_rates_fall_as_released() -> None:
    model = FineTunedElectra(CONFIG, 100, select_kernels("reference"), LinearHead(CONFIG, 2, 0.1))
    groups = layer_learning_rates(model, recipe(lr=1.0, layer_decay=0.8, weight_decay=0.1))
    rates = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    layers = CONFIG.hidden_layers
    assert {rates[id(p)] for p in model.head.parameters()} == {1.0}
    for number, layer in enumerate(model.discriminator.layers):
        expected = 0.8 ** (layers + 1 - number)  # the top layer has two factors, not one
        assert [rates[id(p)] for p in layer.parameters()] == pytest.approx([expected] * 12)
    assert {rates[id(p)] for p in model.embeddings.parameters()} == {0.8 ** (layers + 2)}


def test_recipes_are_the_published_ones_by_size_and_task() -> None:
    sizes = {"small": (3e-4, 0.8), "base": (1e-4, 0.8), "large": (5e-5, 0.9)}
    for size, expected in sizes.items():
        model = ModelConfig(size=size)  # type: ignore[call-arg, arg-type]
        task = TaskConfig.model_validate(TASK | {"kind": "pair", "text": ["a", "b"], "recipe": {"epochs": 10}})
        found = recipes_for(EvaluateConfig(), task, model)[""]  # type: ignore[call-arg]
        assert (found.lr, found.layer_decay) == expected
        assert (found.epochs, found.batch_size, found.max_length, found.weight_decay) == (10, 32, 128, 0.0)
        assert found.layer_decay_depth == "released"
    given = recipes_for(EvaluateConfig(epochs=1, lr=1e-3), task, model)[""]  # type: ignore[call-arg]
    assert (given.epochs, given.lr) == (1, 1e-3)  # the config is over the task's file
    answers = recipe("question_answering").span
    assert answers is not None
    assert (answers.span_head, answers.no_answer_threshold, answers.stride) == ("joint", -2.75, 128)
    assert recipe("question_answering", span_head="simple").span.no_answer_threshold == 0.0  # type: ignore[union-attr]


def test_a_grid_is_all_its_points() -> None:
    task = TaskConfig.model_validate(TASK | {"kind": "pair", "text": ["a", "b"]})
    found = recipes_for(EvaluateConfig(grid_lr=(1e-4, 3e-4), grid_layer_decay=(0.8, 0.9)), task, CONFIG)  # type: ignore
    assert {(r.lr, r.layer_decay) for r in found.values()} == {(1e-4, 0.8), (1e-4, 0.9), (3e-4, 0.8), (3e-4, 0.9)}
    assert "lr_0.0001-layer_decay_0.8" in found


def test_lengths_that_do_not_fit_are_refused() -> None:
    task = TaskConfig.model_validate(TASK | {"kind": "question_answering", "text": ["q", "c"], "metrics": ["exact"]})
    with pytest.raises(ConfigError, match="max_length=65 exceeds the model's 64 positions"):
        recipes_for(EvaluateConfig(max_length=65), task, CONFIG)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="max_length=64 leaves no room for a context beside max_question_length=64"):
        recipes_for(EvaluateConfig(max_question_length=64), task, CONFIG)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("first", "second", "most"), [(8, 2, 7), (9, 9, 7), (3, 9, 8), (2, 3, 9), (5, 4, 8), (4, 5, 8)]
)
def test_pairs_are_cut_token_by_token_at_the_longer_one(first: int, second: int, most: int) -> None:
    kept = [first, second]
    while sum(kept) > most:
        kept[0 if kept[0] > kept[1] else 1] -= 1
    assert cut_pair(first, second, most) == tuple(kept)


def test_pairs_are_laid_out_and_symmetric_ones_train_in_both_orders(tmp_path: Path) -> None:
    rows = [{"id": "1", "a": "abcdefgh", "b": "ij", "label": "y"}, {"id": "2", "a": "a", "b": "b", "label": "x"}]
    task = make_task(tmp_path, rows, "pair", symmetric=True)
    processor = TextProcessor(task, recipes_for(EvaluateConfig(max_length=10), task.config, CONFIG)[""], Letters())  # type: ignore
    features = processor.features("train")
    assert features[0].token_ids.tolist() == [2, 10, 11, 12, 13, 14, 3, 18, 19, 3]
    assert (features[0].num_first, features[0].target) == (7, 1.0)
    assert features[2].token_ids.tolist() == [2, 18, 19, 3, 10, 11, 12, 13, 14, 3]
    assert [feature.example for feature in features] == [0, 1, 0, 1]
    assert len(processor.features("dev")) == 2
    types_T = collate(features[:2], "cpu").token_types_T
    assert types_T.tolist() == [0] * 7 + [1] * 3 + [0] * 3 + [1] * 2


def test_scores_are_trained_between_0_and_1_and_predicted_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": str(n), "a": "abc", "label": n} for n in (0, 1.5, 5)]
    task = make_task(tmp_path, rows, "regression", label_range=[0, 5])
    processor = TextProcessor(task, recipe("regression"), Letters())  # type: ignore[arg-type]
    features = processor.features("train")
    assert [feature.target for feature in features] == [0.0, 0.3, 1.0]
    head = LinearHead(CONFIG, 1, 0.1).eval()
    torch.nn.init.zeros_(head.output.weight)
    torch.nn.init.constant_(head.output.bias, 0.5)
    examples = collate(features, "cpu")
    hidden_PH = torch.zeros(len(features), CONFIG.hidden_size)
    assert processor.outputs(head, hidden_PH, examples, features) == [2.5] * 3
    assert float(processor.loss(head, hidden_PH, examples, features)) == pytest.approx(0.25 + 0.04 + 0.25)


def test_words_are_tagged_at_their_first_token_and_long_sentences_in_parts(tmp_path: Path) -> None:
    rows = [{"id": "1", "a": ["abc", "d", "--", "efghijkl", "m"], "label": ["B-X", "I-X", "O", "O", "B-X"]}]
    task = make_task(tmp_path, rows, "tagging", tag_scheme="bioes")
    processor = TaggingProcessor(task, recipe("tagging", max_length=8), Letters())  # type: ignore[arg-type]
    features = processor.features("train")
    unknown = TRAINED.unk
    assert [feature.token_ids.tolist() for feature in features] == [
        [2, 10, 11, 12, 13, unknown, 3], [2, 14, 15, 16, 17, 18, 19, 3], [2, 22, 3],
    ]  # fmt: skip
    assert [feature.word_starts.tolist() for feature in features] == [[1, 4, 5], [1], [1]]
    tags = ["B-X", "E-X", "O", "S-X"]
    targets = [[tags[t] for t in feature.targets] for feature in features]
    assert targets == [["B-X", "E-X", "O"], ["O"], ["S-X"]]
    outcome = processor.outcome("dev", features, [["B-X", "E-X", "O"], ["O"], ["S-X"]])
    assert outcome.answers == [["B-X", "I-X", "O", "O", "B-X"]]
    assert outcome.metrics == {"span_f1": 1.0}
    assert json.loads(outcome.files["predictions.jsonl"])["prediction"] == ["B-X", "I-X", "O", "O", "B-X"]


@pytest.mark.parametrize("tags", [["B-X", "I-X", "O", "B-Y"], ["I-X", "I-X", "O", "I-Y"], ["B-X", "E-X", "O", "S-Y"]])
def test_what_is_right_is_right_in_any_scheme_of_the_files(tags: list[str], tmp_path: Path) -> None:
    rows = [{"id": "1", "a": ["a", "b", "c", "d"], "label": tags}]
    task = make_task(tmp_path, rows, "tagging", tag_scheme="bioes", metrics=["span_f1", "accuracy"])
    processor = TaggingProcessor(task, recipe("tagging", max_length=8), Letters())  # type: ignore[arg-type]
    outcome = processor.outcome("dev", processor.features("train"), [["B-X", "E-X", "O", "S-Y"]])
    assert outcome.metrics == {"span_f1": 1.0, "accuracy": 1.0}


def question(number: int, context: str, text: str | None) -> dict:
    answers = {"text": [text] if text else [], "answer_start": [context.index(text)] if text else []}
    return {"id": str(number), "question": "abc", "context": context, "answers": answers}


def span_processor(folder: Path, rows: list[dict], no_answer: bool = True, **changes: object) -> SpanProcessor:
    task = make_task(folder, rows, "question_answering", label="answers", no_answer=no_answer)
    settings = {"max_question_length": 2, "max_length": 12, "stride": 3, **changes}
    return SpanProcessor(task, recipe("question_answering", **settings), Letters())  # type: ignore[arg-type]


def test_windows_hold_the_answer_or_point_to_cls(tmp_path: Path) -> None:
    context = "ab cd ef gh ijk"  # eleven letters; windows of seven
    processor = span_processor(tmp_path, [question(1, context, "d ef"), question(2, context, None)])
    windows = processor.features("train")
    assert [window.first_token for window in windows] == [0, 3, 6, 0, 3, 6]
    assert windows[0].token_ids.tolist() == [2, 10, 11, 3, 10, 11, 12, 13, 14, 15, 16, 3]
    assert windows[0].num_first == 4
    assert [(w.start, w.end, w.is_impossible) for w in windows] == [
        (7, 9, False), (4, 6, False), (0, 0, False), (0, 0, True), (0, 0, True), (0, 0, True),
    ]  # fmt: skip
    assert _ranges(0, 7, 3) == [(0, 0)]
    assert _ranges(7, 7, 3) == [(0, 7)]
    assert _ranges(8, 7, 30) == [(0, 7), (7, 8)]


def test_a_token_belongs_to_the_window_with_most_context() -> None:
    home = _window_with_most_context([(0, 7), (3, 7), (6, 5)], 11)
    assert home.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def candidates(best: list[tuple[float, int, int]], null_score: float) -> Candidates:
    scores, first, last = (np.array(values) for values in zip(*best, strict=True))
    return Candidates(scores, first, last, null_score)


def test_the_best_span_over_windows_answers_unless_the_null_score_is_above_the_threshold(tmp_path: Path) -> None:
    context = "ab cd ef gh ijk"
    rows = [question(1, context, "d ef"), question(2, context, None), question(3, "abc", "b")]
    processor = span_processor(tmp_path, rows, no_answer_threshold=0.5)
    windows: list[Window] = processor.features("dev")
    outputs = [
        candidates([(-1.0, 8, 8), (-2.0, 3, 5)], 3.0),  # its best begins where another window has more context
        candidates([(-3.0, 5, 6)], 0.4), candidates([(-9.0, 8, 9)], 2.0),
        candidates([(-1.0, 1, 2)], 0.7), candidates([(-2.0, 5, 5)], 0.6), candidates([(-2.0, 8, 8)], 0.9),
        candidates([(-1.0, 1, 1)], -4.0),
    ]  # fmt: skip
    outcome = processor.outcome("dev", windows, outputs)
    assert outcome.answers == {"1": "d ef", "2": "", "3": "b"}
    assert json.loads(outcome.files["null_odds.json"]) == {"1": 0.4, "2": 0.6, "3": -4.0}
    assert json.loads(outcome.files["predictions_answered.json"])["2"] == "b c"
    assert (outcome.metrics["exact"], outcome.metrics["f1"]) == (1.0, 1.0)


def test_candidates_lie_in_the_context_and_are_not_too_long(tmp_path: Path) -> None:
    processor = span_processor(tmp_path, [question(1, "ab cd ef gh ijk", "d")], max_answer_length=3)
    window = processor.features("dev")[1]
    torch.manual_seed(0)
    head = processor.head(CONFIG).eval()
    examples = collate([window], "cpu")
    with torch.no_grad():
        (found,) = processor.outputs(head, torch.randn(len(window), CONFIG.hidden_size), examples, [window])
    assert len(found.scores_K) == 7 + 6 + 5  # every span of one to three of the window's seven tokens
    assert (np.diff(found.scores_K) <= 0).all()
    assert found.first_K.min() == 3
    assert found.last_K.max() == 9
    assert set(found.last_K - found.first_K) == {0, 1, 2}


def test_batches_hold_so_many_tokens() -> None:
    features = [Window(np.zeros(length, np.int32), 1, 0, 0) for length in (5, 4, 9, 1, 1)]
    assert [list(map(len, batch)) for batch in split_by_tokens(features, 9)] == [[5, 4], [9], [1, 1]]
    assert list(split_by_tokens([], 9)) == []


def training(folder: Path, kind_recipe: Recipe, seed: int = 1) -> tuple[FineTunedElectra, Run, TextProcessor]:
    rows = [{"id": str(n), "a": "abc"[n % 3] * (1 + n % 5), "b": "d", "label": "xy"[n % 2]} for n in range(20)]
    task = make_task(folder, rows, "pair")
    processor = TextProcessor(task, kind_recipe, Letters())  # type: ignore[arg-type]
    torch.manual_seed(seed)
    model = FineTunedElectra(CONFIG, 40, select_kernels("torch"), processor.head(CONFIG))
    return model, Run(model, processor, processor.features("train"), kind_recipe, seed, "cpu"), processor


def test_a_run_that_is_stopped_twice_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings = recipe(epochs=4, batch_size=6, lr=1e-2)
    whole, run, _ = training(tmp_path, settings)
    assert run.run(PartialState(tmp_path / "whole", "f"), lambda: False)
    assert run.plan.steps == 16
    assert not (tmp_path / "whole").exists()
    for stop_at in (3, 9, None):
        model, run, _ = training(tmp_path, settings)
        ended = run.run(PartialState(tmp_path / "partial", "f"), lambda: run.step == stop_at)  # noqa: B023
        assert ended == (stop_at is None)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_partial_state_of_another_unit_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    settings = recipe(epochs=4, batch_size=6)
    _, run, _ = training(tmp_path, settings)
    run.run(PartialState(tmp_path / "partial", "one"), lambda: run.step == 3)
    model, other, _ = training(tmp_path, settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert PartialState(tmp_path / "partial", "another").load(model, other._optimizer) == 0
    (tmp_path / "partial").write_bytes((tmp_path / "partial").read_bytes()[:-100])
    assert PartialState(tmp_path / "partial", "one").load(model, other._optimizer) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_room_for_a_partial_state_the_unit_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finetune, "_SAVE_EVERY_S", 0)
    _, run, _ = training(tmp_path, recipe(epochs=1, batch_size=6))
    partial = PartialState(tmp_path / "absent" / "partial", "f")
    with caplog.at_level("WARNING"):
        assert run.run(partial, lambda: False)
        assert run.step == run.plan.steps == 4
        assert not training(tmp_path, recipe())[1].run(partial, lambda: True)
    assert caplog.text.count("cannot be written") == 5
    assert "a stop now would lose the steps since the last one" in caplog.text


def test_a_batch_in_several_passes_is_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(epochs=1, batch_size=10, lr=1e-2, dropout=0.0)
    models = []
    for most in (10_000, 20):
        monkeypatch.setattr(finetune, "_TRAIN_TOKENS", most)
        model, run, _ = training(tmp_path, settings)
        model.eval()
        monkeypatch.setattr(model, "train", lambda *_: None)  # dropout of the model's own config stays off
        run.run(PartialState(tmp_path / "none", ""), lambda: False)
        models.append(model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_no_number_ends_the_unit(tmp_path: Path) -> None:
    model, run, _ = training(tmp_path, recipe(epochs=1))
    with torch.no_grad():
        model.embeddings.layer_norm.weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"not finite after 1 steps with lr=0\.0003; lower evaluate\.lr"):
        run.run(PartialState(tmp_path / "none", ""), lambda: False)


def test_predictions_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, processor = training(tmp_path, recipe(epochs=6, lr=5e-3))
    run.run(PartialState(tmp_path / "none", ""), lambda: False)
    features = processor.features("dev")

    class Logits(TextProcessor):
        def outputs(self, head, hidden_PH, examples, features) -> list:
            return head(hidden_PH).tolist()

    processor.__class__ = Logits
    together = torch.tensor(predict(model, processor, features, recipe(), "cpu"))
    monkeypatch.setattr(finetune, "_PREDICT_TOKENS", 1)
    alone = torch.tensor(predict(model, processor, features, recipe(), "cpu"))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert alone.std(0).min() > 0.01


def test_bf16_is_what_it_says(tmp_path: Path) -> None:
    model, _, processor = training(tmp_path, recipe())
    seen = []
    model.discriminator.layers[0].attention.output.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    for precision in ("fp32", "bf16"):
        predict(model, processor, processor.features("dev"), recipe(precision=precision), "cpu")
    assert seen == [torch.float32, torch.bfloat16]


def test_offsets_are_the_text_of_the_tokens(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bada", "zo", "##zo", "(", "1895", "-", ")"]
    library = Library(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = Tokenizer(tmp_path), "  bada zozo\t(1895-1895) Ökonomie"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert [text[begin:end] for begin, end in offsets] == [
        "bada", "zo", "zo", "(", "1895", "-", "1895", ")", "Ökonomie",
    ]  # fmt: skip


def test_a_key_of_the_recipe_is_none_unless_it_is_given() -> None:
    assert all(field.default is None for field in FineTuning.model_fields.values())
