"""Rows of any micro-batch of any step, for any process, without state."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import DataSettingError
from data_shards.order import MixtureOrder, RowOrder
from data_shards.rows import Rows, pack_rows, paper_rows, row_keys
from data_shards.special import SpecialIds
from data_shards.store import Manifest, TokenStream, allow_open_files, read_manifest

BLOCK_BYTES = 4 << 20
"""Disk that the two-level order keeps together: what a parallel file system reads at its full rate."""


@dataclass(frozen=True)
class KeyedRows:
    """Rows with what is needed to mask them.

    Attributes:
        rows: Token ids, types, positions and pieces.
        keys: uint64 ``(rows,)``: the mask of a row is drawn from its key.
        special: Ids that are never masked, and [MASK]'s.
        has_padding: Whether rows may end in padding, as those of layout ``paper`` do.
    """

    rows: Rows
    keys: np.ndarray
    special: SpecialIds
    has_padding: bool = False


@dataclass(frozen=True)
class RowsBefore:
    """What was read before a run's own batch and weights hold: by the run that it goes on from.

    Attributes:
        step: From this one on they hold (steps count from 0).
        rows: Of each corpus.
        numbers: By which each corpus's rows are keyed.
        window_shares: Of the window that rows are mixed within, for each corpus: another share is another order.
    """

    step: int
    rows: tuple[int, ...]
    numbers: tuple[int, ...]
    window_shares: tuple[float, ...]

    @classmethod
    def nothing(cls, weights: Sequence[float]) -> "RowsBefore":
        """At a run's own beginning."""
        whole, corpora = sum(weights), range(len(weights))
        return cls(0, tuple(0 for _ in corpora), tuple(corpora), tuple(weight / whole for weight in weights))


