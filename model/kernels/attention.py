"""Attention within the pieces of packed rows, with dropout on the probabilities.

Shapes: B rows, H heads, T tokens, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST_IN_BUCKET = 0.75


@dataclass(frozen=True)
class Packing:
    """Which tokens of a row belong together; every layer of both networks shares it.

    Attributes:
        pieces_BT: Number of the piece in the row. Tokens attend within their piece.
        lengths: Tokens of each piece, where they are known on the host and fill a single row one after the
            other; attention can then go by piece. None otherwise.
    """

    pieces_BT: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """One row of pieces of so many tokens each."""
        lengths_P = torch.tensor(lengths, device=device)
        pieces_T = torch.arange(len(lengths), device=device).repeat_interleave(lengths_P)
        return cls(pieces_T[None], tuple(lengths))

    @cached_property
    def same_piece_B1TT(self) -> Tensor:
        """True where a token may attend to another one."""
        return (self.pieces_BT[:, :, None] == self.pieces_BT[:, None, :])[:, None]

    @cached_property
    def buckets(self) -> "Buckets":
        """The pieces by length; needs ``lengths``."""
        assert self.lengths
        return Buckets.of_lengths(self.lengths, self.pieces_BT.device)


@dataclass(frozen=True)
class Buckets:
    """Pieces of one row, grouped so that little is padded.

    Attributes:
        slots: For each bucket ``(P, L)``: P pieces, L tokens of the longest; each slot's token in the row.
        is_real: For each bucket ``(P, L)``: False where a slot is padding; None where none is.
        place_T: Where a token of the row is among the slots of all buckets, one bucket after the other.
    """

    slots: tuple[Tensor, ...]
    is_real: tuple[Tensor | None, ...]
    place_T: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> "Buckets":
        """Puts pieces together that are at least three quarters as long as the longest of them."""
        first_token = list(accumulate(lengths, initial=0))
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if not groups or lengths[number] < _SHORTEST_IN_BUCKET * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(number)
        slots, is_real, place_T, num_slots = [], [], torch.empty(first_token[-1], dtype=torch.long), 0
        for group in groups:
            longest = lengths[group[0]]
            offsets_L = torch.arange(longest)
            lengths_P1 = torch.tensor([[lengths[number]] for number in group])
            real_PL = offsets_L < lengths_P1
            slots_PL = torch.tensor([[first_token[number]] for number in group]) + offsets_L.minimum(lengths_P1 - 1)
            place_T[slots_PL[real_PL]] = num_slots + real_PL.flatten().nonzero().squeeze(1)
            num_slots += slots_PL.numel()
            slots.append(slots_PL.to(device))
            is_real.append(None if real_PL.all() else real_PL.to(device))
        return cls(tuple(slots), tuple(is_real), place_T.to(device))


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
    """The same through ``F.scaled_dot_product_attention``, which picks a fused kernel; by piece where that can be."""
    if packing.lengths:
        return _attend_by_piece(query_BHTD, key_BHTD, value_BHTD, packing.buckets, dropout)
    return F.scaled_dot_product_attention(
        query_BHTD, key_BHTD, value_BHTD, attn_mask=packing.same_piece_B1TT, dropout_p=dropout
    )


def _attend_by_piece(
    query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, buckets: Buckets, dropout: float
) -> Tensor:
    """Costs the square of a piece's length, not of the row's. Within: P pieces of a bucket, L its longest."""

    def gather(tensor_1HTD: Tensor, slots_PL: Tensor) -> Tensor:
        of_slots = tensor_1HTD[0].transpose(0, 1).index_select(0, slots_PL.flatten())
        return of_slots.unflatten(0, slots_PL.shape).transpose(1, 2)

    contexts = []
    for slots_PL, real_PL in zip(buckets.slots, buckets.is_real, strict=True):
        query_PHLD, key_PHLD, value_PHLD = (gather(t, slots_PL) for t in (query_1HTD, key_1HTD, value_1HTD))
        mask_P11L = None if real_PL is None else real_PL[:, None, None, :]
        context_PHLD = F.scaled_dot_product_attention(
            query_PHLD, key_PHLD, value_PHLD, attn_mask=mask_P11L, dropout_p=dropout
        )
        contexts.append(context_PHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(contexts).index_select(0, buckets.place_T).transpose(0, 1)[None]


ATTENTION: dict[str, Attention] = {"reference": reference_attention, "torch": torch_attention}
