"""Every attention backend against plain loops and against the reference, forward and backward."""

import math

import pytest
import torch

from model.kernels.attention import ATTENTION, Packing, reference_attention
from model.kernels.select import select_kernels

SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 33, 16), (3, 1, 64, 8), (2, 4, 20, 64)]
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2}  # the reference's softmax is fp32
FUSED = [name for name in ATTENTION if name != "reference"]


def inputs(shape, dtype=torch.float32, seed=0, pieces=3):
    rows, _, length, _ = shape
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    packing = Packing(torch.randint(0, pieces, (rows, length), generator=draw).sort(1).values)
    return query, key, value, packing


def with_gradients(attention, query, key, value, packing):
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    output = attention(*leaves, packing, 0.0)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_one_computed_by_hand(name):
    query, key, value, packing = inputs((2, 2, 9, 4))
    found = ATTENTION[name](query, key, value, packing, 0.0)
    for row in range(2):
        for head in range(2):
            for t in range(9):
                seen = [s for s in range(9) if packing.pieces_BT[row, s] == packing.pieces_BT[row, t]]
                scores = [float(query[row, head, t].double() @ key[row, head, s].double()) / 2 for s in seen]
                total = sum(math.exp(score) for score in scores)
                expected = sum(
                    math.exp(score) / total * value[row, head, s].double()
                    for s, score in zip(seen, scores, strict=True)
                )
                torch.testing.assert_close(found[row, head, t].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_output_and_gradients_agree_with_the_reference(name, shape, dtype):
    arguments = inputs(shape, dtype)
    expected = with_gradients(reference_attention, *arguments)
    for found, wanted in zip(with_gradients(ATTENTION[name], *arguments), expected, strict=True):
        assert found.dtype == dtype
        assert found.shape == shape
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("name", FUSED)
def test_inputs_need_not_be_contiguous(name):
    """As the encoder hands them over: views of one product, heads before tokens."""
    *_, packing = inputs((2, 3, 12, 8))
    fused = torch.randn(2, 12, 3, 3, 8, generator=torch.Generator().manual_seed(1))
    views = fused.permute(2, 0, 3, 1, 4).unbind(0)
    assert not views[0].is_contiguous()
    torch.testing.assert_close(
        ATTENTION[name](*views, packing, 0.0), reference_attention(*(v.contiguous() for v in views), packing, 0.0)
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_large_scores_stay_finite(name):
    query, key, value, packing = inputs((2, 2, 16, 8))
    for found in with_gradients(ATTENTION[name], query * 200, key * 200, value, packing):
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ATTENTION)
def test_dropout_drops_probabilities_at_its_rate_and_scales_the_rest(name):
    """With the identity as values, the output is the probabilities themselves."""
    rate, length = 0.2, 64
    query, key, _, packing = inputs((8, 2, length, length), pieces=2)
    identity = torch.eye(length).expand(8, 2, -1, -1)
    kept = ATTENTION[name](query, key, identity, packing, 0.0)
    torch.manual_seed(3)
    found = ATTENTION[name](query, key, identity, packing, rate)
    allowed = packing.same_piece_B1TT.expand_as(found)
    assert not found[~allowed].any()
    dropped = (found == 0) & (kept > 0)
    count = int((kept > 0).sum())
    assert abs(int(dropped.sum()) / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    survived = allowed & ~dropped
    torch.testing.assert_close(found[survived], kept[survived] / (1 - rate), rtol=1e-4, atol=1e-7)
    for one, other in (((slice(0, 4),), (slice(4, 8),)), ((slice(None), 0), (slice(None), 1))):
        both = allowed[one] & allowed[other]
        together = (dropped[one] & dropped[other])[both].double().mean()
        assert abs(together - rate**2) < 4 * rate / int(both.sum()) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(found, ATTENTION[name](query, key, identity, packing, rate))


def test_a_packing_lets_tokens_of_the_same_piece_see_each_other():
    allowed = Packing(torch.tensor([[0, 0, 1], [0, 1, 2]])).same_piece_B1TT
    assert allowed.shape == (2, 1, 3, 3)
    assert allowed[0, 0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert torch.equal(allowed[1, 0], torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize(("backend", "chosen"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")])
def test_the_backend_that_is_chosen_is_named_with_a_reason(backend, chosen):
    kernels = select_kernels(backend)
    assert kernels.attention is ATTENTION[chosen]
    assert kernels.names == {"attention": chosen}
    assert backend in kernels.reason
