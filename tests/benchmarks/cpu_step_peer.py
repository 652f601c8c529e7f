"""The peer of ``cpu_step.py``: ELECTRA's pretraining loop as one writes it with transformers' two models.

Shapes: B rows, T tokens of a row, N masked tokens of the batch, V vocabulary.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peers import HfElectra
from torch import Tensor, nn

from pipeline.config import Config

_IGNORED = -100


@dataclass(frozen=True)
class PeerBatch:
    """What ``DataCollatorForLanguageModeling`` returns.

    Attributes:
        input_ids_BT: [MASK] at most of the masked tokens.
        labels_BT: The original at masked tokens, else -100.
        attention_mask_BT: 0 at padding; None where there is none.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    attention_mask_BT: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.input_ids_BT.numel() if self.attention_mask_BT is None else int(self.attention_mask_BT.sum())


def peer_batch(collate: Any, rows: Iterable[np.ndarray]) -> PeerBatch:
    """Pads rows to the longest of them and masks them; the attention mask is left out when nothing is padded.

    Args:
        collate: From ``row_peers.make_collator``.
        rows: Token ids of each row, [CLS] and [SEP] in place.
    """
    collate.pad_to_multiple_of = 8
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    mask_BT = batch["attention_mask"]
    return PeerBatch(batch["input_ids"], batch["labels"], None if mask_BT.all() else mask_BT)


class CollatedElectra(HfElectra):
    """The two models on a collator's batch: Gumbel sampling at the masked tokens alone."""

    def forward(self, batch: PeerBatch) -> Tensor:  # type: ignore[override]
        """The weighted loss."""
        mask_BT = batch.attention_mask_BT
        generated = self.generator(input_ids=batch.input_ids_BT, attention_mask=mask_BT, labels=batch.labels_BT)
        is_masked_BT = batch.labels_BT != _IGNORED
        logits_NV = generated.logits.detach()[is_masked_BT].float()
        noise_NV = torch.empty_like(logits_NV).exponential_()
        original_BT = torch.where(is_masked_BT, batch.labels_BT, batch.input_ids_BT)
        corrupted_BT = original_BT.masked_scatter(is_masked_BT, (logits_NV - noise_NV.log()).argmax(-1))
        discriminated = self.discriminator(
            input_ids=corrupted_BT, attention_mask=mask_BT, labels=(corrupted_BT != original_BT).long()
        )
        return self.generator_weight * generated.loss + self.discriminator_weight * discriminated.loss


class PeerTrainer:
    """One optimizer step: torch's AdamW, fused as transformers' Trainer has it, gradients clipped."""

    def __init__(self, config: Config, attention: str, uses_autocast: bool):
        """Random weights.

        Args:
            config: Sizes, learning rate, clipping.
            attention: transformers' name of an implementation: ``eager`` or ``sdpa``.
            uses_autocast: Whether the forward pass runs under ``torch.autocast`` in bf16.
        """
        self.model = CollatedElectra(config, config.tokenizer.vocab_size, attention).train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optimizer.lr, fused=True)
        self._clip, self._uses_autocast = config.optimizer.gradient_clip, uses_autocast

    @property
    def num_parameters(self) -> int:
        """Trained parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, batch: PeerBatch) -> None:
        """Forward, backward, update."""
        with torch.autocast("cpu", torch.bfloat16) if self._uses_autocast else nullcontext():
            loss = self.model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
