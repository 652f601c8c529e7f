"""Fine-tuning against plain loops: updates, words of sentences, orders, heads, spans."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.finetuning import FineTunedElectra, LinearHead, Spans
from model.kernels.select import select_kernels
from pipeline.evaluation.features import collate
from pipeline.evaluation.finetune import FineTuning, predict
from pipeline.evaluation.partial import PartialState
from pipeline.evaluation.recipes import Recipe
from pipeline.evaluation.tagging import TaggingProcessor
from pipeline.evaluation.text import TextProcessor
from tests.pipeline.test_finetune import (
    CONFIG,
    Letters,
    candidates,
    make_task,
    question,
    recipe,
    span_processor,
    training,
)

EXAMPLES, STEPS, STEPS_PER_EPOCH, WARMUP_STEPS, SEED = 20, 12, 4, 5, 7


def lr_of(name: str, step: int, settings: Recipe) -> float:
    """Released: one factor for the head, two more for the top layer, one more for each below, and the embeddings."""
    if name.startswith("head."):
        power = 0
    elif ".layers." in name:
        power = CONFIG.hidden_layers + 1 - int(name.split(".")[2])
    else:
        power = CONFIG.hidden_layers + 2
    warmup = min(1, step / WARMUP_STEPS)
    return settings.lr * settings.layer_decay**power * (1 - step / STEPS) * warmup


def train_plainly(model: FineTunedElectra, processor: TextProcessor, settings: Recipe) -> int:
    """AdamW without bias correction, written out; returns how many gradients were clipped."""
    features = processor.features("train")
    weights = dict(model.named_parameters())
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    clipped = 0
    for step in range(STEPS):
        epoch, number = divmod(step, STEPS_PER_EPOCH)
        order = list(range(EXAMPLES))
        random.Random(f"{SEED}/{epoch}").shuffle(order)
        batch = [features[i] for i in order[settings.batch_size * number : settings.batch_size * (number + 1)]]
        examples = collate(batch, "cpu")
        logits = model.head(model.encode(examples)[examples.first_P])
        targets = torch.tensor([int(feature.target) for feature in batch])
        loss = F.cross_entropy(logits, targets, reduction=settings.batch_loss)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        clipped += int(norm > 1)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, 1 / float(norm))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                decay = 0.0 if "bias" in name or "layer_norm" in name else settings.weight_decay
                update = first[name] / (second[name].sqrt() + 1e-6) + decay * weight
                weight -= lr_of(name, step, settings) * update
    return clipped


@pytest.mark.parametrize(("batch_loss", "scale"), [("sum", 0.1), ("mean", 1.0)])
def test_updates_are_the_definition(tmp_path: Path, batch_loss: str, scale: float) -> None:
    """With gradients on both sides of the norm that they are clipped to."""
    settings = recipe(epochs=3, batch_size=6, lr=1e-2, dropout=0.0, weight_decay=0.1, warmup_fraction=0.4,
                      batch_loss=batch_loss)  # fmt: skip
    config = CONFIG.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    rows = [{"id": str(n), "a": "abc"[n % 3] * (1 + n % 5), "b": "d", "label": "xy"[n % 2]} for n in range(EXAMPLES)]
    processor = TextProcessor(make_task(tmp_path, rows, "pair"), settings, Letters())  # type: ignore[arg-type]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = FineTunedElectra(config, 40, select_kernels("torch"), processor.head(config))
        weights = dict(model.named_parameters())
        with torch.no_grad():
            weights["discriminator.layers.1.feed_forward_layer_norm.weight"].mul_(scale)  # and so the head's gradient
            weights["head.output.weight"].mul_(2 * scale)
        models.append(model)
    ours, plain = models
    run = FineTuning(ours, processor, processor.features("train"), settings, SEED, "cpu")
    assert run.run(PartialState(tmp_path / "none", ""), lambda: False)
    assert (run.plan.steps, run.plan.warmup_steps) == (STEPS, WARMUP_STEPS)
    clipped = train_plainly(plain, processor, settings)
    assert 0 < clipped < STEPS, clipped
    weights = dict(plain.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_gradient_of_the_sum_is_what_is_clipped_unless_told_otherwise() -> None:
    assert recipe().batch_loss == "sum"
    assert recipe(batch_loss="mean").batch_loss == "mean"


def test_tagging_reads_the_first_token_of_each_word_of_each_example(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "a": ["ab", "c"], "label": ["B-X", "O"]},
        {"id": "2", "a": ["d", "ef", "g"], "label": ["O", "B-Y", "O"]},
    ]
    settings = recipe("tagging")
    processor = TaggingProcessor(make_task(tmp_path, rows, "tagging"), settings, Letters())  # type: ignore[arg-type]
    features = processor.features("train")
    examples = collate(features, "cpu")
    assert examples.token_types_T.tolist() == [1] * (5 + 6)
    head = processor.head(CONFIG).train()
    assert head.dropout.p == 0.0
    torch.manual_seed(0)
    hidden_TH = torch.randn(len(examples.token_ids_T), CONFIG.hidden_size)
    logits = head.output(hidden_TH[[1, 3, 5 + 1, 5 + 2, 5 + 4]])
    tags = ["B-X", "B-Y", "O"]
    found = processor.outputs(head, hidden_TH, examples, features)
    expected = [tags[number] for number in logits.argmax(1)]
    assert found == [expected[:2], expected[2:]]
    targets = torch.tensor([tags.index(tag) for row in rows for tag in row["label"]])
    loss = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(processor.loss(head, hidden_TH, examples, features), loss)


def test_predictions_stand_in_the_order_of_the_examples(tmp_path: Path) -> None:
    model, _, processor = training(tmp_path, recipe())

    class Numbers(TextProcessor):
        def outputs(self, head, hidden_TH, examples, features) -> list:
            return [feature.example for feature in features]

    processor.__class__ = Numbers
    features = processor.features("dev")
    assert len({len(feature) for feature in features}) > 1
    assert predict(model, processor, features, recipe(), "cpu") == list(range(len(features)))


def test_heads_start_glorot_uniform_and_drop_as_they_are_told() -> None:
    torch.manual_seed(0)
    head = LinearHead(CONFIG, 500, 0.25)
    bound = (6 / (CONFIG.hidden_size + 500)) ** 0.5
    weight = head.output.weight.detach()
    assert weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not head.output.bias.any()
    dropped = head.dropout(torch.ones(400, CONFIG.hidden_size))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert (head(torch.ones(400, CONFIG.hidden_size)).std(0) > 0).all()
    undropped = LinearHead(CONFIG, 500, 0.0)(torch.ones(400, CONFIG.hidden_size))
    torch.testing.assert_close(undropped, undropped[:1].expand_as(undropped))


def test_scores_of_starts_count_in_candidates(tmp_path: Path) -> None:
    processor = span_processor(tmp_path, [question(1, "ab cd ef gh ijk", "d")])
    spans = Spans(
        start_PK=torch.tensor([[4, 6]]),
        start_score_PK=torch.tensor([[-0.1, -5.0]]),
        end_PKK=torch.tensor([[[5, 6], [6, 7]]]),
        end_score_PKK=torch.tensor([[[-2.0, -3.0], [-0.1, -0.2]]]),
        null_score_P=torch.tensor([1.0]),
    )
    found = processor._candidates(spans, 0, processor.features("dev")[0])
    assert found.scores_K.tolist() == pytest.approx([-2.1, -3.1, -5.1, -5.2])
    assert found.first_K.tolist() == [0, 0, 2, 2]
    assert found.last_K.tolist() == [1, 2, 2, 3]
    assert found.null_score == 1.0


def test_the_simple_heads_null_score_is_against_the_best_span(tmp_path: Path) -> None:
    processor = span_processor(tmp_path, [question(1, "abc", "b")], span_head="simple")
    outcome = processor.outcome("dev", processor.features("dev"), [candidates([(3.0, 1, 1)], 1.0)])
    assert json.loads(outcome.files["null_odds.json"]) == {"1": -2.0}


def test_what_is_dropped_depends_on_seed_and_step(tmp_path: Path) -> None:
    """torch's generator on a CPU takes 32 bits of a seed: seeds that differ above them drop the same."""
    drawn = {}
    for seed in (1, 2):
        model, run, _ = training(tmp_path, recipe(epochs=1, dropout=0.5), seed)
        model.head.dropout.register_forward_hook(lambda *a, s=seed: drawn.setdefault(s, []).append(a[2] == 0))  # type: ignore
        for _ in range(2):
            run._train_step()
    masks = [mask[:8] for seed in (1, 2) for mask in drawn[seed]]
    assert all(not torch.equal(one, other) for n, one in enumerate(masks) for other in masks[:n])
