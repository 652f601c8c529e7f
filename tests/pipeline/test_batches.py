"""Micro-batches of rows with padding: what is masked and what counts."""

import numpy as np
import pytest
import torch

from data_shards.errors import DamagedDataError
from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows, paper_rows
from data_shards.special import TRAINED, SpecialIds
from pipeline.batches import MicroBatches, to_micro_batch
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.plan import make_plan

VOCAB_SIZE = 300
BERT = SpecialIds(0, 100, 101, 102, 103)
PADDED_WITH_SEVEN = SpecialIds(7, 100, 101, 102, 103)


@pytest.mark.parametrize(("special", "ordinary"), [(TRAINED, 50), (BERT, TRAINED.mask), (PADDED_WITH_SEVEN, 0)])
def test_padding_is_neither_masked_nor_counted_and_a_short_row_has_fewer_masks(config_path, special, ordinary):
    config = load_config(config_path)
    length, ends = config.data.sequence_length, [32, 20, 12, 3]
    windows = np.full((4, length), special.pad, np.uint16)
    for row, end in zip(windows, ends, strict=True):
        row[:end] = ordinary
        row[[0, end - 1]] = special.cls, special.sep
    keys = np.arange(4, dtype=np.uint64)
    keyed = KeyedRows(paper_rows(windows, special), keys, special, has_padding=True)
    batch = to_micro_batch(keyed, config, VOCAB_SIZE, "cpu", 1, 1.0)
    assert batch.num_tokens == sum(ends)
    assert batch.token_weights_BT.sum(1).tolist() == ends
    expected = [max(1, min(round(0.15 * end), int(0.155 * length))) for end in ends]
    assert batch.masking.weights_BM.sum(1).tolist() == expected
    selected = batch.masking.weights_BM > 0
    assert (batch.token_ids_BT.gather(1, batch.masking.positions_BM)[selected] == ordinary).all()
    can_attend = batch.packing.same_piece_B1TT[1, 0]
    assert torch.equal(can_attend[0], torch.arange(length) < 20)


def test_packed_rows_have_no_padding(config_path):
    config = load_config(config_path)
    windows = np.full((2, config.data.sequence_length), 50, np.uint16)
    keys = np.arange(2, dtype=np.uint64)
    batch = to_micro_batch(
        KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED), config, VOCAB_SIZE, "cpu", 1, 1.0
    )
    assert batch.is_unscored_BT is None
    assert batch.num_tokens == windows.size


@pytest.mark.parametrize("special", [TRAINED, BERT])
def test_the_generator_sees_the_vocabularys_own_mask_id_and_all_but_its_special_tokens_may_be_masked(
    config_path, special
):
    config = load_config(config_path)
    ordinary = [number for number in (2, 3, 4, 50, 101, 102, 103) if number not in special.never_masked]
    windows = np.random.default_rng(0).choice(ordinary, (64, config.data.sequence_length)).astype(np.uint16)
    windows[:, 16] = special.sep
    keys = np.arange(64, dtype=np.uint64)
    batch = to_micro_batch(
        KeyedRows(pack_rows(windows, keys, special), keys, special), config, VOCAB_SIZE, "cpu", 1, 1.0
    )
    assert batch.masking.weights_BM.all()
    assert set(batch.token_ids_BT.gather(1, batch.masking.positions_BM).unique().tolist()) == set(ordinary)
    is_shown_BT = batch.masking.generator_ids_BT != batch.token_ids_BT
    assert 0.75 < is_shown_BT.sum() / batch.num_masked < 0.95  # 85 % of 320 positions
    assert set(batch.masking.generator_ids_BT[is_shown_BT].tolist()) == {special.mask}


def test_an_id_that_the_vocabulary_does_not_have_is_damage(config_path):
    config = load_config(config_path, ("data.local_dir=/copies",))
    windows = np.full((2, config.data.sequence_length), 50, np.uint16)
    windows[1, 7] = VOCAB_SIZE
    keys = np.arange(2, dtype=np.uint64)
    keyed = KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)
    with pytest.raises(DamagedDataError, match=r"token id 300, .* verify /copies` or `electra shards verify /\S+` on "):
        to_micro_batch(keyed, config, VOCAB_SIZE, "cpu", 1, 1.0)
    to_micro_batch(keyed, config, VOCAB_SIZE + 1, "cpu", 1, 1.0)


