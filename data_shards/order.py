"""The global order of rows: a pure function of (seed, epoch, position).

Nothing is shuffled in memory or on disk. A keyed permutation of ``[0, n)``
answers "which row stands at position p" in constant time, so opening a corpus,
resuming in the middle and changing the number of processes cost nothing.

The permutation is a Feistel network over the next power of four with cycle
walking: a value that falls outside ``[0, n)`` is encrypted again until it falls
inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

import numpy as np

_ROUNDS = 6
MIXTURE_BLOCK_ROWS = 4096


def mix64(value: np.ndarray | np.uint64 | int) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): uint64 to uint64, bijective."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def derive_key(*parts: int) -> np.uint64:
    """Hashes integers into one 64-bit key, in order: ``derive_key(a, b) != derive_key(b, a)``."""
    key = 0
    for part in parts:
        key = int(mix64(key ^ (part & 0xFFFFFFFFFFFFFFFF)))
    return np.uint64(key)


def permute(positions: np.ndarray, num_items: int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """Positions in ``[0, num_items)`` to items in ``[0, num_items)``, a bijection for each key.

    Args:
        positions: Integers of any shape.
        num_items: Size of the domain.
        keys: One key, or one for each position.

    Returns:
        int64, shaped as ``positions``.
    """
    values = np.array(positions, np.uint64).reshape(-1)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), np.shape(positions)).reshape(-1)
    half_bits = np.uint64(max(1, (int(num_items - 1).bit_length() + 1) // 2))
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half_bits, keys[outside])
        outside = outside[values[outside] >= num_items]
    return values.astype(np.int64).reshape(np.shape(positions))


def _feistel(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_number in range(_ROUNDS):
        noise = mix64(right ^ mix64(keys + np.uint64(round_number))) & mask
        left, right = right, left ^ noise
    return (left << half_bits) | right


class MixtureOrder:
    """Which row of which corpus stands at each position of the training stream.

    Every block of 4,096 positions holds each corpus in proportion to its weight
    (to 1/4,096) in a keyed order. Within a corpus, the stream runs through the
    rows epoch by epoch, each epoch in a keyed order of its own.
    """

    def __init__(self, seed: int, num_rows: list[int], weights: list[float]):
        """``num_rows[c]`` rows of corpus c per epoch; ``weights`` need not add up to 1."""
        self._seed = seed
        self._num_rows = num_rows
        self._quotas = _quotas(weights)

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps stream positions to ``(corpus, epoch, row)``, each int64 and shaped as ``positions``."""
        positions = np.asarray(positions, np.int64)
        corpus, draw = np.empty_like(positions), np.empty_like(positions)
        blocks, slots = positions // MIXTURE_BLOCK_ROWS, positions % MIXTURE_BLOCK_ROWS
        for block in np.unique(blocks):
            chosen = blocks == block
            corpus[chosen], draw[chosen] = (column[slots[chosen]] for column in self._draws_of_block(int(block)))
        epoch, row = np.empty_like(positions), np.empty_like(positions)
        for c in np.unique(corpus):
            chosen = corpus == c
            epoch[chosen], position = divmod(draw[chosen], self._num_rows[c])
            keys = mix64(derive_key(self._seed, 2, int(c)) ^ epoch[chosen].astype(np.uint64))
            row[chosen] = permute(position, self._num_rows[c], keys)
        return corpus, epoch, row

    def _draws_of_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a block, its corpus and how many rows of it were drawn before."""
        slots = np.arange(MIXTURE_BLOCK_ROWS)
        key = mix64(derive_key(self._seed, 1) ^ np.uint64(block))
        corpus = np.repeat(np.arange(len(self._quotas)), self._quotas)[permute(slots, MIXTURE_BLOCK_ROWS, key)]
        draw = np.empty_like(slots)
        first_slot = np.cumsum(self._quotas) - self._quotas
        draw[np.argsort(corpus, kind="stable")] = slots - np.repeat(first_slot, self._quotas)
        return corpus, draw + block * self._quotas[corpus]


def _quotas(weights: list[float]) -> np.ndarray:
    """Rows of each corpus in a block, by largest remainder, at least one each; int64."""
    share = np.asarray(weights, float) / sum(weights) * MIXTURE_BLOCK_ROWS
    quotas = np.maximum(np.floor(share), 1).astype(np.int64)
    while quotas.sum() != MIXTURE_BLOCK_ROWS:
        step = 1 if quotas.sum() < MIXTURE_BLOCK_ROWS else -1
        gap = (share - quotas) * step
        gap[quotas + step < 1] = -np.inf
        quotas[int(np.argmax(gap))] += step
    return quotas
