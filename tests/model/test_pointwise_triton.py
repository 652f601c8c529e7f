"""Triton's add_norm, bias_gelu and embed against the references in float64: on a GPU, else in Triton's interpreter."""

import pytest
import torch

from model.kernels.dropout import Dropout, keep_mask
from model.kernels.embedding import reference_embed
from model.kernels.embedding_triton import _table_gradient, triton_embed
from model.kernels.gelu import reference_bias_gelu
from model.kernels.gelu_triton import triton_bias_gelu
from model.kernels.layer_norm import reference_add_norm
from model.kernels.layer_norm_triton import sum_partials, triton_add_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # the interpreter truncates to bf16
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def drawn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(DEVICE)


def dropout_of(probability, key=987654321):
    return Dropout(probability, torch.tensor(key, device=DEVICE)) if probability else None


def with_gradients(operation, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = operation(*leaves)
    out.backward(drawn(*out.shape, seed=99).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_agrees(found, expected, dtype):
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=TOLERANCES[dtype] * scale)


def compare(ours, reference, leaves, dtype):
    """Agreement of outputs and gradients, and dtypes as those of the leaves; returns ours."""
    found = with_gradients(ours, leaves)
    assert [x.dtype for x in found] == [leaves[0].dtype, *(leaf.dtype for leaf in leaves)]
    assert_agrees(found, with_gradients(reference, [leaf.double() for leaf in leaves]), dtype)
    return found


def embedding_inputs(sizes=(40, 9, 2), rows=3, length=57, columns=48, dtype=torch.float32):
    """Tables, and indices half of which are one token, as [MASK] is."""
    draw = torch.Generator().manual_seed(4)
    tables = [drawn(size, columns, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    indices = [torch.randint(0, size, (rows, length), generator=draw) for size in sizes]
    indices[0][torch.rand(rows, length, generator=draw) < 0.5] = 4
    return tables, [index.to(DEVICE) for index in indices]


@DTYPES
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 100), (65, 384), (3, 1)], ids=str)
def test_add_norm_agrees_with_the_reference(shape, probability, dtype):
    x, residual = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    weight, bias = drawn(shape[-1], seed=2), drawn(shape[-1], seed=3)
    dropout, eps = dropout_of(probability), 1e-5
    found = compare(
        lambda x, r, w, b: triton_add_norm(x, r, w, b, eps, dropout),
        lambda x, r, w, b: reference_add_norm(x, r, w, b, eps, dropout),
        [x, residual, weight, bias],
        dtype,
    )
    if dropout and shape[-1] > 1:  # a single column has no gradient at all
        keep = keep_mask(dropout, x.numel() // shape[-1], shape[-1]).view(shape)
        assert torch.equal(found[1] != 0, keep & (found[2] != 0))


@DTYPES
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (65, 384), (3, 1), (2, 9, 1030)], ids=str)
def test_bias_gelu_agrees_with_the_reference(shape, approximate, dtype):
    compare(
        lambda x, b: triton_bias_gelu(x, b, approximate),
        lambda x, b: reference_bias_gelu(x, b, approximate),
        [drawn(*shape, dtype=dtype, scale=2), drawn(shape[-1], seed=1)],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize(("columns", "probability"), [(1, 0.0), (48, 0.3), (130, 0.3)])
def test_embed_agrees_with_the_reference(columns, probability, dtype):
    tables, indices = embedding_inputs(columns=columns, dtype=dtype)
    dropout = dropout_of(probability)
    compare(
        lambda a, b, c, w, s: triton_embed([a, b, c], indices, w, s, 1e-5, dropout),
        lambda a, b, c, w, s: reference_embed([a, b, c], indices, w, s, 1e-5, dropout),
        [*tables, drawn(columns, seed=7), drawn(columns, seed=8)],
        dtype,
    )


@pytest.mark.parametrize("sizes", [(6,), (6, 300), (6, 3, 2, 1, 5)], ids=len)
def test_embed_takes_one_to_five_tables_and_skips_those_without_gradient(sizes):
    tables, indices = embedding_inputs(sizes, rows=1, length=9, columns=16)
    weight, bias = drawn(16, seed=7), drawn(16, seed=8)
    learns = [i % 2 == 0 for i in range(len(sizes))]
    leaves = [table.clone().requires_grad_(needed) for table, needed in zip(tables, learns, strict=True)]
    wide = [table.double().requires_grad_(needed) for table, needed in zip(tables, learns, strict=True)]
    found = triton_embed(leaves, indices, weight, bias, 1e-12, None)
    expected = reference_embed(wide, indices, weight.double(), bias.double(), 1e-12, None)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_agrees([found.detach()], [expected.detach()], torch.float32)
    for leaf, wanted, needed in zip(leaves, wide, learns, strict=True):
        assert (leaf.grad is None) == (not needed)
        if needed:
            assert_agrees([leaf.grad], [wanted.grad], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 2300])
@pytest.mark.parametrize("spread", [1, 3, 40000])
def test_table_gradients_are_exact_sums_however_runs_lie_in_chunks(rows, spread, dtype):
    """2300 rows of one index: a run over 36 chunks, more than the second kernel adds up at a time."""
    draw = torch.Generator().manual_seed(rows)
    index = torch.randint(0, spread, (rows,), generator=draw).to(DEVICE)
    d_total = torch.randint(-1, 2, (rows, 20), generator=draw).to(dtype).to(DEVICE)
    table = torch.empty(spread, 20, device=DEVICE)
    expected = torch.zeros_like(table).index_add_(0, index, d_total.float())
    assert torch.equal(_table_gradient(d_total, index, table), expected)


