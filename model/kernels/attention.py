"""Attention within the pieces of packed rows, with dropout on the probabilities.

Shapes: B rows, T tokens of a row, N = B·T, H heads, D head size; P pieces of a bucket, L tokens of the longest.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.dropout import Dropout, keep_rows_numpy, keeps

_SHORTEST_IN_BUCKET = 0.8
_ONE_BUCKET_TOKENS = 32  # pieces up to it share a bucket: a bucket of its own costs more than the padding
_SCORES_OF_BUCKET = 1 << 18  # of each head, on a CPU: what its caches hold


@dataclass(frozen=True)
class Packing:
    """Which tokens of a row belong together; every layer of both networks shares it.

    Attributes:
        pieces_BT: Number of the piece in the row, ascending. Tokens attend within their piece.
        known_lengths: Tokens of each piece, row after row, where the host knows them; else None.
    """

    pieces_BT: Tensor
    known_lengths: tuple[int, ...] | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Packing":
        """One row of pieces of so many tokens each."""
        lengths_P = torch.tensor(lengths, device=device)
        pieces_T = torch.arange(len(lengths), device=device).repeat_interleave(lengths_P)
        return cls(pieces_T[None], tuple(lengths))

    @cached_property
    def begin_BT(self) -> Tensor:
        """Where in its row each token's piece begins, int64; no shape depends on values."""
        is_first_BT = torch.ones_like(self.pieces_BT, dtype=torch.bool)
        is_first_BT[:, 1:] = self.pieces_BT[:, 1:] != self.pieces_BT[:, :-1]
        position_T = torch.arange(self.pieces_BT.shape[1], device=self.pieces_BT.device)
        return (position_T * is_first_BT).cummax(1).values

    @cached_property
    def end_BT(self) -> Tensor:
        """Where in its row each token's piece has ended, int64."""
        length = self.pieces_BT.shape[1]
        return length - Packing(self.pieces_BT.flip(1)).begin_BT.flip(1)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece, row after row; waits for the device where the host does not know them."""
        if self.known_lengths:
            return self.known_lengths
        position_T = torch.arange(self.pieces_BT.shape[1], device=self.pieces_BT.device)
        sizes_BT = (self.end_BT - self.begin_BT)[self.begin_BT == position_T]
        return tuple(sizes_BT.tolist())

    @cached_property
    def same_piece_B1TT(self) -> Tensor:
        """True where a token may attend to another one."""
        return (self.pieces_BT[:, :, None] == self.pieces_BT[:, None, :])[:, None]

    @cached_property
    def buckets(self) -> "Buckets":
        """The pieces by length."""
        return Buckets.of_lengths(self.lengths, self.pieces_BT.device)


@dataclass(frozen=True)
class Buckets:
    """Pieces of all rows, grouped so that little is padded.

    Attributes:
        slots: For each bucket ``(P, L)``: each slot's token among all N.
        is_real: For each bucket ``(P, L)``: False where a slot is padding; None where none is.
        place_N: Where a token is among the slots of all buckets, one bucket after the other.
    """

    slots: tuple[Tensor, ...]
    is_real: tuple[Tensor | None, ...]
    place_N: Tensor
    _gathers: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> "Buckets":
        """Puts pieces together that are at least four fifths as long as the longest of them, and short ones."""
        first_token = list(accumulate(lengths, initial=0))
        limit = _SCORES_OF_BUCKET if torch.device(device).type == "cpu" else sys.maxsize
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[groups[-1][0]] if groups else 0
            is_full = bool(groups) and (len(groups[-1]) + 1) * longest**2 > limit
            is_much_shorter = longest > _ONE_BUCKET_TOKENS and lengths[number] < _SHORTEST_IN_BUCKET * longest
            if is_full or is_much_shorter or not groups:
                groups.append([])
            groups[-1].append(number)
        slots, is_real, place_N, num_slots = [], [], torch.empty(first_token[-1], dtype=torch.long), 0
        for group in groups:
            offsets_L = torch.arange(lengths[group[0]])
            lengths_P1 = torch.tensor([[lengths[number]] for number in group])
            real_PL = offsets_L < lengths_P1
            slots_PL = torch.tensor([[first_token[number]] for number in group]) + offsets_L.minimum(lengths_P1 - 1)
            place_N[slots_PL[real_PL]] = num_slots + real_PL.flatten().nonzero().squeeze(1)
            num_slots += slots_PL.numel()
            slots.append(slots_PL.to(device))
            is_real.append(None if real_PL.all() else real_PL.to(device))
        return cls(tuple(slots), tuple(is_real), place_N.to(device))

    def gathers(self, heads: int) -> list[Tensor]:
        """For each bucket: the vectors ``(3, P, H, L)``, flat, among the ``N·3·H`` of queries, keys and values."""
        if heads not in self._gathers:
            device = self.place_N.device
            which_311 = torch.arange(3, device=device)[:, None, None, None]
            head_H1 = torch.arange(heads, device=device)[:, None]
            self._gathers[heads] = [
                ((slots_PL[:, None] * 3 + which_311) * heads + head_H1).flatten() for slots_PL in self.slots
            ]
        return self._gathers[heads]


Attention = Callable[[Tensor, Packing, Dropout | None], Tensor]


def reference_attention(qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
    """Softmax(QK^T / sqrt(D)) V by plain products; the softmax in fp32.

    Args:
        qkv_BT3HD: Queries, keys and values; may be a view.
        packing: Pieces of the rows.
        dropout: Of probabilities. Row ``n·H + h`` for query n of all N, head h; column: the key's place in its piece.

    Returns:
        ``(B, T, H, D)`` in the dtype of the queries.
    """
    query_BHTD, key_BHTD, value_BHTD = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind(0)
    rows, heads, length, size = query_BHTD.shape
    scores_BHTT = (query_BHTD @ key_BHTD.transpose(-1, -2)).to(_softmax_dtype(query_BHTD)) / size**0.5
    probabilities_BHTT = scores_BHTT.masked_fill(~packing.same_piece_B1TT, -torch.inf).softmax(-1)
    if dropout is not None:
        device = query_BHTD.device
        query_BHT1 = torch.arange(rows * length, device=device).view(rows, 1, length, 1)
        head_H11 = torch.arange(heads, device=device)[:, None, None]
        offset_B11T = (torch.arange(length, device=device) - packing.begin_BT)[:, None, None, :]
        keep_BHTT = keeps(dropout, query_BHT1 * heads + head_H11, offset_B11T.clamp(min=0))
        probabilities_BHTT = probabilities_BHTT * keep_BHTT * dropout.scale
    return (probabilities_BHTT.to(value_BHTD.dtype) @ value_BHTD).transpose(1, 2)


def torch_attention(qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
    """The same piece by piece on a CPU and where the host knows the lengths.

    Elsewhere ``F.scaled_dot_product_attention`` over whole rows with a mask; its dropout draws from torch's generator.
    """
    if qkv_BT3HD.device.type == "cpu" or packing.known_lengths:
        return _PieceAttention.apply(qkv_BT3HD, packing, dropout)  # type: ignore[no-any-return]
    query_BHTD, key_BHTD, value_BHTD = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind(0)
    probability = dropout.probability if dropout else 0.0
    context_BHTD = F.scaled_dot_product_attention(
        query_BHTD, key_BHTD, value_BHTD, attn_mask=packing.same_piece_B1TT, dropout_p=probability
    )
    return context_BHTD.transpose(1, 2)


class _PieceAttention(torch.autograd.Function):
    """Costs the square of a piece's length, not of the row's. Keeps the probabilities, draws dropout's mask again."""

    @staticmethod
    def forward(ctx: Any, qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
        rows, length, _, heads, size = qkv_BT3HD.shape
        vectors = qkv_BT3HD.reshape(-1, size)
        buckets, contexts, kept = packing.buckets, [], []
        for number, gather in enumerate(buckets.gathers(heads)):
            (num_pieces, longest), is_real_PL = buckets.slots[number].shape, buckets.is_real[number]
            query, key, value = vectors.index_select(0, gather).view(3, num_pieces * heads, longest, size).unbind(0)
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=size**-0.5)
            if is_real_PL is not None:
                scores.unflatten(0, (-1, heads)).masked_fill_(~is_real_PL[:, None, None], -torch.inf)
            probabilities, scale = scores.softmax(-1), 1.0
            keep = _keep_of(buckets.slots[number], heads, dropout)
            kept.append(probabilities)
            if keep is not None and dropout is not None:
                probabilities, scale = probabilities * keep, dropout.scale
            context = torch.baddbmm(query.new_empty(1, 1, 1), probabilities, value, beta=0, alpha=scale)
            contexts.append(context.view(num_pieces, heads, longest, size).transpose(1, 2).flatten(0, 1))
        ctx.packing, ctx.dropout = packing, dropout
        ctx.save_for_backward(qkv_BT3HD, *kept)
        context_NHD = (contexts[0] if len(contexts) == 1 else torch.cat(contexts)).index_select(0, buckets.place_N)
        return context_NHD.view(rows, length, heads, size)

    @staticmethod
    def backward(ctx: Any, gradient_BTHD: Tensor) -> Any:
        qkv_BT3HD, *kept = ctx.saved_tensors
        rows, length, _, heads, size = qkv_BT3HD.shape
        vectors, incoming = qkv_BT3HD.reshape(-1, size), gradient_BTHD.reshape(-1, heads * size)
        buckets, outgoing, dropout = ctx.packing.buckets, [], ctx.dropout
        scale = dropout.scale if dropout else 1.0
        for number, gather in enumerate(buckets.gathers(heads)):
            (num_pieces, longest), is_real_PL = buckets.slots[number].shape, buckets.is_real[number]
            query, key, value = vectors.index_select(0, gather).view(3, num_pieces * heads, longest, size).unbind(0)
            probabilities, keep = kept[number], _keep_of(buckets.slots[number], heads, dropout)
            d_context = incoming.index_select(0, buckets.slots[number].flatten())
            d_context = d_context.view(num_pieces, longest, heads, size).transpose(1, 2)
            if is_real_PL is not None:
                d_context = d_context * is_real_PL[:, None, :, None]
            d_context = d_context.reshape(-1, longest, size)
            nothing = query.new_empty(1, 1, 1)
            d_probabilities = torch.baddbmm(nothing, d_context, value.transpose(1, 2), beta=0, alpha=scale)
            dropped = probabilities
            if keep is not None:
                d_probabilities, dropped = d_probabilities.mul_(keep), probabilities * keep
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, query.dtype)
            d_qkv = query.new_empty(3, *query.shape)
            torch.baddbmm(nothing, d_scores, key, beta=0, alpha=size**-0.5, out=d_qkv[0])
            torch.baddbmm(nothing, d_scores.transpose(1, 2), query, beta=0, alpha=size**-0.5, out=d_qkv[1])
            torch.baddbmm(nothing, dropped.transpose(1, 2), d_context, beta=0, alpha=scale, out=d_qkv[2])
            d_qkv_P3L = d_qkv.view(3, num_pieces, heads, longest, size).permute(1, 3, 0, 2, 4)
            outgoing.append(d_qkv_P3L.reshape(num_pieces * longest, -1))
        d_qkv_N = (outgoing[0] if len(outgoing) == 1 else torch.cat(outgoing)).index_select(0, buckets.place_N)
        return d_qkv_N.view(rows, length, 3, heads, size), None, None


def _keep_of(slots_PL: Tensor, heads: int, dropout: Dropout | None) -> Tensor | None:
    """Which probabilities of a bucket stay, uint8 ``(P·H, L, L)``."""
    if dropout is None:
        return None
    longest, device = slots_PL.shape[1], slots_PL.device
    rows_PHL = slots_PL[:, None, :] * heads + torch.arange(heads, device=device)[:, None]
    if device.type == "cpu":
        keep = torch.from_numpy(keep_rows_numpy(dropout, rows_PHL.numpy().astype(np.uint32).reshape(-1), longest))
    else:
        keep = keeps(dropout, rows_PHL.reshape(-1, 1), torch.arange(longest, device=device))
    return keep.view(torch.uint8).view(-1, longest, longest)


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


ATTENTION: dict[str, Attention] = {"reference": reference_attention, "torch": torch_attention}
