"""Fine-tuning heads and attention by piece, against plain twins: one example at a time, one product at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.encoder import gelu
from model.finetuning import Examples, FineTunedElectra, JointSpanHead, LinearHead, SimpleSpanHead, SpanTargets
from model.kernels.attention import Buckets, Packing, reference_attention, torch_attention
from model.kernels.dropout import Dropout
from model.kernels.select import select_kernels

CONFIG = ModelConfig(
    size="tiny", hidden_layers=2, hidden_size=32, attention_heads=2, feed_forward_size=64, embedding_size=24,
    max_positions=64, dropout=0.0, attention_dropout=0.0,
)  # type: ignore[call-arg]  # fmt: skip
VOCAB = 50
LENGTHS = (5, 17, 9, 9, 40, 2)


def make_examples(lengths: tuple[int, ...] = LENGTHS) -> Examples:
    generator = torch.Generator().manual_seed(1)
    token_ids_T = torch.randint(5, VOCAB, (sum(lengths),), generator=generator)
    types = [(torch.arange(length) >= max(1, length // 3)).long() for length in lengths]
    return Examples(token_ids_T, torch.cat(types), Packing.of_lengths(lengths))


def each(examples: Examples) -> list[Examples]:
    """The examples one by one."""
    ids, types = (t.split(examples.lengths) for t in (examples.token_ids_T, examples.token_types_T))
    return [Examples(i, t, Packing.of_lengths([len(i)])) for i, t in zip(ids, types, strict=True)]


def make_model(head: torch.nn.Module, backend: str = "torch") -> FineTunedElectra:
    torch.manual_seed(3)
    model = FineTunedElectra(CONFIG, VOCAB, select_kernels(backend), head)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (3, 3, 3), tuple(range(1, 30))])
@pytest.mark.parametrize("dropout", [None, Dropout(0.3, torch.tensor(5))], ids=["", "dropout"])
def test_attention_by_piece_is_attention_within_pieces(lengths: tuple[int, ...], dropout: Dropout | None) -> None:
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(1, sum(lengths), 3, 2, 8, generator=generator, requires_grad=True)
    packing = Packing.of_lengths(lengths)
    outputs = [attention(qkv, packing, dropout) for attention in (torch_attention, reference_attention)]
    torch.testing.assert_close(*outputs)
    weights = torch.randn(outputs[0].shape, generator=generator)
    torch.testing.assert_close(*(torch.autograd.grad((output * weights).sum(), qkv)[0] for output in outputs))


def test_buckets_hold_every_token_once_and_little_padding() -> None:
    lengths = [(7 * number) % 100 + 1 for number in range(64)]
    buckets = Buckets.of_lengths(lengths, "cpu")
    slots = torch.cat([slots_PL.flatten() for slots_PL in buckets.slots])
    assert torch.equal(slots[buckets.place_N], torch.arange(sum(lengths)))
    real = torch.cat([
        torch.ones(slots_PL.numel(), dtype=torch.bool) if real_PL is None else real_PL.flatten()
        for slots_PL, real_PL in zip(buckets.slots, buckets.is_real, strict=True)
    ])  # fmt: skip
    assert real[buckets.place_N].all()
    assert real.sum() == sum(lengths)
    assert sum(slots_PL.numel() for slots_PL in buckets.slots) < 1.34 * sum(lengths)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_is_drawn_from_torchs_generator(backend: str) -> None:
    config = CONFIG.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2})
    torch.manual_seed(3)
    model = FineTunedElectra(config, VOCAB, select_kernels(backend), LinearHead(config, 3, 0.1))
    examples = make_examples()
    for encode in (model.encode, model.encode_first):
        model.train()
        torch.manual_seed(0)
        first, other = encode(examples), encode(examples)
        assert not torch.equal(first, other)
        torch.manual_seed(0)
        assert torch.equal(encode(examples), first)
        model.eval()
        assert torch.equal(encode(examples), encode(examples))


def test_both_backends_drop_the_same() -> None:
    config = CONFIG.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2})
    encoded = []
    for backend in ("reference", "torch"):
        torch.manual_seed(3)
        model = FineTunedElectra(config, VOCAB, select_kernels(backend), LinearHead(config, 3, 0.1)).train()
        torch.manual_seed(0)
        encoded.append(model.encode(make_examples()))
    torch.testing.assert_close(*encoded)


def test_an_example_does_not_see_its_neighbours() -> None:
    model, examples = make_model(LinearHead(CONFIG, 3, 0.1)), make_examples()
    together_TH = model.encode(examples)
    alone_TH = torch.cat([model.encode(example) for example in each(examples)])
    torch.testing.assert_close(together_TH, alone_TH)
    reference = make_model(LinearHead(CONFIG, 3, 0.1), "reference")
    torch.testing.assert_close(reference.encode(examples), together_TH)
    logits_PC = model.head(together_TH[examples.first_P])
    first = torch.stack([model.head.output(model.encode(example)[0]) for example in each(examples)])
    torch.testing.assert_close(logits_PC, first)


def test_the_first_tokens_alone_are_those_of_all() -> None:
    model, examples = make_model(LinearHead(CONFIG, 3, 0.1)), make_examples()
    both = [model.encode_first(examples), model.encode(examples)[examples.first_P]]
    torch.testing.assert_close(*both)
    weights_PH = torch.randn(both[0].shape, generator=torch.Generator().manual_seed(5))
    parameters = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    gradients = [torch.autograd.grad((hidden_PH * weights_PH).sum(), parameters) for hidden_PH in both]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (3, 3, 3), (64,), (50, 15)])
def test_what_fills_a_row_up_changes_nothing(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; outputs, dropout and gradients are those of the examples alone."""
    config = CONFIG.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2})
    torch.manual_seed(3)
    model = FineTunedElectra(config, VOCAB, select_kernels("torch"), LinearHead(config, 3, 0.1))
    examples = make_examples(lengths)
    filled = examples.filled_up(64)
    assert len(filled.token_ids_T) % 64 == 0
    assert filled.positions_T.max() < max(lengths)
    assert filled.lengths[: len(lengths)] == lengths
    for name in ("encode", "encode_first"):
        found = []
        for as_row in (lambda examples: examples, lambda examples: examples.filled_up(64)):
            monkeypatch.setattr("model.finetuning._as_row", as_row)
            torch.manual_seed(4)
            hidden = getattr(model, name)(examples)
            logits = model.head(hidden)
            model.zero_grad()
            logits.square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([hidden, logits, torch.rand(1), *gradients])
        torch.testing.assert_close(*found)