def selected_ids(config, windows, special) -> set[int]:
    keys = np.arange(len(windows), dtype=np.uint64)
    batch = to_micro_batch(KeyedRows(pack_rows(windows, keys, special), keys, special), config, VOCAB_SIZE, "cpu", 1, 1)
    return set(batch.token_ids_BT.gather(1, batch.masking.positions_BM).unique().tolist())


def test_unknown_tokens_are_selected_unless_the_config_says_no(config_path):
    windows = np.random.default_rng(0).choice([TRAINED.unk, 50, 51], (64, 32)).astype(np.uint16)
    assert selected_ids(load_config(config_path), windows, TRAINED) == {TRAINED.unk, 50, 51}
    without = load_config(config_path, ("objective.select_unknown=false",))
    assert selected_ids(without, windows, TRAINED) == {50, 51}


def test_special_tokens_count_in_the_loss_unless_the_config_says_no(config_path):
    windows = np.full((4, 32), 50, np.uint16)
    windows[:, 20] = TRAINED.sep
    keys = np.arange(4, dtype=np.uint64)
    rows = KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)
    config = load_config(config_path, ("objective.score_special_tokens=false",))
    batch = to_micro_batch(rows, config, VOCAB_SIZE, "cpu", 1, 1.0)
    is_text_BT = batch.token_ids_BT == 50
    assert torch.equal(batch.token_weights_BT > 0, is_text_BT)
    assert batch.num_tokens == is_text_BT.sum() < 4 * 32
    assert to_micro_batch(rows, load_config(config_path), VOCAB_SIZE, "cpu", 1, 1.0).num_tokens == 4 * 32


def test_the_recipe_decides_how_positions_are_drawn(config_path):
    windows = np.full((200, 32), 50, np.uint16)
    keys = np.arange(200, dtype=np.uint64)
    rows = KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED)

    def repeated(*overrides: str) -> int:
        batch = to_micro_batch(rows, load_config(config_path, overrides), VOCAB_SIZE, "cpu", 1, 1.0)
        return int((batch.masking.positions_BM.sort(dim=1).values.diff(dim=1) == 0).sum())

    assert repeated() == 0
    assert repeated("recipe=released") > 0
    assert repeated("recipe=released", "objective.position_sampling=distinct") == 0


class SameRows:
    """In place of the loader: the same rows for every micro-batch."""

    def rows_at(self, step: int, first: int, count: int) -> KeyedRows:
        keys = np.arange(count, dtype=np.uint64)
        return KeyedRows(pack_rows(np.full((count, 32), 50, np.uint16), keys, TRAINED), keys, TRAINED)


def test_every_micro_batch_of_every_step_has_seeds_of_its_own(config_path):
    config = load_config(config_path)
    plan = make_plan(config, 1, VOCAB_SIZE)
    batches = MicroBatches(config, plan, Process(), SameRows(), "cpu")
    seeds = [batch.seed for step in range(3) for _, batch in batches.of_step(step)]
    assert len(seeds) == len(set(seeds)) == 12


def test_a_micro_batch_has_the_same_seed_whichever_process_runs_it(config_path):
    """Samples and dropout follow from it."""
    config = load_config(config_path)

    def seeds(world_size: int) -> dict[int, int]:
        plan = make_plan(config, world_size, VOCAB_SIZE)
        processes = (MicroBatches(config, plan, Process(r, world_size), SameRows(), "cpu") for r in range(world_size))
        return {number: each.seed for batches in processes for number, each in batches.of_step(7) if each.weight}

    assert len(seeds(1)) == 4
    assert seeds(1) == seeds(2) == seeds(3)


def test_a_process_without_a_micro_batch_gets_one_of_weight_zero(config_path):
    config = load_config(config_path)
    plan = make_plan(config, 3, VOCAB_SIZE)
    weights = [
        [batch.weight for _, batch in MicroBatches(config, plan, Process(rank, 3), SameRows(), "cpu").of_step(0)]
        for rank in range(3)
    ]
    assert weights == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
