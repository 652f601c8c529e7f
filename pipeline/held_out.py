"""How good both networks are on text that was never trained on, with the figures to beat."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_shards.loader import KeyedRows, held_out_rows
from data_shards.rows import Rows
from model.batch import GlobalCounts, MicroBatch
from model.objective import Trains
from model.statistics import Statistics, count_ordered_pairs
from pipeline.batches import to_micro_batch
from pipeline.config import Config
from pipeline.distributed import Control, Process
from pipeline.engine import Engine
from pipeline.plan import Plan
from pipeline.unigram import unigram_entropy

SEED = 20200323
"""Fixed: every run is scored on the same rows and masks."""


class HeldOut:
    """``train.held_out_rows`` held-out rows, with fixed masks.

    Attributes:
        digest: Of these rows and their masks' keys, the same on every process; None when there are none.
    """

    def __init__(
        self, config: Config, plan: Plan, engine: Engine, folders: list[Path], weights: list[float], process: Process,
        control: Control, device: str,
    ):  # fmt: skip
        self._config, self._plan, self._engine, self._folders, self._weights = config, plan, engine, folders, weights
        self._process, self._control, self._device = process, control, device
        self._keyed = held_out_rows(folders, weights, config.data.sequence_length, config.train.held_out_rows, SEED)
        self.digest = _digest_of(self._keyed) if self._keyed else None
        self._unigram_entropy: float | None = None

    def score(self, trains: Trains, mark: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Scores both networks, without dropout; the generator alone while it is trained alone.

        The masked language model's loss counts positions that hide the original alone: to copy an unmasked
        token proves nothing.

        Args:
            trains: Which network is trained now, or was at the end.
            mark: Is called before each micro-batch, as often on every process.

        Returns:
            ``held_out/`` metrics; empty when nothing is held out. Losses and entropies in nats.
        """
        if self._keyed is None:
            return {}
        total, scores, labels = Statistics.zeros(), [], []
        for batch in self._micro_batches(self._keyed):
            mark()
            sums, logits_BT, is_replaced_BT = self._engine.evaluate(batch, GlobalCounts(1, 1), trains)
            total = total + Statistics(sums.sums.cpu())
            if batch.weight and logits_BT is not None and is_replaced_BT is not None:
                counts_BT = self._scored(batch)
                scores.append(logits_BT[counts_BT].cpu())
                labels.append(is_replaced_BT[counts_BT].cpu())
        total = Statistics(self._control.sum_tensor(total.sums))
        gathered = self._control.gather((torch.cat(scores), torch.cat(labels)) if scores else None)
        objective = self._config.objective
        metrics = total.metrics(
            objective.generator_loss_weight, objective.discriminator_loss_weight, objective.prediction_loss_weight
        )
        metrics.pop("train/discriminator_auc", None)  # of pairs within a micro-batch; below, of all pairs
        result = {f"held_out/{name.removeprefix('train/')}": value for name, value in metrics.items()}
        parts = [part for part in gathered if part]
        if parts:
            auc, error = auc_with_standard_error(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
            if not math.isnan(auc):
                result |= {"held_out/discriminator_auc": auc, "held_out/discriminator_auc_standard_error": error}
        return result | {"held_out/unigram_entropy": self._entropy(), "held_out/rows": float(len(self._keyed.keys))}

    def _micro_batches(self, keyed: KeyedRows) -> Iterator[MicroBatch]:
        """This process's micro-batches; one of weight 0 where the others have one more."""
        num_rows, micro = len(keyed.keys), self._plan.micro_batch_rows
        micro_batches = math.ceil(num_rows / micro)
        for turn in range(math.ceil(micro_batches / self._process.world_size)):
            number = turn * self._process.world_size + self._process.rank
            weight = 1.0 if number < micro_batches else 0.0
            first = number * micro if weight else 0
            rows, keys = slice_rows(keyed.rows, first, first + micro), keyed.keys[first : first + micro]
            part = replace(keyed, rows=rows, keys=keys)
            vocab_size = self._plan.vocab_size
            yield to_micro_batch(part, self._config, vocab_size, self._device, SEED + number, weight)

    def _scored(self, batch: MicroBatch) -> torch.Tensor:
        """Tokens that the discriminator is trained on, bool ``(B, T)``."""
        if self._config.objective.name == "electra_15":
            return batch.masking.times_selected_BT > 0
        return batch.token_weights_BT > 0

    def _entropy(self) -> float:
        """Counted once, by the first process."""
        if self._unigram_entropy is None:
            is_first = self._control.is_first
            found = unigram_entropy(self._folders, self._weights, self._plan.vocab_size) if is_first else None
            self._unigram_entropy = float(self._control.broadcast(found))
        return self._unigram_entropy


def _digest_of(keyed: KeyedRows) -> str:
    """Sixteen hexadecimal digits: scores of other rows are no measure for these."""
    content = np.ascontiguousarray(keyed.keys).tobytes() + np.ascontiguousarray(keyed.rows.token_ids).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def auc_with_standard_error(scores_N: torch.Tensor, is_positive_N: torch.Tensor) -> tuple[float, float]:
    """Area under the ROC curve and its standard error (Hanley and McNeil, 1982); NaN without both classes."""
    positives = int(is_positive_N.sum())
    negatives = len(is_positive_N) - positives
    if positives == 0 or negatives == 0:
        return math.nan, math.nan
    ordered, pairs = count_ordered_pairs(scores_N.float(), is_positive_N.bool(), ~is_positive_N.bool())
    auc = float(ordered / pairs)
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc * auc) + (negatives - 1) * (q2 - auc * auc)
    return auc, math.sqrt(max(0.0, variance) / (positives * negatives))


def slice_rows(rows: Rows, begin: int, end: int) -> Rows:
    """Rows ``[begin, end)``, fewer where there are no more."""
    return Rows(*(array[begin:end] for array in (rows.token_ids, rows.token_types, rows.positions, rows.pieces)))
