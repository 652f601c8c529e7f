"""Dropout by keys: rate, independence, and the same mask wherever it is drawn and however often."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from model.batch import GlobalCounts
from model.kernels.dropout import (
    Dropout,
    dropout_at,
    dropout_keys,
    keep_mask,
    keep_rows_numpy,
    keeps,
    reference_dropout,
    torch_dropout,
)
from model.kernels.select import OPERATIONS

KEY = 0x9ABCDEF1
COUNTS = GlobalCounts(masked=100.0, tokens=1000.0)


def dropout(probability: float = 0.25, key: int = KEY) -> Dropout:
    return Dropout(probability, torch.tensor(key))


def by_definition(drop: Dropout, num_rows: int, num_columns: int) -> torch.Tensor:
    return keeps(drop, torch.arange(num_rows)[:, None], torch.arange(num_columns))


def hash32(h: int) -> int:
    """MurmurHash3's finaliser."""
    h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
    h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
    return h ^ h >> 16


def test_the_mask_is_the_one_computed_by_hand():
    """Stored runs resume on it: a change here is a change of every run's draws."""
    for row, column in itertools.product((0, 1, 5, 2**31 + 3, 2**32 - 1), (0, 1, 2, 511, 4097)):
        row_key = hash32(hash32(row * 0x9E3779B9 % 2**32) ^ KEY)
        word = hash32(hash32(column // 2 * 0x9E3779B9 % 2**32) ^ row_key)
        draw = word >> 16 if column % 2 else word % 65536
        for threshold in (draw, draw + 1):  # stays just so, and just not
            found = keeps(dropout(threshold / 65536), torch.tensor(row), torch.tensor(column))
            assert found.item() == (draw >= threshold)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_elements_drop_at_the_rate(probability):
    keep = keep_mask(dropout(probability), 2000, 500)
    rate = round(probability * 65536) / 65536
    assert abs(rate - probability) < 2**-16
    assert abs(float((~keep).double().mean()) - rate) < 4 * (rate * (1 - rate) / keep.numel()) ** 0.5
    for axis in (0, 1):  # no row and no column that all keys favour
        shares, size = (~keep).double().mean(axis), keep.shape[axis]
        spread = (rate * (1 - rate) / size) ** 0.5
        assert abs(float(shares.std()) / spread - 1) < 0.2
        assert abs(shares - rate).max() < 6 * spread + 1 / size


def test_nothing_and_everything_can_be_dropped():
    assert keep_mask(dropout(0.0), 300, 300).all()
    assert keep_mask(dropout(1.0), 300, 300).sum() < 10  # the highest of 65,536 draws stays: the scale is finite
    assert dropout(1.0).scale == 65536
    assert dropout_at(torch.arange(3), 1, 0.0) is dropout_at(None, 1, 0.5) is None


def assert_independent(one: torch.Tensor, other: torch.Tensor):
    """Both lists of draws have the same rate; their correlation is that of chance."""
    pair = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())
    assert abs(pair[0, 1]) < 4.5 / one.numel() ** 0.5


@pytest.mark.parametrize("probability", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 64])
def test_neighbours_in_rows_and_columns_are_independent(probability, distance):
    """Columns 2n and 2n + 1 share a word of random bits, rows and columns share parts of the hash."""
    keep = keep_mask(dropout(probability), 1001, 513)
    assert_independent(keep[distance:], keep[:-distance])
    assert_independent(keep[:, distance:], keep[:, :-distance])
    assert_independent(keep[distance:, distance:], keep[:-distance, :-distance])
    assert_independent(keep[distance:, :-distance], keep[:-distance, distance:])
    square = keep[:513]
    above = torch.ones(513, 513, dtype=torch.bool).triu(1)
    assert_independent(square[above], square.T[above])


@pytest.mark.parametrize("key", [KEY + 1, KEY ^ 1 << 31, KEY ^ 1 << 16, 0])
def test_keys_are_independent(key):
    one, other = keep_mask(dropout(), 1000, 300), keep_mask(dropout(key=key), 1000, 300)
    assert_independent(one, other)
    assert_independent(one[1:], other[:-1])
    assert_independent(one[:, 2:], other[:, :-2])