def test_sums_over_programs_are_exact_and_cut_at_the_right_place():
    partials = torch.arange(300 * 37, device=DEVICE).remainder(11).view(300, 37).float()
    weight, bias = torch.empty(30, device=DEVICE), torch.empty(7, device=DEVICE, dtype=torch.bfloat16)
    found = sum_partials(partials, weight, bias)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16]
    assert torch.equal(found[0], partials.sum(0)[:30])
    assert torch.equal(found[1], partials.sum(0)[30:].bfloat16())


def test_views_are_read_as_what_they_show():
    wide, gain, bias, dropout = drawn(6, 40, 50), drawn(64, seed=1), drawn(32, seed=2), dropout_of(0.2)

    def of_views(add_norm, bias_gelu):
        def operation(wide, gain, bias):
            x, residual = wide[:, ::2, 3:35], wide[:, :32, 5:25].transpose(1, 2)
            assert not x.is_contiguous() and not residual.is_contiguous()
            normalized = add_norm(x, residual, gain[::2], bias, 1e-5, dropout)
            return bias_gelu(normalized.transpose(0, 1), gain[::2], False).transpose(1, 2)

        return operation

    ours, reference = of_views(triton_add_norm, triton_bias_gelu), of_views(reference_add_norm, reference_bias_gelu)
    compare(ours, reference, [wide, gain, bias], torch.float32)

    tables, indices = embedding_inputs(columns=32)
    by_column = [x.t().contiguous().t() for x in (*tables, *indices)]
    assert not any(x.is_contiguous() for x in by_column)
    expected = triton_embed(tables, indices, bias, bias, 1e-5, dropout)
    assert torch.equal(triton_embed(by_column[:3], by_column[3:], bias, bias, 1e-5, dropout), expected)


def test_no_rows_give_zero_gradients():
    weight, bias = drawn(8).requires_grad_(), drawn(8, seed=1).requires_grad_()
    x, table = drawn(2, 0, 8).requires_grad_(), drawn(5, 8).requires_grad_()
    none = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    for out in (
        triton_add_norm(x, x, weight, bias, 1e-5, dropout_of(0.1)),
        triton_bias_gelu(x, bias, False),
        triton_embed([table], [none], weight, bias, 1e-5, dropout_of(0.1)),
    ):
        assert out.shape == (2, 0, 8)
        leaves = [leaf for leaf in (x, weight, bias, table) if leaf.grad is None]
        gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        assert all(not gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_values_and_constant_rows_stay_finite(dtype):
    x = drawn(5, 100, dtype=dtype, scale=1e4).clamp(-2e4, 2e4)
    rows = torch.stack([torch.full((64,), value, dtype=dtype, device=DEVICE) for value in (0, 3, -1e4)])
    for values in (x, rows):
        weight, bias = drawn(values.shape[-1], seed=2), drawn(values.shape[-1], seed=3)
        for dropout in (None, dropout_of(0.1)):
            operation = lambda x, r, w, b, dropout=dropout: triton_add_norm(x, r, w, b, 1e-12, dropout)  # noqa: E731
            found = with_gradients(operation, [values, values, weight, bias])
            assert all(gradient.isfinite().all() for gradient in (found[0], *found[3:]))
            assert dropout is None or found[0].float().std() > 0.3
    expected = bias.to(dtype).expand(3, -1)
    torch.testing.assert_close(triton_add_norm(rows, rows, weight, bias, 1e-12, None), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_large_values_is_the_identity_or_zero(approximate):
    x = torch.tensor([[-1e4, -30.0, 0.0, 30.0, 1e4]], device=DEVICE)
    out, d_x, _ = with_gradients(lambda x, b: triton_bias_gelu(x, b, approximate), [x, torch.zeros_like(x[0])])
    gradient = drawn(1, 5, seed=99)
    torch.testing.assert_close(out, x.clamp(min=0))
    torch.testing.assert_close(d_x, gradient * torch.tensor([0, 0, 0.5, 1, 1], device=DEVICE))


def test_narrow_gains_get_gradients_in_their_dtype():
    x, weight, bias = drawn(9, 20, dtype=torch.bfloat16), drawn(20, dtype=torch.bfloat16), drawn(20, seed=1)
    compare(
        lambda x, w, b: triton_add_norm(x, x, w, b, 1e-5, None),
        lambda x, w, b: reference_add_norm(x, x, w, b, 1e-5, None),
        [x, weight, bias],
        torch.bfloat16,
    )


def test_results_repeat_to_the_bit():
    tables, indices = embedding_inputs(columns=40, dtype=torch.bfloat16)
    weight, bias, dropout = drawn(40, seed=7), drawn(40, seed=8), dropout_of(0.1)
    x = drawn(3, 57, 40, dtype=torch.bfloat16)

    def everything(a, b, c, weight, bias):
        embedded = triton_embed([a, b, c], indices, weight, bias, 1e-12, dropout)
        return triton_add_norm(triton_bias_gelu(x, bias, False), embedded, weight, bias, 1e-12, dropout)

    first, second = (with_gradients(everything, [*tables, weight, bias]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
