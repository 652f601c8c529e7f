"""The global order: a keyed bijection, weights held block by block, nothing remembered."""

import itertools

import numpy as np
import pytest

from data_shards.order import MIXTURE_BLOCK_ROWS, MixtureOrder, derive_key, mix64, permute


@pytest.mark.parametrize("num_items", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 4097, 65_537])
def test_permute_is_a_bijection(num_items):
    for key in (0, 1, 2**64 - 1):
        items = permute(np.arange(num_items), num_items, np.uint64(key))
        assert items.dtype == np.int64
        assert np.array_equal(np.sort(items), np.arange(num_items))


@pytest.mark.parametrize("num_items", [10**9, 2**40 + 1])
def test_permute_keeps_far_positions_apart_and_inside(num_items):
    positions = np.concatenate([np.arange(1000), num_items - 1 - np.arange(1000)])
    items = permute(positions, num_items, np.uint64(7))
    assert len(np.unique(items)) == len(positions)
    assert items.min() >= 0
    assert items.max() < num_items


def test_a_position_is_permuted_alike_alone_and_in_any_company():
    positions, keys = np.arange(600).reshape(20, 30), np.arange(600, dtype=np.uint64).reshape(20, 30) % 3
    items = permute(positions, 700, keys)
    assert items.shape == positions.shape
    for i, j in ((0, 0), (3, 7), (19, 29)):
        assert permute(positions[i, j], 700, keys[i, j]) == items[i, j]


def test_keys_and_positions_scatter():
    """Under another key, a position goes elsewhere; neighbours do not stay neighbours."""
    num_items = 5000
    orders = [permute(np.arange(num_items), num_items, np.uint64(key)) for key in range(20)]
    for a, b in itertools.pairwise(orders):
        assert (a == b).sum() < 12  # Poisson with mean 1
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / num_items**0.5
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 4 / num_items**0.5


def test_a_small_domain_reaches_every_order_about_equally():
    orders, counts = np.unique(
        [permute(np.arange(3), 3, mix64(key)) for key in range(3000)], axis=0, return_counts=True
    )
    assert len(orders) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 25.7  # chi-square with 5 degrees, p = 1e-4


def test_derived_keys_depend_on_each_part_and_their_order():
    keys = [derive_key(*parts) for parts in ((1, 2), (2, 1), (1, 3), (1,), (1, 2, 0), (0, 1, 2), (-1, 2))]
    assert len(set(map(int, keys))) == len(keys)


def test_pinned_values():
    """Stored runs resume on these: a change here is a change of every run's data order."""
    assert int(mix64(0)) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0
    assert int(derive_key(1, 2, 3)) == 0xD0734750FDE362B3
    assert permute(np.arange(8), 10, np.uint64(5)).tolist() == [5, 0, 2, 4, 1, 7, 6, 9]
    corpus, epoch, row = MixtureOrder(3, [10, 100], [1, 3]).rows_at(np.arange(5000, 5006))
    assert corpus.tolist() == [1, 0, 1, 1, 1, 1]
    assert epoch.tolist() == [37, 123, 37, 37, 37, 37]
    assert row.tolist() == [52, 0, 92, 0, 25, 36]


@pytest.mark.parametrize(("num_rows", "weights"), [([37], [2.0]), ([100, 7], [1, 1]), ([5000, 33, 1], [5, 2, 1])])
def test_every_epoch_holds_each_row_once_and_ends_before_the_next_begins(num_rows, weights):
    corpora, epochs, rows = MixtureOrder(3, num_rows, weights).rows_at(np.arange(6 * MIXTURE_BLOCK_ROWS))
    for corpus, count in enumerate(num_rows):
        epochs_of_corpus, rows_of_corpus = epochs[corpora == corpus], rows[corpora == corpus]
        whole = len(rows_of_corpus) // count
        assert whole >= 2
        assert np.array_equal(epochs_of_corpus, np.arange(len(rows_of_corpus)) // count)
        in_epochs = rows_of_corpus[: whole * count].reshape(whole, count)
        assert (np.sort(in_epochs, axis=1) == np.arange(count)).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    positions = np.arange(2 * MIXTURE_BLOCK_ROWS)
    first, second = (MixtureOrder(seed, [MIXTURE_BLOCK_ROWS], [1]).rows_at(positions)[2] for seed in (1, 2))
    assert (first == second).sum() < 20
    assert (first[:MIXTURE_BLOCK_ROWS] == first[MIXTURE_BLOCK_ROWS:]).sum() < 20


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 1e-9], [1e-9, 1e9, 5], [1] * 37])
def test_every_block_holds_the_corpora_in_proportion_to_their_weights(weights):
    order = MixtureOrder(5, [10**6 + 3] * len(weights), weights)
    for block in (0, 1, 10**6):
        corpora = order.rows_at(block * MIXTURE_BLOCK_ROWS + np.arange(MIXTURE_BLOCK_ROWS))[0]
        counts = np.bincount(corpora, minlength=len(weights))
        shares = np.asarray(weights) / sum(weights) * MIXTURE_BLOCK_ROWS
        assert counts.sum() == MIXTURE_BLOCK_ROWS
        assert counts.min() >= 1
        assert np.abs(counts - np.maximum(shares, 1)).max() < 1 + (shares < 1).sum()


def test_a_position_means_the_same_row_however_it_is_asked_for():
    def order():
        return MixtureOrder(9, [123, 4567], [0.25, 0.75])

    positions = np.arange(3000, 9000)
    whole = np.stack(order().rows_at(positions))
    shuffled = np.random.default_rng(0).permutation(len(positions))
    assert np.array_equal(np.stack(order().rows_at(positions[shuffled])), whole[:, shuffled])
    one_order = order()
    parts = [np.stack(one_order.rows_at(part)) for part in np.split(positions, [1, 2, 999, 5000])]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