def test_three_elements_drop_together_as_often_as_chance_has_it():
    """Rows 2n and 2n + 1 with two columns of one word: no pattern in a block either."""
    dropped = ~keep_mask(dropout(0.5), 2000, 600)
    blocks = dropped.view(1000, 2, 300, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    counts = torch.bincount((blocks.long() * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16).double()
    expected = len(blocks) / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 44.3  # chi-square, 15 degrees, p = 1e-4


@pytest.mark.parametrize("num_columns", [1, 2, 3, 7, 64, 65, 513])
@pytest.mark.parametrize("num_rows", [1, 2, 1000])
def test_every_way_to_draw_a_mask_gives_the_same(num_rows, num_columns):
    for probability in (0.1, 0.5, 1.0):
        drop = dropout(probability)
        expected = by_definition(drop, num_rows, num_columns)
        assert torch.equal(keep_mask(drop, num_rows, num_columns), expected)
        # A wider tensor begins with the same columns, a longer one with the same rows.
        assert torch.equal(keep_mask(drop, num_rows + 3, num_columns + 1)[:num_rows, :num_columns], expected)
        numbers = torch.tensor([num_rows - 1, 0, 2**32 - 1])
        rows = keep_rows_numpy(drop, numbers.numpy().astype(np.uint32), num_columns)
        assert torch.equal(torch.from_numpy(rows), keeps(drop, numbers[:, None], torch.arange(num_columns)))


def test_masks_of_more_words_than_are_drawn_at_once():
    drop = dropout()
    for num_rows, num_columns in ((300, 1001), (3, 200_001)):
        assert torch.equal(keep_mask(drop, num_rows, num_columns), by_definition(drop, num_rows, num_columns))


def test_a_tensor_without_elements_has_a_mask():
    for shape in ((0, 5), (2, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        for apply in (reference_dropout, torch_dropout):
            out = apply(x, dropout())
            out.sum().backward()
            assert out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(40, 7), (3, 5, 33), (2, 3, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply", [reference_dropout, torch_dropout])
def test_forward_and_backward_drop_the_same(apply, shape, dtype):
    drop = dropout(0.3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    keep = by_definition(drop, x.numel() // shape[-1], shape[-1]).view(shape)
    out, again = apply(x, drop), apply(x, drop)
    assert torch.equal(out, again)
    expected = x.detach() * keep * (1 / (1 - drop.threshold / 65536))
    torch.testing.assert_close(out, expected)
    assert torch.equal(out == 0, ~keep)
    incoming = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, incoming)
    torch.testing.assert_close(gradient, incoming * keep * drop.scale)
    assert gradient.dtype == out.dtype == dtype
    assert apply(x, None) is x


def test_the_mean_is_kept():
    ones = torch.ones(1000, 1000)
    out = torch_dropout(ones, dropout(0.1))
    assert float(out.double().mean()) == pytest.approx(1.0, abs=4 * (0.1 / 0.9) ** 0.5 / 1000)


def test_every_use_has_a_key_of_its_own():
    keys = [
        dropout_keys(seed, network, 73, "cpu") for seed in (0, 1, 2**32, 2**63 - 1) for network in (0, 1)
    ]  # fmt: skip
    drawn = torch.cat(keys)
    assert len(set(drawn.tolist())) == len(drawn)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < 2**32
    assert torch.equal(dropout_keys(1, 0, 73, "cpu")[:10], dropout_keys(1, 0, 10, "cpu"))
    third = dropout_at(keys[0], 2, 0.5)
    assert third and third.key == keys[0][2] and third.probability == 0.5


def seen_dropouts(model, batch) -> list[Dropout]:
    """What every operation of a pass was told to drop."""
    seen: list[Dropout] = []

    def watched(operation):
        def call(*arguments):
            seen.extend(each for each in arguments if isinstance(each, Dropout))
            return operation(*arguments)

        return call

    kernels = dataclasses.replace(model.kernels, **{n: watched(getattr(model.kernels, n)) for n in OPERATIONS})
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    model(batch, COUNTS)
    return seen


@pytest.mark.parametrize("changes", [{}, {"sharing": "all", "generator_width": 1.0}, {"sharing": "gdes"}])
def test_no_two_places_of_a_pass_drop_alike(build_model, build_batch, changes):
    """Not even where one encoder is both networks."""
    model, batch = build_model(dropout=0.1, attention_dropout=0.2, **changes).train(), build_batch()
    uses = seen_dropouts(model, batch)
    assert len(uses) == 2 * (1 + 2 * 3)
    keys = {int(drop.key) for drop in uses}
    assert len(keys) == len(uses)
    assert sorted(drop.probability for drop in uses) == [0.1] * 10 + [0.2] * 4
    others = {int(drop.key) for drop in seen_dropouts(model, dataclasses.replace(batch, seed=batch.seed + 1))}
    assert not keys & others
    assert not seen_dropouts(model.eval(), batch)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("changes", [{}, {"name": "all_tokens_mlm"}, {"training": "adversarial"}])
def test_recomputed_activations_give_the_same_gradients(build_model, build_batch, kernels, changes):
    model = build_model(kernels, dropout=0.3, attention_dropout=0.3, **changes).train()
    batch, ran = build_batch(), []
    for encoder in (model.generator, model.discriminator):
        encoder.layers[0].register_forward_pre_hook(lambda *_: ran.append(0))
    found = []
    for checkpoints in (False, True):
        for encoder in (model.generator, model.discriminator):
            encoder.checkpoints_activations = checkpoints
        ran.clear()
        model.zero_grad(set_to_none=True)
        loss = model(batch, COUNTS)[0]
        torch.rand(7)  # whoever draws between the two passes
        loss.backward()
        assert len(ran) == (4 if checkpoints else 2)
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_nothing_is_recomputed_outside_training(build_model, build_batch):
    model, batch = build_model(dropout=0.3).eval(), build_batch()
    model.discriminator.checkpoints_activations = True
    ran = []
    model.discriminator.layers[0].register_forward_pre_hook(lambda *_: ran.append(0))
    model(batch, COUNTS)[0].backward()
    assert len(ran) == 1


def test_what_is_dropped_follows_from_the_seed_alone(build_model, build_batch):
    """So a micro-batch gives the same gradients in whatever process and after whatever others it runs."""
    model, batch = build_model(dropout=0.3, attention_dropout=0.3).train(), build_batch()
    twin = copy.deepcopy(model)
    for _ in range(2):
        model(build_batch(seed=7), COUNTS)
    torch.manual_seed(99)
    losses = [network(batch, COUNTS)[0] for network in (model, twin)]
    gradients = [
        torch.autograd.grad(loss, list(network.parameters()))
        for loss, network in zip(losses, (model, twin), strict=True)
    ]
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
