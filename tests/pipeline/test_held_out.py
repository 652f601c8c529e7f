"""Scores of held-out text: what counts, whatever ids the special tokens have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.loader import held_out_rows
from data_shards.shards import write_shard
from data_shards.special import SpecialIds
from data_shards.store import Layout, Manifest, ShardRecord, write_manifest
from model.batch import GlobalCounts, MicroBatch
from model.statistics import FIELDS, Statistics
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.held_out import HeldOut
from pipeline.plan import make_plan
from pipeline.unigram import control_log_probabilities, unigram_entropy

SPECIAL = SpecialIds(7, 100, 101, 102, 103)  # none of them where the models that we train have theirs
VOCAB_SIZE, LENGTH = 110, 32
ONE = Process()
PAPER = Layout("paper", LENGTH, seed=1)


def write_folder(folder: Path, train: np.ndarray, held_out: np.ndarray | None = None, layout: Layout = PAPER) -> Path:
    """A finished shard folder, one shard for each split."""
    folder.mkdir()
    records = []
    for split, tokens in (("train", train), ("held_out", held_out)):
        if tokens is not None:
            write_shard(folder / split, [tokens.reshape(-1)], tokens.dtype)
            records.append(ShardRecord(split, split, 1, tokens.size, "", ""))
    write_manifest(folder, Manifest("text", "key", {}, "tokenizer", SPECIAL, "uint16", layout, {}, tuple(records)))
    return folder


def padded_rows(count: int) -> np.ndarray:
    """Paper rows, a quarter of each tokens and the rest padding; ids from 0 to 6, which includes 0 and 4."""
    rows = np.full((count, LENGTH), SPECIAL.pad, np.uint16)
    rows[:, : LENGTH // 4] = np.random.default_rng(0).integers(0, SPECIAL.pad, (count, LENGTH // 4))
    rows[:, [0, LENGTH // 4 - 1]] = SPECIAL.cls, SPECIAL.sep
    return rows


class GuessingEngine:
    """Knows padding from text, and of text nothing: random logits, random labels."""

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self.rows = 0

    def evaluate(
        self, batch: MicroBatch, counts: GlobalCounts, trains: str
    ) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
        is_padding_BT = batch.token_ids_BT == SPECIAL.pad
        assert torch.equal(batch.token_weights_BT == 0, is_padding_BT)
        logits_BT = torch.randn(is_padding_BT.shape, generator=self._draw) - 100.0 * is_padding_BT
        is_replaced_BT = (torch.rand(is_padding_BT.shape, generator=self._draw) < 0.3) & ~is_padding_BT
        self.rows += len(is_padding_BT)
        return Statistics(torch.ones(len(FIELDS), dtype=torch.float64)), logits_BT, is_replaced_BT


def score(
    config_path: Path, engine: Any, folder: Path, held_out_rows: int, *overrides: str, process: Process = ONE
) -> dict[str, float]:
    return held_out_of(config_path, engine, folder, held_out_rows, *overrides, process=process).score("both")


def held_out_of(
    config_path: Path, engine: Any, folder: Path, held_out_rows: int, *overrides: str, process: Process = ONE
) -> HeldOut:
    """In one process, which has nothing to agree on."""
    config = load_config(config_path, (f"train.held_out_rows={held_out_rows}", *overrides))
    control: Any = SimpleNamespace(
        sum_tensor=lambda values: values, gather=lambda value: [value], broadcast=lambda value: value, is_first=True
    )
    plan = make_plan(config, 1, VOCAB_SIZE)
    return HeldOut(config, plan, engine, [folder], [1.0], process, control, "cpu")


def test_other_rows_have_another_digest_whoever_reads_them(config_path: Path, tmp_path: Path) -> None:
    rows = padded_rows(8)
    folder = write_folder(tmp_path / "text", rows, rows)
    other = write_folder(tmp_path / "other", rows, rows[:, ::-1].copy())
    second = Process(rank=1, world_size=2)
    digest = held_out_of(config_path, None, folder, 4).digest
    assert digest is not None and len(digest) == 16
    assert held_out_of(config_path, None, folder, 4, "train.micro_batch_size=1", process=second).digest == digest
    cases = [(path, count) for path in (folder, other) for count in (4, 8)]
    assert len({held_out_of(config_path, None, *case).digest for case in cases}) == 4
    assert held_out_of(config_path, None, folder, 0).digest is None


def test_padding_does_not_count_for_the_auc(config_path: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "text", padded_rows(4), padded_rows(401))
    engine = GuessingEngine()
    metrics = score(config_path, engine, folder, held_out_rows=401)  # an odd number: the last micro-batch is short
    assert metrics["held_out/rows"] == engine.rows == 401
    error = metrics["held_out/discriminator_auc_standard_error"]
    assert metrics["held_out/discriminator_auc"] == pytest.approx(0.5, abs=3 * error)  # with padding 0.90
    assert 0.008 < error < 0.015  # of 3,208 tokens, 30 % of them replaced; with padding it is smaller


def test_special_ids_are_left_out_of_the_unigram_entropy_wherever_they_are(tmp_path: Path) -> None:
    counts = {0: 10, 1: 5, 2: 20, 3: 1, 4: 4, 50: 40}  # the ids that special tokens have elsewhere among them
    tokens = np.repeat(np.array([*counts, *SPECIAL.all], np.uint16), [*counts.values(), 1000, 2, 30, 31, 7])
    half = np.full(60, 60, np.uint16)
    folders = [
        write_folder(tmp_path / "one", tokens, held_out=np.full(99, 9, np.uint16), layout=Layout()),
        write_folder(tmp_path / "two", np.append(half, np.uint16(SPECIAL.sep)), layout=Layout()),
    ]
    shares = np.array([0.25 * count / sum(counts.values()) for count in counts.values()] + [0.75])  # as mixed
    assert unigram_entropy(folders, [1.0, 3.0], VOCAB_SIZE) == pytest.approx(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("held_out", "rows"), [(padded_rows(4), 0), (None, 16)], ids=["none asked for", "none there"])
def test_without_held_out_rows_nothing_is_scored(
    config_path: Path, tmp_path: Path, held_out: np.ndarray | None, rows: int
) -> None:
    folder = write_folder(tmp_path / "text", padded_rows(4), held_out)
    assert held_out_rows([folder], [1.0], LENGTH, rows, seed=1) is None
    assert score(config_path, None, folder, held_out_rows=rows) == {}


class WatchfulEngine(GuessingEngine):
    """Remembers the batches; on those of weight 0 its guesses are perfect."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[MicroBatch] = []

    def evaluate(self, batch: MicroBatch, counts: GlobalCounts, trains: str):
        self.batches.append(batch)
        if batch.weight:
            return super().evaluate(batch, counts, trains)
        is_replaced_BT = torch.arange(batch.token_ids_BT.numel()).view_as(batch.token_ids_BT) % 2 == 0
        return Statistics.zeros(), is_replaced_BT.float(), is_replaced_BT


