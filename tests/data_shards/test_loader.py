"""Rows from disk: windows by arithmetic, any process sees the same ones."""

import itertools
import mmap
import resource

import numpy as np
import pytest

from data_shards import loader as loader_module
from data_shards import store
from data_shards.errors import DamagedDataError, DataSettingError
from data_shards.loader import KeyedRows, RowLoader, RowsBefore, held_out_rows
from data_shards.order import Mixture, derive_key
from data_shards.special import TRAINED
from data_shards.store import TokenStream

LENGTH = 16


def numbered(count: int, first: int = 5, dtype: type = np.int32) -> np.ndarray:
    """Tokens that tell their own place."""
    return np.arange(first, first + count, dtype=dtype)


def arrays(keyed: KeyedRows) -> np.ndarray:
    rows = keyed.rows
    return np.stack([rows.token_ids, rows.token_types, rows.positions, rows.pieces])


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 47, 48, 200, 1000])
def test_windows_of_an_epoch_follow_each_other_on_disk(write_folder, num_tokens):
    stream = TokenStream(write_folder("c", [numbered(num_tokens)]), LENGTH, seed=3)
    assert stream.num_rows == max(0, (num_tokens + 1) // LENGTH - 1)
    rows = np.arange(stream.num_rows)
    for epoch in range(40):
        tokens = stream.windows(np.full_like(rows, epoch), rows).reshape(-1)
        assert np.array_equal(tokens, tokens[0] + np.arange(len(tokens)))
        assert 5 <= tokens[0] < 5 + LENGTH
        assert tokens[-1] < 5 + num_tokens
        assert num_tokens - len(tokens) < 2 * LENGTH


def test_epochs_shards_and_seeds_have_offsets_of_their_own(write_folder):
    folder = write_folder("c", [numbered(100), numbered(100)])
    offsets = set()
    for seed in (1, 2):
        stream = TokenStream(folder, LENGTH, seed)
        first = stream.windows(np.repeat(np.arange(300), 2), np.tile([0, stream.num_rows // 2], 300))[:, 0] - 5
        offsets.add(tuple(first))
        by_shard = first.reshape(300, 2)
        assert (by_shard[:, 0] == by_shard[:, 1]).mean() < 0.15
        counts = np.bincount(first, minlength=LENGTH)
        expected = len(first) / LENGTH
        assert len(counts) == LENGTH
        assert ((counts - expected) ** 2 / expected).sum() < 44.3  # chi-square, 15 degrees, p = 1e-4
    assert len(offsets) == 2


def test_rows_are_numbered_shard_after_shard_and_short_shards_have_none(write_folder):
    shards = [numbered(20), numbered(100, 1000), numbered(0), numbered(48, 2000), numbered(5)]
    stream = TokenStream(write_folder("c", shards), LENGTH, seed=3)
    assert stream.num_rows == 5 + 2
    windows = stream.windows(np.zeros(7, np.int64), np.arange(7))
    assert (windows[:, 0] // 1000).tolist() == [1] * 5 + [2] * 2
    assert (np.diff(windows, axis=1) == 1).all()


@pytest.fixture
def loader_of(write_folder):
    folders = [
        write_folder("large", [numbered(3000, 100, np.uint16), numbered(500, 4000, np.uint16)]),
        write_folder("small", [numbered(700, 10_000, np.uint16)]),
    ]

    def open_loader(seed=7, batch=64, weights=(3, 1), window_gib=None, before=None):
        return RowLoader(folders, list(weights), LENGTH, batch, seed, window_gib, before)

    open_loader.folders = folders
    return open_loader


def test_rows_do_not_depend_on_who_asks_and_in_what_order(loader_of):
    whole = [loader_of().rows_at(step, 0, 64) for step in range(3)]
    loader = loader_of()
    requests = [(step, first, 8) for step in range(3) for first in range(0, 64, 8)]
    for step, first, count in np.random.default_rng(1).permutation(requests).tolist():
        part = loader.rows_at(step, first, count)
        assert np.array_equal(arrays(part), arrays(whole[step])[:, first : first + count])
        assert np.array_equal(part.keys, whole[step].keys[first : first + count])


def test_an_epoch_of_the_loader_reads_every_window_once(write_folder):
    loader = RowLoader([write_folder("c", [numbered(2000)])], [1], LENGTH, 31, seed=5)
    assert loader.num_rows == 124
    second_tokens = [loader.rows_at(step, 0, 31).rows.token_ids[:, 1] for step in range(4)]
    assert np.array_equal(np.diff(np.sort(np.concatenate(second_tokens))), np.full(123, LENGTH))


def test_visits_of_a_row_have_keys_of_their_own(write_folder):
    loader = RowLoader([write_folder("c", [numbered(2000)])], [1], LENGTH, 31, seed=5)
    keys = np.concatenate([loader.rows_at(step, 0, 31).keys for step in range(40)])
    assert keys.dtype == np.uint64
    assert len(np.unique(keys)) == len(keys)


@pytest.mark.parametrize("window_gib", [None, 2**-30 * 16_000])
@pytest.mark.parametrize(("batch", "weights"), [(32, [3, 1]), (100, [3, 1]), (64, [1, 3])])
def test_another_batch_or_mixture_reads_what_was_not_read(monkeypatch, loader_of, batch, weights, window_gib):
    """Each corpus ends its first epoch before it begins the second, with masks of their own."""
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 512)
    parent, read = loader_of(window_gib=window_gib), Mixture([3, 1]).rows_at(2 * 64).tolist()
    assert read == [96, 32]
    fork = loader_of(
        batch=batch, weights=weights, window_gib=window_gib, before=RowsBefore(2, tuple(read), (0, 1), (0.75, 0.25))
    )
    keyed = [parent.rows_at(step, 0, 64) for step in range(2)] + [fork.rows_at(2 + s, 0, batch) for s in range(3)]
    ids = np.concatenate([rows.rows.token_ids[:, 1] for rows in keyed]).astype(int)
    keys = np.concatenate([rows.keys for rows in keyed])
    assert len(np.unique(keys)) == len(keys)
    for of_corpus, epoch in ((ids[ids < 10_000], 216), (ids[ids >= 10_000], 42)):
        assert len(np.unique(of_corpus[:epoch])) == min(epoch, len(of_corpus))


def test_a_new_corpus_leaves_the_order_of_the_others_alone(loader_of):
    numbered_otherwise = loader_of(before=RowsBefore(0, (0, 0), (1, 0), (0.75, 0.25)))
    assert not np.array_equal(arrays(loader_of().rows_at(0, 0, 64)), arrays(numbered_otherwise.rows_at(0, 0, 64)))
    alone = RowLoader(loader_of.folders[1:], [1], LENGTH, 16, 7, before=RowsBefore(0, (0,), (1,), (1.0,)))
    of_both = np.concatenate([loader_of().rows_at(step, 0, 64).rows.token_ids for step in range(2)])
    assert np.array_equal(alone.rows_at(0, 0, 16).rows.token_ids, of_both[of_both[:, 1] >= 10_000][:16])


def test_corpora_are_mixed_by_weight(loader_of):
    ids = np.concatenate([loader_of().rows_at(step, 0, 64).rows.token_ids[:, 1] for step in range(64)])
    assert (ids >= 10_000).sum() == len(ids) / 4  # whole patterns of 1,024 rows


def test_another_seed_gives_other_rows(loader_of):
    first, second = (arrays(loader_of(seed).rows_at(0, 0, 64))[0] for seed in (1, 2))
    assert (first == second).all(axis=1).sum() == 0


def test_too_few_rows_for_a_batch_is_a_wrong_setting(write_folder, loader_of):
    message = r"global_batch_size=259: too few rows of 16 tokens for one batch \(large 216, small 42\)"
    with pytest.raises(DataSettingError, match=message) as error:
        loader_of(batch=259)
    assert error.value.exit_code == 78
    assert loader_of(batch=258).num_rows == 258
    with pytest.raises(DataSettingError, match=r"\(long 124, short 0\)"):
        RowLoader([write_folder("long", [numbered(2000)]), write_folder("short", [numbered(30)])], [1, 1], LENGTH, 8, 1)


def test_a_shard_cut_short_is_found_when_it_is_opened(write_folder):
    folder = write_folder("c", [numbered(100)])
    (folder / "train_00000.bin").write_bytes((folder / "train_00000.bin").read_bytes()[:-4])
    with pytest.raises(DamagedDataError, match="the manifest says 400 bytes but it has 396 bytes"):
        TokenStream(folder, LENGTH, seed=1)


def test_held_out_rows_are_the_same_each_time_by_weight_and_from_all_that_is_held_out(write_folder):
    folders = [
        write_folder("a", [numbered(500)], [numbered(500, 1000), numbered(500, 2000)]),
        write_folder("b", [numbered(500)], [numbered(90, 5000)]),
        write_folder("c", [numbered(500)]),
    ]
    weights = [1.0, 0.9, 0.1]
    keyed = held_out_rows(folders, weights, LENGTH, 24, seed=1)
    second = keyed.rows.token_ids[:, 1]
    of_a = second[second < 5000]
    assert len(of_a) == 12  # half of the weights
    assert ((of_a - of_a.min())[:6] // 80).tolist() == [0, 1, 2, 3, 4, 5], "not the beginning of what is held out"
    assert ((of_a >= 2000).sum(), (second >= 5000).sum()) == (6, 4)  # of b all there is
    assert len(second) == 16
    again = held_out_rows(folders, weights, LENGTH, 24, seed=1)
    assert np.array_equal(arrays(again), arrays(keyed))
    assert len(np.unique(keyed.keys)) == 16


def test_no_held_out_text_gives_no_held_out_rows(write_folder):
    assert held_out_rows([write_folder("c", [numbered(500)])], [1.0], LENGTH, 24, seed=1) is None


def test_real_shards_give_rows_with_all_their_pieces(folder):
    rows = RowLoader([folder], [1], 64, 16, seed=1).rows_at(0, 0, 16).rows
    assert (rows.token_ids[rows.positions == 0] == TRAINED.cls).all()
    last = np.where(rows.positions[:, -1] == 0, TRAINED.cls, TRAINED.sep)  # a piece of one token is a lone [CLS]
    assert np.array_equal(rows.token_ids[:, -1], last)
    assert rows.pieces.max() >= 1
    assert rows.token_ids.dtype == np.int32


def windows_one_by_one(stream: TokenStream, shards: list[np.ndarray], epochs: np.ndarray, rows: np.ndarray) -> list:
    """The plain twin of ``TokenStream.windows``: count rows shard after shard."""
    windows = []
    for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True):
        for number, tokens in enumerate(shards):
            count = max(0, (len(tokens) + 1) // LENGTH - 1)
            if row < count:
                begin = row * LENGTH + int(derive_key(3, 4, epoch, number)) % LENGTH
                windows.append(tokens[begin : begin + LENGTH].tolist())
                break
            row -= count
    return windows


@pytest.mark.parametrize("least", [0, 4, 10**9], ids=["indexed", "default", "sliced"])
@pytest.mark.parametrize("num_shards", [1, 3, 40])
def test_windows_are_those_of_the_plain_twin(write_folder, monkeypatch, num_shards, least):
    monkeypatch.setattr(store, "_ROWS_THAT_PAY_FOR_INDEXING", least)
    draw = np.random.default_rng(1)
    shards = [draw.integers(5, 1000, 20 + 37 * number % 200).astype(np.uint16) for number in range(num_shards)]
    stream = TokenStream(write_folder("c", shards), LENGTH, seed=3)
    if stream.num_rows:
        rows, epochs = draw.integers(0, stream.num_rows, 200), draw.integers(0, 5, 200)
        assert stream.windows(epochs, rows).tolist() == windows_one_by_one(stream, shards, epochs, rows)
    nothing = np.zeros(0, np.int64)
    assert stream.windows(nothing, nothing).shape == (0, LENGTH)


def test_shards_are_mapped_when_they_are_read(write_folder, monkeypatch):
    mapped = []
    original = store.shards.map_tokens
    monkeypatch.setattr(store.shards, "map_tokens", lambda *args: mapped.append(args[0].name) or original(*args))
    stream = TokenStream(write_folder("c", [numbered(100)] * 5), LENGTH, seed=3)
    assert mapped == []
    for _ in range(2):
        stream.windows(np.asarray([0]), np.asarray([stream.num_rows - 1]))
    assert mapped == ["train_00004"]


def test_the_shards_of_all_corpora_may_be_open_at_once_or_it_is_a_wrong_setting(write_folder, monkeypatch):
    limits = [(20, 100)]
    monkeypatch.setattr(store, "_OTHER_FILES", 3)
    monkeypatch.setattr(store.os, "listdir", lambda folder: ["0", "1", "2"])
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: limits.append(pair))
    folders = [write_folder(f"c{n}", [numbered(100)] * 10) for n in range(3)]
    RowLoader(folders[:1], [1], LENGTH, 1, seed=3)
    assert limits[-1] == (20, 100)
    RowLoader(folders, [1] * 3, LENGTH, 1, seed=3)
    assert limits[-1] == (36, 100)
    many = write_folder("many", [numbered(100)] * 70)
    with pytest.raises(DataSettingError, match=r"100 shards, but a process may open no more than 100 files") as error:
        RowLoader([*folders, many], [1] * 4, LENGTH, 1, seed=3)
    assert error.value.exit_code == 78


class Advised:
    """What a loader tells the kernel of a corpus, as rows."""

    def __init__(self, stream, monkeypatch):
        self.at_hand: dict[tuple[int, int], int] = {}
        self.before: dict[tuple[int, int], int] | None = None
        self.read: list[tuple[int, int]] = []
        self.most_rows = 0
        original = stream.windows

        def advise(epoch, stretches, advice):
            for begin, end in stretches.tolist():
                for row in range(begin, end):
                    change = 1 if advice == mmap.MADV_WILLNEED else -1
                    self.at_hand[epoch, row] = self.at_hand.get((epoch, row), 0) + change
            assert set(self.at_hand.values()) <= {0, 1}  # each window once, and once let go
            self.most_rows = max(self.most_rows, sum(self.at_hand.values()))

        def windows(epochs, rows):
            for place in zip(epochs.tolist(), rows.tolist(), strict=True):
                assert self.at_hand.get(place) == 1, "a row was read whose block was not announced"
                assert self.before is None or place in self.before, "its block was announced in the same call"
                self.read.append(place)
            return original(epochs, rows)

        monkeypatch.setattr(stream, "advise", advise)
        monkeypatch.setattr(stream, "windows", windows)


def test_the_blocks_of_a_window_are_announced_one_window_ahead(write_folder, monkeypatch):
    """Two corpora, two epochs: every row read lies in a block announced before, and few are held."""
    monkeypatch.setattr(loader_module, "BLOCK_BYTES", 10 * LENGTH * 2)  # 10 rows
    folders = [
        write_folder("a", [numbered(9000, dtype=np.uint16), numbered(3005, dtype=np.uint16)]),
        write_folder("b", [numbered(3000, dtype=np.uint16)]),
    ]
    window_bytes = 120 * LENGTH * 2  # 90 rows of a, 30 of b
    loader = RowLoader(folders, [3, 1], LENGTH, 16, 5, window_bytes / 2**30)
    advised = [Advised(stream, monkeypatch) for stream in loader._streams]
    for step in range(2 * loader.num_rows // 16):
        for corpus in advised:
            corpus.before = dict(corpus.at_hand) if step else None
        loader.rows_at(step, 0, 16)
    for corpus, rows, window_rows in zip(advised, [746, 186], [90, 30], strict=True):
        assert len(set(corpus.read)) == len(corpus.read) > 1.8 * rows
        assert 2 * window_rows <= corpus.most_rows <= 3 * window_rows + 16


def test_advice_covers_the_pages_of_the_rows(write_folder):
    shards = [numbered(30_000, dtype=np.int32), numbered(9000, dtype=np.int32)]
    stream = TokenStream(write_folder("c", shards), LENGTH, seed=3)
    rows = np.arange(stream.num_rows)
    before = stream.windows(np.full_like(rows, 2), rows)
    calls = []

    class Map:
        def __init__(self, number):
            self._mmap, self.number = self, number

        def madvise(self, advice, begin, length):
            calls.append((self.number, advice, begin, length))

    stream._maps = {number: Map(number) for number in stream._maps}
    stretch = np.asarray([[5, stream.num_rows]])
    stream.advise(2, stretch, mmap.MADV_WILLNEED)
    assert [call[:2] for call in calls] == [(0, mmap.MADV_WILLNEED), (1, mmap.MADV_WILLNEED)]
    for (_, _, begin, length), tokens, last in zip(calls, shards, (before[-1 - 561], before[-1]), strict=True):
        assert begin % mmap.PAGESIZE == 0
        assert begin + length == 4 * (int(np.flatnonzero(tokens == last[-1])[0]) + 1)
    assert calls[0][2] <= 4 * (before[5][0] - 5)


def test_the_kernel_is_asked_for_no_more_at_a_time_than_it_reads(write_folder, monkeypatch):
    monkeypatch.setattr(store, "_ADVISED_BYTES", mmap.PAGESIZE)
    stream = TokenStream(write_folder("c", [numbered(30_000)]), LENGTH, seed=3)
    stream.windows(np.asarray([0]), np.asarray([0]))
    calls = []
    fake = type("Map", (), {"madvise": lambda self, advice, begin, length: calls.append((begin, length))})()
    stream._maps[0] = type("Array", (), {"_mmap": fake})()  # type: ignore[assignment]
    stream.advise(0, np.asarray([[0, stream.num_rows]]), mmap.MADV_WILLNEED)
    assert len(calls) > 10
    assert all(length <= mmap.PAGESIZE for _, length in calls)
    assert all(begin + length == after for (begin, length), (after, _) in itertools.pairwise(calls))


def test_the_kernel_takes_the_advice(write_folder):
    stream = TokenStream(write_folder("c", [numbered(9000)]), LENGTH, seed=3)
    stream.reads_single_pages = True
    rows = np.arange(stream.num_rows)
    before = stream.windows(rows * 0, rows)
    for advice in (mmap.MADV_WILLNEED, mmap.MADV_DONTNEED):
        stream.advise(0, np.asarray([[0, 7], [9, stream.num_rows]]), advice)
        assert np.array_equal(stream.windows(rows * 0, rows), before)


def test_rows_of_shards_larger_than_memory_are_read_by_the_page(write_folder, monkeypatch):
    folder = write_folder("c", [numbered(2000)])
    for pages, expected in ((1, True), (1000, False)):
        monkeypatch.setattr(
            "os.sysconf", lambda name, pages=pages: {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}[name]
        )
        assert RowLoader([folder], [1], LENGTH, 31, 5)._streams[0].reads_single_pages is expected
        assert RowLoader([folder], [1], LENGTH, 31, 5, 0.1)._streams[0].reads_single_pages is False


def test_shares_are_told_by_corpus(loader_of):
    assert loader_of().shares == [("large", 0.75), ("small", 0.25)]
