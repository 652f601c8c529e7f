"""Triton's attention against float64 and, with dropout, against the reference under the same draws.

Without a CUDA device its kernels run in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from model.kernels import attention_triton
from model.kernels.attention import Packing, reference_attention
from model.kernels.attention_triton import Blocks, blocks_of, triton_attention
from model.kernels.dropout import Dropout

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SMALL = dict.fromkeys(("forward", "query_gradient", "key_gradient"), Blocks(16, 16, 1, 1))
UNEVEN = {
    "forward": Blocks(32, 16, 1, 1),
    "query_gradient": Blocks(16, 32, 1, 1),
    "key_gradient": Blocks(32, 16, 1, 1),
}
CASES = [  # rows, heads, head size, lengths of a row's pieces
    (1, 1, 8, (1,)),
    (2, 3, 16, (7,)),
    (2, 2, 32, (5, 1, 27)),
    (1, 1, 64, (50,)),
    (2, 1, 64, (3, 26, 11)),
    (1, 1, 16, (1,) * 18),
    (1, 1, 128, (12, 9)),
]
SEVERAL = (2, 2, 16, (5, 1, 12))
"""Several of each, as few as that takes, for what does not depend on how many."""


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter holds bf16 as uint16 and multiplies these integers; here it multiplies the numbers."""
    if not INTERPRETED:
        return
    assert isinstance(attention_triton._forward, InterpretedFunction), "triton was imported before TRITON_INTERPRET"
    original = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest)
    )


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Sets the blocks of all kernels; small ones unless a test calls it, so that short rows have several."""

    def choose(chosen):
        monkeypatch.setattr(attention_triton, "blocks_of", lambda dtype, size: chosen)

    choose(SMALL)
    return choose


def inputs(case, dtype=torch.float32, seed=0):
    rows, heads, size, lengths = case
    draw = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, sum(lengths), 3, heads, size, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
    if rows == 1:
        return qkv, Packing.of_lengths(lengths, DEVICE)
    pieces = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    turned = len(lengths) - 1 - pieces.flip(0)  # each row has its own borders
    return qkv, Packing(torch.stack([pieces, turned, *[pieces] * (rows - 2)]).to(DEVICE))


def make_dropout(probability=0.2):
    return Dropout(probability, torch.tensor([7, 0xF00DCAFE], device=DEVICE)[1])


def with_gradient(attention, qkv, packing, dropout=None):
    leaf = qkv.detach().requires_grad_()
    output = attention(leaf, packing, dropout)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().view(output.shape)
    output.backward(weights.to(output))
    return output.detach(), leaf.grad


def agree(found, expected, tolerance):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("probability", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_output_and_gradient_agree_with_float64(dtype, case, probability):
    qkv, packing = inputs(case, dtype)
    dropout = make_dropout(probability) if probability else None
    found = with_gradient(triton_attention, qkv, packing, dropout)
    expected = with_gradient(reference_attention, qkv.double(), packing, dropout)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        agree(one, other, TOLERANCES[dtype])


@pytest.mark.parametrize("blocks_name", ["small", "uneven", "small heads", "large heads", "fp32"])
def test_blocks_change_nothing_but_rounding(blocks, blocks_name):
    """Those of a GPU's table too, whose blocks are longer than the row or do not divide it."""
    table = {
        "small": SMALL,
        "uneven": UNEVEN,
        "small heads": blocks_of(torch.bfloat16, 64),
        "large heads": blocks_of(torch.bfloat16, 128),
        "fp32": blocks_of(torch.float32, 64),
    }
    qkv, packing = inputs((1, 1, 16, (45, 1, 30, 24)), torch.float16)
    blocks(table[blocks_name])
    found = with_gradient(triton_attention, qkv, packing, make_dropout())
    expected = with_gradient(reference_attention, qkv.double(), packing, make_dropout())
    for one, other in zip(found, expected, strict=True):
        agree(one, other, TOLERANCES[torch.float16])