def test_a_process_with_one_micro_batch_less_keeps_in_step_without_counting(config_path: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "text", padded_rows(4), padded_rows(401))
    engine = WatchfulEngine()
    metrics = score(config_path, engine, folder, 401, process=Process(rank=1, world_size=2))
    assert len(engine.batches) == 101  # micro-batches of 2 rows: 201, of which this process has 100
    assert [batch.weight for batch in engine.batches] == [1.0] * 100 + [0.0]
    assert len({batch.seed for batch in engine.batches}) == 101
    assert abs(metrics["held_out/discriminator_auc"] - 0.5) < 4 * metrics["held_out/discriminator_auc_standard_error"]


def test_electra_15_is_scored_where_it_is_trained(config_path: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "text", padded_rows(4), padded_rows(401))
    everywhere, selected = (
        score(config_path, GuessingEngine(), folder, 401, f"objective.name={name}")
        for name in ("electra", "electra_15")
    )
    key = "held_out/discriminator_auc_standard_error"
    assert selected[key] > 1.8 * everywhere[key]  # of 401 selected tokens in place of 3,208


def test_the_unigram_control_follows_the_mixture_and_can_draw_every_token(config_path: Path, tmp_path: Path) -> None:
    folders = [
        write_folder(tmp_path / "one", np.full(90_000, 50, np.uint16), layout=Layout()),
        write_folder(tmp_path / "two", np.append(np.full(90, 60, np.uint16), np.uint16(SPECIAL.sep)), layout=Layout()),
    ]
    config = load_config(config_path, ("objective.generator=unigram",))
    shares = control_log_probabilities(config, folders, [1.0, 1.0], VOCAB_SIZE).exp()
    assert float(shares[50]) == pytest.approx(0.5, abs=1e-5)
    assert float(shares[60]) == pytest.approx(0.5, abs=1e-5)
    assert not shares[list(SPECIAL.never_masked)].any()
    assert float(shares[70]) == pytest.approx(1e-6 / (VOCAB_SIZE - 4), rel=1e-4)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-5)
    uniform = load_config(config_path, ("objective.generator=uniform",))
    shares = control_log_probabilities(uniform, folders, [1.0, 1.0], VOCAB_SIZE).exp()
    assert float(shares[50]) == float(shares[70]) == pytest.approx(1 / (VOCAB_SIZE - 4))
