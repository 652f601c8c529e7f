"""The paper's rows: the official builder's rules, worked by a plain twin, and how rows are read back."""

import random

import numpy as np
import pytest

from data_shards.errors import DataSettingError
from data_shards.loader import RowLoader, held_out_rows
from data_shards.order import derive_key
from data_shards.paper import ExampleBuilder
from data_shards.rows import paper_rows
from data_shards.sampling import is_held_out
from data_shards.special import SpecialIds
from data_shards.store import Layout, TokenStream, read_manifest
from data_shards.tokenizer import Tokenizer

LENGTH = 32
LAYOUT = Layout("paper", LENGTH, 5)
SPECIAL = SpecialIds(0, 100, 101, 102, 103)  # BERT's


def rows_by_the_rules(documents: list[list[list[int]]], seed: int, task: int, special: SpecialIds) -> list[list[int]]:
    """The released builder's rules, one sentence after the other, on lists.

    Collect lines until the target is reached or the document ends. One row in ten is a single segment;
    else the first holds half of the target less three, a line that overflows it goes to either side by a
    coin, later ones that fit still join it. Cut both. The next row is short with a chance of one in twenty.
    """
    chance, target, rows = random.Random(int(derive_key(seed, 6, task))), LENGTH, []
    for document in documents:
        lines: list[list[int]] = []
        for number, line in enumerate(document):
            lines.append(line)
            is_last = number == len(document) - 1
            if sum(map(len, lines)) < target and not (is_last and any(lines)):
                continue
            goal = 100_000 if chance.random() < 0.1 else (target - 3) // 2
            a: list[int] = []
            b: list[int] = []
            for part in lines:
                if not a or len(a) + len(part) < goal or (not b and len(a) < goal and chance.random() < 0.5):
                    a += part
                else:
                    b += part
            a = a[: LENGTH - 2]
            b = b[: max(0, LENGTH - len(a) - 3)]
            row = [special.cls, *a, special.sep, *([*b, special.sep] if b else [])]
            rows.append(row + [special.pad] * (LENGTH - len(row)))
            target = chance.randint(5, LENGTH) if chance.random() < 0.05 else LENGTH
            lines = []
    return rows


def made_up_documents(seed: int, count: int = 300) -> list[list[list[int]]]:
    draw = random.Random(seed)
    return [
        [[draw.randint(200, 999) for _ in range(draw.choice((0, 1, 3, 9, 20, 50)))] for _ in range(draw.randint(1, 9))]
        for _ in range(count)
    ]


def build_rows(documents: list[list[list[int]]], task: int = 3) -> list[list[int]]:
    builder = ExampleBuilder(LAYOUT, SPECIAL, np.dtype(np.uint16), task)
    lines_of = ([np.asarray(line, np.uint16).tobytes() for line in document] for document in documents)
    return [np.frombuffer(row, np.uint16).tolist() for lines in lines_of for row in builder.rows_of(lines)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_follow_the_rules(seed):
    documents = made_up_documents(seed)
    rows = build_rows(documents)
    assert rows == rows_by_the_rules(documents, LAYOUT.seed, 3, SPECIAL)
    assert len(rows) > 300


def test_about_one_row_in_ten_is_a_single_segment_and_one_in_twenty_short():
    documents = [[[7] * 5 for _ in range(40)] for _ in range(1500)]
    rows = build_rows(documents)
    single = [row for row in rows if row.count(SPECIAL.sep) == 1]
    assert 0.07 < len(single) / len(rows) < 0.15
    short = [row for row in rows if sum(token == SPECIAL.pad for token in row) > 8]
    assert 0.02 < len(short) / len(rows) < 0.06


def test_types_positions_and_walls_of_rows_on_disk():
    ids = [[101, 7, 8, 102, 9, 102, 0, 0], [101, 7, 8, 9, 102, 0, 0, 0], [101, 7, 102, 9, 8, 7, 6, 102]]
    rows = paper_rows(np.asarray(ids, np.uint16), SPECIAL)
    assert rows.token_ids.tolist() == ids
    assert rows.token_types.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]
    assert rows.positions.tolist() == [list(range(8))] * 3
    assert rows.pieces.tolist() == [[0] * 6 + [1] * 2, [0] * 5 + [1] * 3, [0] * 8]


def test_a_folder_holds_the_rows_of_its_documents(build, documents, tokenizer_folder, held_out_fraction, tmp_path):
    folder = build(tmp_path / "paper", layout=LAYOUT)
    tokenizer, manifest = Tokenizer(tokenizer_folder), read_manifest(folder)
    assert manifest.layout == LAYOUT
    lines_of = {text: [tokenizer.encode(line) for line in text.splitlines()] for text in documents}
    train = [text for text in documents if not is_held_out(text.encode(), held_out_fraction)]
    stream = TokenStream(folder, LENGTH, seed=1)
    rows = stream.windows(np.zeros(stream.num_rows, int), np.arange(stream.num_rows)).tolist()
    expected, begin = [], 0
    for number, shard in enumerate(s for s in manifest.shards if s.split == "train"):
        found = rows[begin : begin + shard.num_documents]
        for count in range(len(train) + 1):  # how many of the documents that are left lie in this task
            made = rows_by_the_rules([lines_of[text] for text in train[:count]], LAYOUT.seed, number, tokenizer.special)
            if made == found:
                break
        assert made == found
        train, begin, expected = train[count:], begin + len(found), expected + made
    assert rows == expected
    assert not train
    again = stream.windows(np.full(stream.num_rows, 7), np.arange(stream.num_rows))
    assert again.tolist() == rows  # static: the same in every epoch


def test_loaders_say_that_there_is_padding_and_refuse_another_length(build, tmp_path):
    folder = build(tmp_path / "paper", layout=LAYOUT)
    keyed = RowLoader([folder], [1.0], LENGTH, 8, seed=1).rows_at(0, 0, 8)
    assert keyed.has_padding
    assert (keyed.rows.token_ids[:, 0] == keyed.special.cls).all()
    assert (keyed.rows.token_ids == keyed.special.pad).any()
    held_out = held_out_rows([folder], [1.0], LENGTH, 8, seed=1)
    assert held_out
    assert held_out.has_padding
    with pytest.raises(DataSettingError, match=r"its rows have 32 tokens \(layout paper\), not 64; set data"):
        RowLoader([folder], [1.0], 64, 8, seed=1)


def test_the_same_rows_with_two_workers(build, tmp_path):
    one, two = (build(tmp_path / str(n), layout=LAYOUT, num_workers=n) for n in (1, 2))
    assert [p.read_bytes() for p in sorted(one.glob("*.bin"))] == [p.read_bytes() for p in sorted(two.glob("*.bin"))]