@pytest.mark.parametrize("order", [(2, 0, 3, 1, 4), (0, 3, 2, 1, 4), (1, 0, 2, 3, 4), (4, 0, 1, 2, 3)], ids=str)
def test_views_give_the_same_and_are_not_copied(order):
    """Axes of ``qkv`` and of the incoming gradient lie in memory in another order, with room between them."""
    qkv, packing = inputs(SEVERAL)
    back = sorted(range(5), key=order.__getitem__)
    wider = torch.zeros_like(qkv.permute(order)).repeat(1, 1, 2, 1, 1)[:, :, : qkv.shape[order[2]]]
    view = wider.copy_(qkv.permute(order)).permute(back)
    assert not view.is_contiguous()
    leaf = view.requires_grad_()
    output = triton_attention(leaf, packing, make_dropout())
    if view.stride(-1) == 1:
        assert output.grad_fn.saved_tensors[0].data_ptr() == view.data_ptr()
    gradient = torch.randn(output.transpose(1, 2).shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    output.backward(gradient.transpose(1, 2))
    plain = qkv.clone().requires_grad_()
    expected = triton_attention(plain, packing, make_dropout())
    expected.backward(gradient.transpose(1, 2).contiguous())
    assert torch.equal(output, expected)
    assert torch.equal(leaf.grad, plain.grad)


def test_a_gradient_without_strides_is_taken():
    qkv, packing = inputs(SEVERAL)
    leaves = [qkv.clone().requires_grad_() for _ in range(2)]
    triton_attention(leaves[0], packing, None).sum().backward()
    reference_attention(leaves[1], packing, None).sum().backward()
    agree(leaves[0].grad, leaves[1].grad, 3e-6)


def test_large_scores_stay_finite():
    qkv, packing = inputs(CASES[4])
    qkv[:, :, :2] *= 200
    found = with_gradient(triton_attention, qkv, packing)
    expected = with_gradient(reference_attention, qkv.double(), packing)
    agree(found[0], expected[0], 1e-2)
    assert found[1].isfinite().all()


@pytest.mark.parametrize("probability", [0.0, 0.2])
def test_a_piece_depends_on_nothing_else_in_its_row(probability):
    """To the bit on what the others hold, to rounding on whether they are there."""
    lengths = (18, 20, 10)
    qkv, packing = inputs((1, 1, 16, lengths))
    dropout = make_dropout(probability) if probability else None
    other = qkv.clone()
    other[:, :18], other[:, 38:] = 3 * qkv[:, 20:38], -qkv[:, 20:30]
    for one, two in zip(
        with_gradient(triton_attention, qkv, packing, dropout),
        with_gradient(triton_attention, other, packing, dropout),
        strict=True,
    ):
        assert torch.equal(one[:, 18:38], two[:, 18:38])
        assert not torch.equal(one[:, :18], two[:, :18])
    alone = triton_attention(qkv[:, :18], Packing.of_lengths(lengths[:1], DEVICE), dropout)
    torch.testing.assert_close(triton_attention(qkv, packing, dropout)[:, :18], alone)


def test_blocks_of_other_pieces_are_not_visited():
    """What is not a number there would show: 0 times it is none either."""
    qkv, packing = inputs((1, 1, 16, (32, 16, 48)))
    expected = with_gradient(triton_attention, qkv, packing)
    qkv[:, 32:48] = torch.nan
    for found, wanted in zip(with_gradient(triton_attention, qkv, packing), expected, strict=True):
        assert found[:, 32:48].isnan().all()
        assert torch.equal(found[:, :32], wanted[:, :32])
        assert torch.equal(found[:, 48:], wanted[:, 48:])


def test_two_calls_are_equal_and_keys_matter():
    qkv, packing = inputs(SEVERAL, torch.bfloat16)
    first, second = (with_gradient(triton_attention, qkv, packing, make_dropout()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    another = Dropout(0.2, torch.tensor(8, device=DEVICE))
    assert not torch.equal(first[0], triton_attention(qkv, packing, another))


def test_no_matrix_of_scores_is_kept():
    qkv, packing = inputs(CASES[4])
    output = triton_attention(qkv.requires_grad_(), packing, make_dropout())
    kept = output.grad_fn.saved_tensors
    assert [tuple(x.shape) for x in kept] == [(2, 40, 3, 1, 64), (2, 40, 1, 64), (2, 1, 40)]
    assert kept[2].dtype == torch.float32


def test_float64_is_refused():
    with pytest.raises(AssertionError):
        triton_attention(*inputs(CASES[0], torch.float64), None)