class RowLoader:
    """Training rows of several corpora, mixed by weight.

    ``rows_at(step, first, count)`` is a pure function: the rows ``first`` to
    ``first + count`` of the global batch of a step are the same whichever process
    asks, after whatever was asked before.

    Attributes:
        order: Which row stands at each position of the stream.
    """

    def __init__(
        self,
        folders: list[Path],
        weights: list[float],
        sequence_length: int,
        global_batch_rows: int,
        seed: int,
        shuffle_window_gib: float | None = None,
        before: RowsBefore | None = None,
    ):
        """Opens finished shard folders, one for each weight.

        Args:
            folders: Shard folders.
            weights: Shares of the corpora, relative to each other.
            sequence_length: Tokens of a row.
            global_batch_rows: Rows of a step.
            seed: Of the order.
            shuffle_window_gib: Disk that rows are mixed within, all corpora together; None: all there is.
            before: What was read already; None at a run's own beginning.

        Raises:
            DataSettingError: A corpus has no row, all of them less than one global batch, or too many corpora.
        """
        self._streams = [TokenStream(folder, sequence_length, seed) for folder in folders]
        allow_open_files([stream.manifest for stream in self._streams])
        self._global_batch_rows, self._seed, self._length = global_batch_rows, seed, sequence_length
        counts = [stream.num_rows for stream in self._streams]
        if min(counts) == 0 or sum(counts) < global_batch_rows:
            sizes = ", ".join(f"{s.manifest.corpus} {n:,}" for s, n in zip(self._streams, counts, strict=True))
            raise DataSettingError(
                f"train.global_batch_size={global_batch_rows}: too few rows of {sequence_length} tokens for one "
                f"batch ({sizes}); give more text, or lower train.global_batch_size or data.sequence_length"
            )
        orders = [RowOrder(count) for count in counts]
        before = before or RowsBefore.nothing(weights)
        if shuffle_window_gib is not None:
            window_bytes = [shuffle_window_gib * 2**30 * share for share in before.window_shares]
            orders = [_two_level(s, size) for s, size in zip(self._streams, window_bytes, strict=True)]
        self.order = MixtureOrder(seed, orders, weights, before.rows, before.numbers)
        self._first_step, self._numbers = before.step, np.asarray(before.numbers)
        self._reads_ahead = shuffle_window_gib is not None
        for stream in self._streams:
            stream.reads_single_pages = not self._reads_ahead and self._exceeds_memory()
        self._held = [range(0)] * len(folders)  # windows of each corpus that the kernel was told to keep at hand

    @property
    def num_rows(self) -> int:
        """Rows of one pass over every corpus."""
        return sum(stream.num_rows for stream in self._streams)

    @property
    def shares(self) -> list[tuple[str, float]]:
        """Name of each corpus and its share of the training rows."""
        return [(s.manifest.corpus, share) for s, share in zip(self._streams, self.order.shares, strict=True)]

    @property
    def share_in_rows(self) -> float:
        """Share of the training tokens that lie in rows; each shard loses less than two rows of them."""
        tokens = sum(stream.manifest.num_tokens() for stream in self._streams)
        return self.num_rows * self._length / tokens

    def rows_at(self, step: int, first: int, count: int) -> KeyedRows:
        """Rows ``[first, first + count)`` of the global batch of ``step`` (steps count from 0)."""
        begin = self.order.first + (step - self._first_step) * self._global_batch_rows + first
        if self._reads_ahead:
            self._read_ahead(begin, count)
        corpora, epochs, rows = self.order.rows_at(begin + np.arange(count, dtype=np.int64))
        keys = row_keys(self._seed, self._numbers[corpora], epochs, rows)
        if len(self._streams) == 1:
            windows = self._streams[0].windows(epochs, rows)
        else:
            windows = np.empty((count, self._length), np.result_type(*(s.manifest.dtype for s in self._streams)))
            for c in np.flatnonzero(np.bincount(corpora)):
                chosen = np.flatnonzero(corpora == c)
                windows[chosen] = self._streams[c].windows(epochs[chosen], rows[chosen])
        return _keyed_rows(windows, keys, self._streams[0].manifest)

    def _exceeds_memory(self) -> bool:
        """Whether the shards outgrow half the memory: what the kernel reads around a row is gone before it is used."""
        num_bytes = sum(stream.num_rows * stream.row_bytes for stream in self._streams)
        return num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2

    def _read_ahead(self, first: int, count: int) -> None:
        """Has the kernel fetch the windows of these positions and the next one, and let go of those before.

        It reads whole blocks while the rows of the window before are trained on. Nothing but time
        depends on it: a row that is asked for out of turn is read when it is touched.
        """
        for c, windows in enumerate(self.order.windows_at(first, count)):
            wanted = range(windows.start, windows.stop + 1)
            held, self._held[c] = self._held[c], wanted
            if held != wanted:
                for window in (window for window in held if window not in wanted):
                    self._streams[c].advise(*self.order.stretches(c, window), mmap.MADV_DONTNEED)
                for window in (window for window in wanted if window not in held):
                    self._streams[c].advise(*self.order.stretches(c, window), mmap.MADV_WILLNEED)


def _two_level(stream: TokenStream, window_bytes: float) -> RowOrder:
    block_rows = max(1, BLOCK_BYTES // stream.row_bytes)
    return RowOrder(stream.num_rows, block_rows, max(1, round(window_bytes / (block_rows * stream.row_bytes))))


def held_out_rows(
    folders: list[Path], weights: list[float], sequence_length: int, max_rows: int, seed: int
) -> KeyedRows | None:
    """Held-out rows, always the same: of each corpus its share by weight, at least one, at even distances.

    The first ones would not do: what is held out stands in the order of the corpus's files.

    Returns:
        About ``max_rows``, fewer where a corpus has not its share; None when there are none.
    """
    if max_rows == 0:
        return None
    batches, keys = [], []
    for number, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        stream = TokenStream(folder, sequence_length, seed, split="held_out")
        count = min(stream.num_rows, max(1, round(max_rows * weight / sum(weights))))
        rows = np.arange(count) * stream.num_rows // max(1, count)
        zeros = np.zeros_like(rows)
        batches.append(stream.windows(zeros, rows).astype(np.int32))
        keys.append(row_keys(seed, zeros + number, zeros, rows))
    all_keys = np.concatenate(keys)
    if not len(all_keys):
        return None
    return _keyed_rows(np.concatenate(batches), all_keys, read_manifest(folders[0]))


def _keyed_rows(windows: np.ndarray, keys: np.ndarray, manifest: Manifest) -> KeyedRows:
    special = manifest.special
    if not manifest.layout.is_packed:
        return KeyedRows(paper_rows(windows, special), keys, special, has_padding=True)
    return KeyedRows(pack_rows(windows, keys, special), keys, special)
