"""Attention within the pieces of packed rows, with dropout on the probabilities.

Shapes: B rows, H heads, T tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which tokens of a row belong together; every layer of both networks shares it.

    Attributes:
        pieces_BT: Number of the piece in the row. Tokens attend within their piece.
    """

    pieces_BT: Tensor

    @cached_property
    def same_piece_B1TT(self) -> Tensor:
        """True where a token may attend to another one."""
        return (self.pieces_BT[:, :, None] == self.pieces_BT[:, None, :])[:, None]


Attention = Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]


def reference_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, packing: Packing, dropout: float
) -> Tensor:
    """Softmax(QK^T / sqrt(D)) V by plain products; the softmax in fp32.

    Args:
        query_BHTD: Queries; ``key_BHTD`` and ``value_BHTD`` have the same shape.
        packing: Pieces of the rows.
        dropout: Probability of dropping an attention probability, 0 when not training.

    Returns:
        ``(B, H, T, D)`` in the dtype of the queries.
    """
    scores_BHTT = query_BHTD @ key_BHTD.transpose(-1, -2) / query_BHTD.shape[-1] ** 0.5
    scores_BHTT = scores_BHTT.float().masked_fill(~packing.same_piece_B1TT, -torch.inf)
    probabilities_BHTT = F.dropout(scores_BHTT.softmax(-1), dropout, training=dropout > 0)
    return probabilities_BHTT.to(value_BHTD.dtype) @ value_BHTD


def torch_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, packing: Packing, dropout: float
) -> Tensor:
    """The same through ``F.scaled_dot_product_attention``, which picks a fused kernel."""
    return F.scaled_dot_product_attention(
        query_BHTD, key_BHTD, value_BHTD, attn_mask=packing.same_piece_B1TT, dropout_p=dropout
    )


ATTENTION: dict[str, Attention] = {"reference": reference_attention, "torch": torch_attention}
