"""Every backend of attention, LayerNorm, GELU and embedding against plain loops and against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.kernels.attention import ATTENTION, Packing, reference_attention
from model.kernels.dropout import Dropout
from model.kernels.embedding import EMBED, reference_embed
from model.kernels.gelu import BIAS_GELU, reference_bias_gelu
from model.kernels.layer_norm import ADD_NORM, layer_norm, reference_add_norm, reference_layer_norm

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 33, 2, 16), (3, 64, 1, 8), (2, 20, 4, 64)]  # (B, T, H, D)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2}  # the reference's softmax is fp32
COLUMNS = [7, 64, 129]
DROPOUTS = [None, Dropout(0.3, torch.tensor(77))]


def draw(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(shape, dtype=torch.float32, seed=0, pieces=3):
    """Queries, keys and values of rows with some pieces."""
    rows, length, heads, size = shape
    pieces_BT = torch.randint(0, pieces, (rows, length), generator=torch.Generator().manual_seed(seed)).sort(1).values
    return draw((rows, length, 3, heads, size), dtype, seed), Packing(pieces_BT)


def with_gradients(operation, leaves, *arguments):
    """The output, and what its weighted sum gives each leaf; ``operation`` takes the leaves, then the others."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    output = operation(*leaves, *arguments)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_agree(operation, reference, leaves, *arguments):
    expected = with_gradients(reference, leaves, *arguments)
    for found, wanted in zip(with_gradients(operation, leaves, *arguments), expected, strict=True):
        assert found.dtype == wanted.dtype == leaves[0].dtype
        assert found.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCES[leaves[0].dtype] * scale)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_one_computed_by_hand(name):
    qkv, packing = inputs((2, 9, 2, 4))
    query, key, value = qkv.double().unbind(2)
    found = ATTENTION[name](qkv, packing, None)
    for row in range(2):
        for head in range(2):
            for t in range(9):
                seen = [s for s in range(9) if packing.pieces_BT[row, s] == packing.pieces_BT[row, t]]
                scores = [float(query[row, t, head] @ key[row, s, head]) / 2 for s in seen]
                total = sum(math.exp(score) for score in scores)
                expected = sum(
                    math.exp(score) / total * value[row, s, head] for s, score in zip(seen, scores, strict=True)
                )
                torch.testing.assert_close(found[row, t, head].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_attention_and_its_gradients_agree_with_the_reference(name, shape, dtype, dropout):
    """With dropout too: both drop the same probabilities."""
    qkv, packing = inputs(shape, dtype)
    assert ATTENTION[name](qkv, packing, dropout).shape == shape
    assert_agree(ATTENTION[name], reference_attention, [qkv], packing, dropout)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_inputs_need_not_be_contiguous(name, dropout):
    """Nor need the gradient be, nor must the host know the lengths of the pieces."""
    qkv, packing = inputs((2, 12, 3, 8))
    strided = qkv.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    assert not strided.is_contiguous()
    assert torch.equal(strided, qkv)
    known = Packing(packing.pieces_BT, packing.lengths)
    expected = reference_attention(qkv, packing, dropout)
    for view, pieces in ((strided, packing), (qkv, known), (strided, known)):
        torch.testing.assert_close(ATTENTION[name](view, pieces, dropout), expected)
    found = [
        with_gradients(lambda x, attention=attention: attention(x, packing, dropout).mT, [qkv])[1]
        for attention in (ATTENTION[name], reference_attention)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ATTENTION)
def test_large_scores_stay_finite(name):
    qkv, packing = inputs((2, 16, 2, 8))
    qkv[:, :, :2] *= 200
    for found in with_gradients(ATTENTION[name], [qkv], packing, None):
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_drops_probabilities_at_its_rate_and_scales_the_rest(name):
    """With the identity as values, the output is the probabilities themselves."""
    dropout, length = Dropout(0.2, torch.tensor(3)), 64
    rate = dropout.threshold / 65536
    qkv, packing = inputs((8, length, 2, length), pieces=2)
    qkv[:, :, 2] = torch.eye(length)[:, None]
    kept, found = (ATTENTION[name](qkv, packing, each).transpose(1, 2) for each in (None, dropout))
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
    other_key = ATTENTION[name](qkv, packing, Dropout(0.2, torch.tensor(4))).transpose(1, 2)
    both_keys = ((other_key == 0) & dropped)[allowed].double().mean()
    assert abs(both_keys - rate**2) < 4 * rate / int(allowed.sum()) ** 0.5


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_drops_the_same_of_a_piece_wherever_it_starts_in_its_row(name):
    """Columns count within a piece, so that no backend needs to know the row; the queries' numbers say which rows."""
    qkv, _ = inputs((1, 12, 2, 12))
    qkv[:, :, 2] = torch.eye(12)[:, None]
    whole = Packing(torch.tensor([[0] * 4 + [1] * 8]))
    dropout = Dropout(0.5, torch.tensor(9))
    dropped_TH8 = ATTENTION[name](qkv, whole, dropout)[0, 4:, :, 4:] == 0
    short = Packing(torch.tensor([[0] * 4 + [1] * 7 + [2]]))
    assert torch.equal(ATTENTION[name](qkv, short, dropout)[0, 4:11, :, 4:11] == 0, dropped_TH8[:7, :, :7])


def test_a_packing_lets_tokens_of_the_same_piece_see_each_other():
    allowed = Packing(torch.tensor([[0, 0, 1], [0, 1, 2]])).same_piece_B1TT
    assert allowed.shape == (2, 1, 3, 3)
    assert allowed[0, 0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert torch.equal(allowed[1, 0], torch.eye(3, dtype=torch.bool))


def test_a_packing_knows_where_pieces_begin_and_end():
    packing = Packing(torch.tensor([[0, 0, 1, 1, 1, 4], [7, 8, 8, 8, 8, 8]]))
    assert packing.begin_BT.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1]]
    assert packing.end_BT.tolist() == [[2, 2, 5, 5, 5, 6], [1, 6, 6, 6, 6, 6]]
    assert packing.lengths == (2, 3, 1, 1, 5)
    row = Packing.of_lengths((2, 3, 1))
    assert torch.equal(row.begin_BT, packing.begin_BT[:1])
    assert row.lengths == row.known_lengths == (2, 3, 1)


