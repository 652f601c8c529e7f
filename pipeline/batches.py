"""Micro-batches: rows from the shards, turned into what the model reads.

Micro-batch j of a step holds the same rows, masks and random draws whichever
process runs it: everything is keyed by seed, step and j, or by the row.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.errors import DamagedDataError
from data_shards.loader import KeyedRows, RowLoader
from data_shards.order import MIXTURE_PERIOD_ROWS
from data_shards.special import SpecialIds
from model.batch import MicroBatch
from model.kernels.attention import Packing
from model.keyed import seed_for
from model.masking import Masking, MaskingRule, select_and_mask
from model.objective import ObjectiveConfig
from pipeline.config import Config
from pipeline.distributed import Process
from pipeline.fork import rows_before
from pipeline.plan import Plan
from pipeline.spikes import SkippedRows, step_of_rows

DRAWS = 1
"""Stream of random numbers of a micro-batch."""


def open_rows(
    config: Config, folders: list[Path], weights: list[float], read: dict[str, Any] | None = None
) -> RowLoader:
    """Opens the shard folders of a run, one for each weight; ``read``: what a fork's parent has read."""
    data, batch_rows = config.data, config.train.global_batch_size
    before = rows_before(sorted(corpus.name for corpus in data.corpora), weights, read)
    return RowLoader(
        folders, weights, data.sequence_length, batch_rows, config.run.seed, data.shuffle_window_gib, before
    )


def mixture_notes(shares: list[tuple[str, float]], weights: list[float]) -> list[tuple[int, str]]:
    """Log levels and lines about corpora whose share of the rows is more than 1 % off their weight."""
    notes = []
    for (name, share), weight in zip(shares, weights, strict=True):
        asked = weight / sum(weights)
        if asked < 1 / MIXTURE_PERIOD_ROWS:
            text = "corpus %s: its weight asks for %.4f %% of the rows but it gets %.4f %%, one row in %d, the least"
            notes.append((logging.WARNING, text % (name, 100 * asked, 100 * share, MIXTURE_PERIOD_ROWS)))
        elif abs(share / asked - 1) > 0.01:
            text = "corpus %s: its weight asks for %.4f %% of the rows and it gets %.4f %%, whole rows of %d"
            notes.append((logging.INFO, text % (name, 100 * asked, 100 * share, MIXTURE_PERIOD_ROWS)))
    return notes


def masking_rule(objective: ObjectiveConfig, sequence_length: int, special: SpecialIds, vocab_size: int) -> MaskingRule:
    """How rows of ``sequence_length`` tokens are masked."""
    return MaskingRule(
        masked_per_row=objective.masked_per_row(sequence_length),
        mask_token_share=objective.mask_token_share,
        mask_id=special.mask,
        never_selected=special.never_masked + (() if objective.select_unknown else (special.unk,)),
        with_replacement=objective.position_sampling == "with_replacement",
        random_token_share=objective.random_token_share,
        vocab_size=vocab_size,
    )


def to_micro_batch(
    rows: KeyedRows, config: Config, vocab_size: int, device: str, seed: int, weight: float
) -> MicroBatch:
    """Masks rows on the host and moves them to ``device``.

    Raises:
        DamagedDataError: An id that the vocabulary does not have; a GPU would read and write behind the table.
    """
    objective, special = config.objective, rows.special
    if rows.rows.token_ids.size and (highest := int(rows.rows.token_ids.max())) >= vocab_size:
        folders = filter(None, (config.data.local_dir, config.shards_dir))
        commands = " or ".join(f"`electra shards verify {folder}`" for folder in folders)
        raise DamagedDataError(
            f"a row has the token id {highest:,}, but the vocabulary has {vocab_size:,}: a shard is damaged; find it "
            f"by {commands} on {socket.gethostname()}, and restore it"
        )
    token_ids_BT = _tensor(rows.rows.token_ids)
    rule = masking_rule(objective, config.data.sequence_length, special, vocab_size)
    is_unscored_BT = counts_B = None
    if rows.has_padding:  # a share of the tokens that are there, at least one
        is_unscored_BT = token_ids_BT == special.pad
        num_tokens_B = (~is_unscored_BT).sum(1)
        counts_B = (num_tokens_B * objective.mask_fraction).round().long().clamp(1, rule.masked_per_row)
    if not objective.score_special_tokens:
        is_special_BT = (token_ids_BT == special.cls) | (token_ids_BT == special.sep)
        is_unscored_BT = is_special_BT if is_unscored_BT is None else is_unscored_BT | is_special_BT
    keys_B = torch.from_numpy(rows.keys.view(np.int64))
    batch = MicroBatch(
        token_ids_BT=token_ids_BT,
        positions_BT=_tensor(rows.rows.positions),
        token_types_BT=_tensor(rows.rows.token_types),
        packing=Packing(_tensor(rows.rows.pieces)),
        masking=select_and_mask(token_ids_BT, keys_B, rule, counts_B),
        seed=seed,
        weight=weight,
        is_unscored_BT=is_unscored_BT,
    )
    return to_device(batch, device)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).long()


def to_device(batch: MicroBatch, device: str) -> MicroBatch:
    """A micro-batch moved to ``device``. From pinned memory the copies are queued on the current stream, in which
    the work that reads them comes later, and nobody waits; torch keeps the pinned memory until they are done.
    """
    return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _with_tensors(batch: MicroBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    """A micro-batch with each of its tensors changed."""
    masking, is_unscored_BT = batch.masking, batch.is_unscored_BT
    return replace(
        batch,
        token_ids_BT=change(batch.token_ids_BT),
        positions_BT=change(batch.positions_BT),
        token_types_BT=change(batch.token_types_BT),
        packing=replace(batch.packing, pieces_BT=change(batch.packing.pieces_BT)),
        masking=Masking(change(masking.positions_BM), change(masking.weights_BM), change(masking.generator_ids_BT)),
        is_unscored_BT=None if is_unscored_BT is None else change(is_unscored_BT),
    )


class MicroBatches:
    """The micro-batches of a step that belong to one process, on the host: what is counted waits for no device."""

    def __init__(
        self, config: Config, plan: Plan, process: Process, loader: RowLoader, device: str,
        skips: Sequence[SkippedRows] = (),
    ):  # fmt: skip
        """Rank r of w runs the micro-batches r, r + w, r + 2w, …; their memory is pinned for a GPU's sake."""
        self._skips = skips
        self._config, self._plan, self._process = config, plan, process
        self._loader, self._pins = loader, device == "cuda"

    def of_step(self, step: int) -> Iterator[tuple[int, MicroBatch]]:
        """Yields (number of the micro-batch in the global batch, micro-batch).

        A process without one in the last round runs micro-batch 0 at weight 0: every
        process must take part in every collective of the backward pass.
        """
        plan, seed = self._plan, self._config.run.seed
        for turn in range(plan.accumulation_steps):
            number = turn * plan.world_size + self._process.rank
            weight = 1.0 if number < plan.micro_batches_per_step else 0.0
            first = number * plan.micro_batch_rows if weight else 0
            rows = self._loader.rows_at(step_of_rows(step, self._skips), first, plan.micro_batch_rows)
            draws = seed_for(seed, step, number, DRAWS)
            batch = to_micro_batch(rows, self._config, plan.vocab_size, "cpu", draws, weight)
            yield number, _with_tensors(batch, torch.Tensor.pin_memory) if self._pins else batch
