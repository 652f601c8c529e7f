"""What one forward pass reads, and what its losses are divided by.

Shapes: B rows, T tokens of a row, M selected positions of a row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.kernels.attention import Packing
from model.masking import Masking

_IDLE_TOKENS = 8


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        token_ids_BT: Original tokens.
        positions_BT: Position of each token in its piece.
        token_types_BT: Segment of each token, 0 or 1.
        packing: Pieces of the rows.
        masking: Selected positions and the generator's input.
        seed: Of its random draws: replacements, and dropout.
        weight: 1, or 0 for rows that only keep a process in step with the others.
        is_unscored_BT: True where the loss over all tokens leaves one out: padding, and special tokens
            where the objective says so; None where all count.
    """

    token_ids_BT: Tensor
    positions_BT: Tensor
    token_types_BT: Tensor
    packing: Packing
    masking: Masking
    seed: int
    weight: float = 1.0
    is_unscored_BT: Tensor | None = None

    @property
    def num_masked(self) -> Tensor:
        """Selected positions that count, a scalar on the device."""
        return self.masking.weights_BM.sum() * self.weight

    @property
    def token_weights_BT(self) -> Tensor:
        """1 for each token that counts, else 0; float32."""
        if self.is_unscored_BT is None:
            return torch.full_like(self.token_ids_BT, self.weight, dtype=torch.float32)
        return (~self.is_unscored_BT).float() * self.weight

    @property
    def num_tokens(self) -> float:
        """Tokens that count."""
        num_unscored = 0 if self.is_unscored_BT is None else int(self.is_unscored_BT.sum())
        return (self.token_ids_BT.numel() - num_unscored) * self.weight

    def idle(self) -> "MicroBatch":
        """A few tokens of weight 0: a network that rests runs on them, so that its parameters have gradients."""
        few_BT = (slice(1), slice(_IDLE_TOKENS))
        position_B1 = self.masking.positions_BM.new_zeros(1, 1)
        return replace(
            self,
            token_ids_BT=self.token_ids_BT[few_BT],
            positions_BT=self.positions_BT[few_BT],
            token_types_BT=self.token_types_BT[few_BT],
            packing=Packing(self.packing.pieces_BT[few_BT]),
            masking=Masking(position_B1, position_B1.float(), self.token_ids_BT[few_BT]),
            weight=0.0,
            is_unscored_BT=None,
        )


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of the losses: selected positions and tokens of the whole global batch."""

    masked: float
    tokens: float