def test_rows_are_filled_up_in_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples, seen = make_model(LinearHead(CONFIG, 3, 0.1)), make_examples(), []
    monkeypatch.setattr(model.discriminator, "forward", lambda x, packing, *_: seen.append(x.shape[1]) or x)
    model.encode(examples)
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(examples)
    assert seen == [sum(LENGTHS), 128]


def test_positions_count_within_an_example() -> None:
    examples = make_examples((2, 3))
    assert examples.positions_T.tolist() == [0, 1, 0, 1, 2]
    assert examples.first_P.tolist() == [0, 2]
    assert examples.by_example(torch.arange(5), -1).tolist() == [[0, 1, -1], [2, 3, 4]]


def targets_of(examples: Examples) -> SpanTargets:
    start = torch.tensor([length // 2 if length > 3 else 0 for length in examples.lengths])
    end = torch.tensor([length - 2 if length > 3 else 0 for length in examples.lengths])
    return SpanTargets(start, end, (start == 0).float())


def log_probabilities(logits_L: Tensor, example: Examples) -> Tensor:
    """Over segment B and [CLS], of one example."""
    allowed_L = (example.token_types_T == 1) | (torch.arange(len(logits_L)) == 0)
    return torch.where(allowed_L, logits_L, -torch.inf).log_softmax(0)


def joint_by_the_definition(head: JointSpanHead, hidden_LH: Tensor, example: Examples, start: int) -> tuple:
    """Start and end log probabilities and the logit of "impossible", of one example and one start."""
    start_L = log_probabilities(head.start(hidden_LH)[:, 0], example)
    both_L2H = torch.stack([torch.cat([hidden_LH[start], token_H]) for token_H in hidden_LH])
    end_L = log_probabilities(head.end(gelu(head.end_inner(both_L2H), "gelu"))[:, 0], example)
    mixed_H = sum(probability * token_H for probability, token_H in zip(start_L.exp(), hidden_LH, strict=True))
    inner_F = gelu(head.answerable_inner(torch.cat([hidden_LH[0], mixed_H])), "gelu")  # type: ignore[list-item]
    return start_L, end_L, head.answerable(inner_F)[0]


def test_joint_span_loss_is_the_definition() -> None:
    head = JointSpanHead(CONFIG, answerable_weight=0.5)
    model, examples = make_model(head), make_examples()
    targets = targets_of(examples)
    loss_P = head.loss(model.encode(examples), examples, targets)
    for number, example in enumerate(each(examples)):
        start, end = int(targets.start_P[number]), int(targets.end_P[number])
        start_L, end_L, logit = joint_by_the_definition(head, model.encode(example), example, start)
        answerable = F.binary_cross_entropy_with_logits(logit, targets.is_impossible_P[number])
        torch.testing.assert_close(loss_P[number], -(start_L[start] + end_L[end]) / 2 + 0.5 * answerable)


def test_the_beam_holds_the_best_starts_and_for_each_the_best_ends() -> None:
    head = JointSpanHead(CONFIG, answerable_weight=0.5)
    model, examples = make_model(head), make_examples()
    spans = head.spans(model.encode(examples), examples, beam_size=3)
    for number, example in enumerate(each(examples)):
        hidden_LH = model.encode(example)
        start_L, _, logit = joint_by_the_definition(head, hidden_LH, example, 0)
        torch.testing.assert_close(spans.null_score_P[number], logit)
        can_start = int(torch.isfinite(start_L).sum())
        best = start_L.topk(min(3, can_start))
        assert spans.start_PK[number, : len(best.indices)].tolist() == best.indices.tolist()
        torch.testing.assert_close(spans.start_score_PK[number, : len(best.values)], best.values)
        for k, start in enumerate(best.indices.tolist()):
            _, end_L, _ = joint_by_the_definition(head, hidden_LH, example, start)
            ends = end_L.topk(min(3, can_start))
            assert spans.end_PKK[number, k, : len(ends.indices)].tolist() == ends.indices.tolist()
            torch.testing.assert_close(spans.end_score_PKK[number, k, : len(ends.values)], ends.values)


def test_what_cannot_be_an_answer_scores_minus_infinity() -> None:
    for head in (JointSpanHead(CONFIG, 0.5), SimpleSpanHead(CONFIG)):
        examples = make_examples((6, 12))
        spans = head.spans(make_model(head).encode(examples), examples, beam_size=12)
        for number, length in enumerate(examples.lengths):
            is_allowed = {0, *range(max(1, length // 3), length)}
            finite_K = torch.isfinite(spans.start_score_PK[number])
            assert set(spans.start_PK[number][finite_K].tolist()) == is_allowed
            finite_KK = torch.isfinite(spans.end_score_PKK[number])
            assert set(spans.end_PKK[number][finite_KK].tolist()) == is_allowed


def test_simple_span_head_is_two_logits() -> None:
    head = SimpleSpanHead(CONFIG)
    model, examples = make_model(head), make_examples()
    targets = targets_of(examples)
    hidden_TH = model.encode(examples)
    loss_P, spans = head.loss(hidden_TH, examples, targets), head.spans(hidden_TH, examples, beam_size=2)
    for number, example in enumerate(each(examples)):
        logits_L2 = head.output(model.encode(example))
        start_L, end_L = (log_probabilities(logits_L2[:, side], example) for side in (0, 1))
        nll = -(start_L[targets.start_P[number]] + end_L[targets.end_P[number]]) / 2
        torch.testing.assert_close(loss_P[number], nll)
        torch.testing.assert_close(spans.null_score_P[number], logits_L2[0].sum())
        best = int(start_L.argmax())
        assert spans.start_PK[number, 0] == best
        torch.testing.assert_close(spans.start_score_PK[number, 0], logits_L2[best, 0])


def test_gradients_are_finite_with_masked_positions() -> None:
    for head in (JointSpanHead(CONFIG, 0.5), SimpleSpanHead(CONFIG)):
        model, examples = make_model(head).train(), make_examples()
        head.loss(model.encode(examples), examples, targets_of(examples)).sum().backward()
        gradients = [parameter.grad for name, parameter in model.named_parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_under_autocast_gradients_are_those_of_fp32_rounded(backend) -> None:
    """Vectors between layers stay fp32; products are in bf16, forward and backward."""
    examples, gradients = make_examples(), {}
    for enabled in (False, True):
        model = make_model(LinearHead(CONFIG, 3, 0.0), backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            hidden_TH = model.encode(examples)
            assert hidden_TH.dtype == torch.float32
            loss = model.head(hidden_TH[examples.first_P]).square().sum()
        loss.backward()
        gradients[enabled] = {name: p.grad for name, p in model.named_parameters()}
    for name, exact in gradients[False].items():
        found = gradients[True][name]
        assert found.dtype == torch.float32
        assert not torch.equal(found, exact), f"{name}: nothing was rounded"
        assert (found - exact).norm() <= 0.05 * exact.norm(), name
