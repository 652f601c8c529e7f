"""Whatever the corpora, the batch and the number of processes: properties of the order, on drawn cases."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.order import MIXTURE_PERIOD_ROWS, Mixture, MixtureOrder, RowOrder, permute

FEW = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEEDS = st.integers(0, 2**31 - 1)
ROW_ORDERS = st.builds(
    lambda num_rows, block_rows, window_blocks: RowOrder(num_rows, block_rows, window_blocks),
    st.integers(1, 400), st.integers(1, 60), st.integers(1, 12) | st.just(2**64),
)  # fmt: skip
CORPORA = st.lists(st.tuples(ROW_ORDERS, st.floats(0.01, 100)), min_size=1, max_size=6)


def mixture(seed: int, corpora: list[tuple[RowOrder, float]]) -> MixtureOrder:
    return MixtureOrder(seed, [order for order, _ in corpora], [weight for _, weight in corpora])


@FEW
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(num_items, key):
    items = permute(np.arange(num_items), num_items, np.uint64(key))
    assert np.array_equal(np.sort(items), np.arange(num_items))


@FEW
@given(ROW_ORDERS, st.integers(0, 2**64 - 1))
def test_a_two_level_order_is_a_bijection_whose_windows_hold_their_stretches(order, key):
    rows = order.rows_at(np.arange(order.num_rows), np.uint64(key))
    assert np.array_equal(np.sort(rows), np.arange(order.num_rows))
    begin = 0
    for window in range(order.num_windows):
        stretches = order.stretches(window, np.uint64(key))
        inside = np.concatenate([np.arange(*stretch) for stretch in stretches])
        assert np.array_equal(np.sort(rows[begin : begin + len(inside)]), np.sort(inside))
        begin += len(inside)
    assert begin == order.num_rows


@FEW
@given(SEEDS, CORPORA, st.integers(0, 3))
def test_an_epoch_of_a_corpus_holds_each_row_once(seed, corpora, epoch):
    order = mixture(seed, corpora)
    length = max(
        int((epoch + 1) * rows.num_rows / share) for (rows, _), share in zip(corpora, order.shares, strict=True)
    )
    found = order.rows_at(np.arange(min(length, 200_000) + MIXTURE_PERIOD_ROWS))
    for number, (rows, _) in enumerate(corpora):
        of_epoch = found[2][(found[0] == number) & (found[1] == epoch)]
        assert len(of_epoch) <= rows.num_rows
        assert len(np.unique(of_epoch)) == len(of_epoch)
        assert length > 200_000 or len(of_epoch) == rows.num_rows


@FEW
@given(SEEDS, CORPORA, st.integers(0, 10**9))
def test_any_1024_positions_are_mixed_by_weight_to_a_row(seed, corpora, begin):
    weights = np.asarray([weight for _, weight in corpora])
    shares = 1024 * weights / weights.sum()
    counts = np.bincount(mixture(seed, corpora).rows_at(begin + np.arange(1024))[0], minlength=len(corpora))
    if shares.min() >= 1:
        assert np.abs(counts - shares).max() < 1
    assert counts.min() >= 1


@FEW
@given(SEEDS, CORPORA, st.integers(1, 8), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_every_number_of_processes_reads_the_same_rows_in_the_same_order(
    seed, corpora, world_size, micro_batches, micro_batch_rows, step
):
    """Rank r of w runs the micro-batches r, r + w, r + 2w, … of a step."""
    global_batch = micro_batches * micro_batch_rows
    whole = np.stack(mixture(seed, corpora).rows_at(step * global_batch + np.arange(global_batch)))
    gathered = np.full_like(whole, -1)
    for rank in range(world_size):
        order = mixture(seed, corpora)
        for number in range(rank, micro_batches, world_size):
            here = slice(number * micro_batch_rows, (number + 1) * micro_batch_rows)
            assert (gathered[:, here] == -1).all()
            gathered[:, here] = np.stack(order.rows_at(step * global_batch + np.arange(here.start, here.stop)))
    assert np.array_equal(gathered, whole)


@FEW
@given(SEEDS, CORPORA, st.integers(0, 10**5), st.integers(1, 300))
def test_windows_are_those_that_the_rows_lie_in(seed, corpora, first, count):
    order = mixture(seed, corpora)
    found = np.stack(order.rows_at(first + np.arange(count)), axis=1)
    for number, windows in enumerate(order.windows_at(first, count)):
        inside = set()
        for window in windows:
            epoch, stretches = order.stretches(number, window)
            inside |= {(epoch, row) for begin, end in stretches.tolist() for row in range(begin, end)}
        rows = {(epoch, row) for corpus, epoch, row in found.tolist() if corpus == number}
        assert rows <= inside
        assert len(windows) <= max(1, len(rows))


@FEW
@given(SEEDS, CORPORA, st.data(), st.integers(0, 5000))
def test_other_weights_go_on_with_the_rows_that_were_not_read(seed, corpora, data, position):
    count = len(corpora)
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count))
    orders, before = [order for order, _ in corpora], mixture(seed, corpora)
    read = Mixture([weight for _, weight in corpora]).rows_at(position).tolist()
    after = MixtureOrder(seed, orders, weights, read, range(count))
    assert after.first == position
    positions = np.arange(position + 2 * MIXTURE_PERIOD_ROWS)
    first, second = before.rows_at(positions[:position]), after.rows_at(positions[position:])
    corpus, epoch, row = (np.concatenate(both) for both in zip(first, second, strict=True))
    for number, order in enumerate(orders):
        drawn = (epoch * order.num_rows)[corpus == number]
        assert (np.diff(drawn) >= 0).all()
        visits = np.stack([epoch[corpus == number], row[corpus == number]])
        assert visits.shape[1] == np.unique(visits, axis=1).shape[1]
        assert np.array_equal(drawn, np.arange(len(drawn)) // order.num_rows * order.num_rows)


@FEW
@given(SEEDS, CORPORA, st.integers(0, 10**6))
def test_equal_weights_go_on_as_if_nothing_were(seed, corpora, position):
    orders, weights = [order for order, _ in corpora], [weight for _, weight in corpora]
    read = Mixture(weights).rows_at(position).tolist()
    after, positions = MixtureOrder(seed, orders, weights, read), position + np.arange(2000)
    assert all(map(np.array_equal, after.rows_at(positions), mixture(seed, corpora).rows_at(positions)))
    assert after.windows_at(position, 700) == mixture(seed, corpora).windows_at(position, 700)
