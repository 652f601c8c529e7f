"""The global order of rows: a pure function of (seed, epoch, position).

Nothing is shuffled in memory or on disk. A keyed permutation of ``[0, n)``
answers "which row stands at position p" in constant time, so opening a corpus,
resuming in the middle and changing the number of processes cost nothing.

The permutation is a Feistel network over ``a * b >= n`` items, a and b about the
square root of n, with cycle walking: the few values that fall outside ``[0, n)``
are encrypted again until they fall inside (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.errors import DataSettingError

_ROUNDS = 6
_SMALL_DOMAIN, _ROUNDS_OF_SMALL = 256, 16  # halves of a few values mix more slowly
_M64 = 0xFFFFFFFFFFFFFFFF
MIXTURE_PERIOD_ROWS = 1024


def mix64(value: np.ndarray | np.uint64 | int) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): uint64 to uint64, bijective."""
    if np.ndim(value) == 0:
        return np.uint64(_mix64_of(int(value)))  # type: ignore[return-value]
    z = np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix64_of(value: int) -> int:
    """The same in Python's integers, which take a tenth of the time of NumPy's scalars."""
    z = (value + 0x9E3779B97F4A7C15) & _M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    return z ^ (z >> 31)


def derive_key(*parts: int) -> np.uint64:
    """Hashes integers into one 64-bit key, in order: ``derive_key(a, b) != derive_key(b, a)``."""
    key = 0
    for part in parts:
        key = _mix64_of(key ^ (int(part) & _M64))
    return np.uint64(key)