@pytest.mark.parametrize("name", ADD_NORM)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_add_norm_and_its_gradients(name, columns, dtype, dropout):
    x, residual = draw((3, 5, columns), dtype, 1), draw((3, 5, columns), dtype, 2)
    weight_C, bias_C = 1 + 0.1 * draw(columns, dtype, 3), draw(columns, dtype, 4)
    assert_agree(ADD_NORM[name], reference_add_norm, [x, residual, weight_C, bias_C], 1e-2, dropout)
    if dropout is None:
        wanted = F.layer_norm((x + residual).double(), (columns,), weight_C.double(), bias_C.double(), 1e-2)
        found = ADD_NORM[name](x, residual, weight_C, bias_C, 1e-2, None).double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCES[dtype] * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", ADD_NORM)
def test_gradients_of_gain_and_shift_are_summed_in_fp32_in_half_precision(name):
    """Over as many rows as bf16 could not add up."""
    x, residual, incoming = (draw((4000, 16), torch.bfloat16, seed) for seed in range(3))
    results = []
    for dtype, operation in ((torch.bfloat16, ADD_NORM[name]), (torch.float64, reference_add_norm)):
        leaves = [torch.ones(16, dtype=dtype, requires_grad=True), torch.zeros(16, dtype=dtype, requires_grad=True)]
        output = operation(x.to(dtype), residual.to(dtype), *leaves, 1e-12, None)
        results.append(torch.autograd.grad(output, leaves, incoming.to(dtype)))
    for found, wanted in zip(*results, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 0.005


@pytest.mark.parametrize("normalize", [layer_norm, reference_layer_norm])
def test_statistics_of_layer_norm_are_fp32_in_half_precision(normalize):
    """Far from zero, where bf16 could not tell the columns' mean from its neighbours."""
    x = (500 + 4 * draw((64, 256))).bfloat16()
    ones, zeros = torch.ones(256), torch.zeros(256)
    wanted = F.layer_norm(x.double(), (256,), eps=1e-12)
    found = normalize(x, ones.bfloat16(), zeros.bfloat16(), 1e-12)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", BIAS_GELU)
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_bias_gelu_and_its_gradients(name, approximate, dtype):
    x, bias_F = 2 * draw((3, 5, 24), dtype, 1), draw(24, dtype, 2)
    assert_agree(BIAS_GELU[name], reference_bias_gelu, [x, bias_F], approximate)
    total = (x + bias_F).double()
    inner = math.sqrt(2 / math.pi) * (total + 0.044715 * total**3)
    share = (1 + inner.tanh()) / 2 if approximate else (1 + (total / math.sqrt(2)).erf()) / 2
    torch.testing.assert_close(
        BIAS_GELU[name](x, bias_F, approximate).double(), total * share, rtol=0, atol=4 * TOLERANCES[dtype]
    )


@pytest.mark.parametrize("name", EMBED)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_embed_and_its_gradients(name, columns, dtype, dropout):
    sizes = (40, 12, 2, 40, 12)  # a second pair, as of disentangled tables
    tables = [draw((size, columns), dtype, number) for number, size in enumerate(sizes)]
    rows = torch.Generator().manual_seed(5)
    indices = [torch.randint(0, size, (3, 12), generator=rows) for size in sizes]
    weight_E, bias_E = 1 + 0.1 * draw(columns, dtype, 6), draw(columns, dtype, 7)

    def of_leaves(embed):
        return lambda *leaves: embed(leaves[:5], indices, *leaves[5:], 1e-2, dropout)

    assert_agree(of_leaves(EMBED[name]), of_leaves(reference_embed), [*tables, weight_E, bias_E])
    if dropout is None and dtype != torch.bfloat16:
        total = sum(table[index] for table, index in zip(tables, indices, strict=True)).double()
        wanted = F.layer_norm(total, (columns,), weight_E.double(), bias_E.double(), 1e-2)
        found = EMBED[name](tables, indices, weight_E, bias_E, 1e-2, None)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