def permute(positions: np.ndarray, num_items: int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """Positions in ``[0, num_items)`` to items in ``[0, num_items)``, a bijection for each key.

    Args:
        positions: Integers of any shape.
        num_items: Size of the domain, at most 2^60.
        keys: One key, or one for each position.

    Returns:
        int64, shaped as ``positions``.
    """
    shape = np.shape(positions)
    values = np.array(positions, np.uint64).reshape(-1)
    keys = np.asarray(keys, np.uint64)
    keys = keys.reshape(1, 1) if keys.size == 1 else np.broadcast_to(keys, shape).reshape(1, -1)
    # The keys of all rounds at once: NumPy's cost of a call, not the arithmetic, is what counts here.
    num_rounds = _ROUNDS if num_items > _SMALL_DOMAIN else _ROUNDS_OF_SMALL
    round_keys = mix64(keys + np.arange(num_rounds, dtype=np.uint64)[:, None])
    a = math.isqrt(num_items - 1) + 1
    b = -(-num_items // a)
    values = _feistel(values, a, b, round_keys)
    outside = np.flatnonzero(values >= num_items)
    while len(outside):
        chosen_keys = round_keys if round_keys.shape[1] == 1 else round_keys[:, outside]
        values[outside] = _feistel(values[outside], a, b, chosen_keys)
        outside = outside[values[outside] >= num_items]
    return values.astype(np.int64).reshape(shape)


def _feistel(values: np.ndarray, a: int, b: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of ``[0, a * b)``: value = left * b + right; each round adds noise of one half to the other."""
    sizes = np.uint64(a), np.uint64(b)
    left = values // sizes[1]
    right = values - left * sizes[1]
    halves = [left, right]
    for number in range(len(round_keys)):
        target = number % 2
        noise = halves[1 - target] ^ round_keys[number]
        noise *= np.uint64(0xBF58476D1CE4E5B9)
        noise ^= noise >> np.uint64(32)
        noise *= np.uint64(0x94D049BB133111EB)
        noise >>= np.uint64(32)
        halves[target] = (halves[target] + noise) % sizes[target]
    return halves[0] * sizes[1] + halves[1]


@dataclass(frozen=True)
class RowOrder:
    """In which order the rows of a corpus are read in an epoch.

    With one window, any row may follow any other. With several, blocks of
    consecutive rows are permuted, a window takes the next ``window_blocks`` of them,
    and rows are permuted within the window, so that what is read in a while lies in
    a few long stretches of the disk. Rows after the last whole block belong to the
    last window.

    Attributes:
        num_rows: Rows of an epoch.
        block_rows: Rows of a block.
        window_blocks: Blocks of a window.
    """

    num_rows: int
    block_rows: int = 1
    window_blocks: int = 2**31

    @property
    def num_blocks(self) -> int:
        """Whole blocks of an epoch."""
        return self.num_rows // self.block_rows

    @property
    def num_windows(self) -> int:
        """Windows of an epoch; the last one may be shorter."""
        return max(1, -(-self.num_blocks // self.window_blocks))

    def rows_at(self, positions: np.ndarray, keys: np.ndarray | np.uint64) -> np.ndarray:
        """Positions of an epoch to its rows, int64, a bijection; ``keys`` are those of the epochs."""
        if self.num_windows == 1:
            return permute(positions, self.num_rows, keys)
        positions = np.asarray(positions, np.int64)
        keys = np.broadcast_to(np.asarray(keys, np.uint64), positions.shape)
        window_rows, last = self.window_blocks * self.block_rows, self.num_windows - 1
        windows = self.windows_of(positions)
        window_keys = mix64(keys ^ mix64(windows.astype(np.uint64) + np.uint64(1)))
        offsets = positions - windows * window_rows
        for chosen, size in ((windows < last, window_rows), (windows == last, self.num_rows - last * window_rows)):
            offsets[chosen] = permute(offsets[chosen], size, window_keys[chosen])
        slots = windows * self.window_blocks + offsets // self.block_rows
        rows = windows * window_rows + offsets  # right already for rows after the last whole block
        in_block = slots < self.num_blocks
        blocks = permute(slots[in_block], self.num_blocks, keys[in_block])
        rows[in_block] = blocks * self.block_rows + offsets[in_block] % self.block_rows
        return rows

    def windows_of(self, positions: np.ndarray) -> np.ndarray:
        """The window of each position of an epoch, int64."""
        if self.num_windows == 1:  # block_rows * window_blocks may be beyond int64 then
            return np.zeros(np.shape(positions), np.int64)
        return np.minimum(positions // (self.window_blocks * self.block_rows), self.num_windows - 1)

    def stretches(self, window: int, key: np.uint64) -> np.ndarray:
        """The rows of a window as stretches ``[begin, end)``, int64 ``(stretches, 2)``."""
        if self.num_windows == 1:
            return np.asarray([[0, self.num_rows]])
        begin = window * self.window_blocks
        slots = np.arange(begin, min(begin + self.window_blocks, self.num_blocks))
        first = permute(slots, self.num_blocks, key) * self.block_rows
        stretches = np.stack([first, first + self.block_rows], axis=1)
        if window == self.num_windows - 1:
            stretches = np.append(stretches, [[self.num_blocks * self.block_rows, self.num_rows]], axis=0)
        return stretches


class Mixture:
    """Which corpus each position of the training stream draws a row from, and how many it drew before.

    The corpora follow each other in a pattern of 1,024 positions that repeats, so
    any 1,024 consecutive positions hold each corpus equally often.
    """

    def __init__(self, weights: Sequence[float], rows_before: Sequence[int] = ()):
        """Shares of the corpora.

        Args:
            weights: They need not add up to 1.
            rows_before: Of each corpus, drawn by other weights; these hold from position ``sum(rows_before)`` on.

        Raises:
            DataSettingError: More corpora than positions in the pattern.
        """
        self._quotas = _quotas(weights)
        self._pattern = np.empty(MIXTURE_PERIOD_ROWS, np.int64)
        self._pattern[_bit_reversed(MIXTURE_PERIOD_ROWS)] = np.repeat(np.arange(len(weights)), self._quotas)
        self._earlier = np.empty_like(self._pattern)  # rows of the same corpus earlier in the pattern
        self._earlier[np.argsort(self._pattern, kind="stable")] = np.concatenate([np.arange(q) for q in self._quotas])
        self.first = sum(rows_before)
        self._offsets = np.zeros_like(self._quotas)
        if rows_before:
            self._offsets = np.asarray(rows_before, np.int64) - self.rows_at(self.first)

    @property
    def shares(self) -> list[float]:
        """The share of the rows that each corpus gets: its weight, to a row in 1,024."""
        return (self._quotas / MIXTURE_PERIOD_ROWS).tolist()

    def draws_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus of each position, and how many rows of it the stream has drawn before."""
        blocks, slots = positions // MIXTURE_PERIOD_ROWS, positions % MIXTURE_PERIOD_ROWS
        corpus = self._pattern[slots]
        return corpus, blocks * self._quotas[corpus] + self._earlier[slots] + self._offsets[corpus]

    def rows_at(self, position: int) -> np.ndarray:
        """Rows of each corpus that the stream has drawn before a position, int64 ``(corpora,)``."""
        blocks, slot = divmod(position, MIXTURE_PERIOD_ROWS)
        in_block = np.bincount(self._pattern[:slot], minlength=len(self._quotas))
        return blocks * self._quotas + in_block + self._offsets


class MixtureOrder:
    """Which row of which corpus stands at each position of the training stream.

    Within a corpus, the stream runs through the rows epoch by epoch, each epoch in an order of its own.
    """

    def __init__(
        self,
        seed: int,
        orders: Sequence[RowOrder],
        weights: Sequence[float],
        rows_before: Sequence[int] = (),
        numbers: Sequence[int] = (),
    ):
        """One order for each corpus.

        Args:
            seed: Of all orders.
            orders: Of each corpus.
            weights: As ``Mixture`` has them, and ``rows_before``.
            rows_before: See there.
            numbers: By which the corpora's orders are keyed; their places, if empty.
        """
        self._orders, self._mixture = list(orders), Mixture(weights, rows_before)
        self._keys = [derive_key(seed, 2, number) for number in numbers or range(len(weights))]
        self.first, self.shares = self._mixture.first, self._mixture.shares

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps stream positions to ``(corpus, epoch, row)``, each int64 and shaped as ``positions``."""
        positions = np.asarray(positions, np.int64)
        corpus, draw = self._mixture.draws_at(positions)
        epoch, row = np.empty_like(positions), np.empty_like(positions)
        for c in np.flatnonzero(np.bincount(corpus.reshape(-1), minlength=len(self._orders))):
            chosen = corpus == c if len(self._orders) > 1 else np.ones(corpus.shape, bool)
            epoch[chosen], position = np.divmod(draw[chosen], self._orders[c].num_rows)
            row[chosen] = self._orders[c].rows_at(position, self._epoch_keys(int(c), epoch[chosen]))
        return corpus, epoch, row

    def windows_at(self, first: int, count: int) -> list[range]:
        """For each corpus, the windows that ``count`` positions from ``first`` lie in, counted through the epochs.

        A corpus without a row there is in the window of its next one.
        """
        ranges = []
        drawn = zip(self._mixture.rows_at(first), self._mixture.rows_at(first + count), strict=True)
        for order, (before, after) in zip(self._orders, drawn, strict=True):
            epochs, positions = np.divmod([before, max(before, after - 1)], order.num_rows)
            begin, end = (epochs * order.num_windows + order.windows_of(positions)).tolist()
            ranges.append(range(begin, end + 1))
        return ranges

    def stretches(self, corpus: int, window: int) -> tuple[int, np.ndarray]:
        """Epoch of a window as ``windows_at`` counts them, and its rows as ``[begin, end)``, ``(stretches, 2)``."""
        order = self._orders[corpus]
        epoch, window = divmod(window, order.num_windows)
        return epoch, order.stretches(window, self._epoch_keys(corpus, np.asarray([epoch]))[0])

    def _epoch_keys(self, corpus: int, epochs: np.ndarray) -> np.ndarray:
        """Keys of epochs; a single one where they are all the same, which is cheaper to use."""
        if epochs.size and epochs.min() == epochs.max():
            epochs = epochs.reshape(-1)[:1]
        return mix64(self._keys[corpus] ^ epochs.astype(np.uint64))


def _bit_reversed(size: int) -> np.ndarray:
    """``[0, size)`` with the bits of each number reversed: any stretch of it is spread evenly; ``size`` is 2^k."""
    numbers = np.arange(1)
    while len(numbers) < size:
        numbers = np.concatenate([2 * numbers, 2 * numbers + 1])
    return numbers


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each corpus in the pattern, by largest remainder, at least one each; int64.

    Where every share is at least one row, a quota is less than one row from it. A corpus
    below that still gets a row; the others pay for it, always the one that is furthest
    above its share, so that the largest difference stays as small as it can be.
    """
    if len(weights) > MIXTURE_PERIOD_ROWS:
        raise DataSettingError(
            f"data.corpora: {len(weights):,} corpora, but at most {MIXTURE_PERIOD_ROWS:,} can be mixed, one row in "
            f"{MIXTURE_PERIOD_ROWS:,} being the least share; join small ones into one path"
        )
    share = np.asarray(weights, float) / sum(weights) * MIXTURE_PERIOD_ROWS
    quotas = np.maximum(np.floor(share), 1).astype(np.int64)
    while quotas.sum() != MIXTURE_PERIOD_ROWS:
        step = 1 if quotas.sum() < MIXTURE_PERIOD_ROWS else -1
        gap = (share - quotas) * step
        gap[quotas + step < 1] = -np.inf
        quotas[int(np.argmax(gap))] += step
    return quotas
