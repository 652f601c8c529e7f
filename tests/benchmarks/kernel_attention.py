"""Attention in packed rows: cases, formulas in float64, torch's own kernels as peers.

Shapes: B rows, H heads, T tokens, D head size.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_case import DROPOUT, Case, Cost, Peer, Tensors
from synthetic import random_pieces
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.kernels.attention import Packing
from model.kernels.dropout import Dropout, keeps

_LARGE_HEADS = {"discriminator": 16, "generator": 4}
_TINY_HEADS = {"discriminator": 2, "generator": 1}
_DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """Heads of both networks, rows of one piece and of several."""
    rows, length, size = (2, 24, 16) if is_tiny else (64 if for_times else 4, 512, 64)
    for network, heads in (_TINY_HEADS if is_tiny else _LARGE_HEADS).items():
        for number in ("one piece", "several pieces"):
            pieces_BT = random_pieces(rows, length, number == "several pieces").to(device)
            name = f"{network}, {number}, {rows}×{length}×{heads}×{size}"
            yield _case(name, Packing(pieces_BT), heads, size, device, is_dense=number == "one piece")


def _case(name: str, packing: Packing, heads: int, size: int, device: str, is_dense: bool) -> Case:
    rows, length = packing.pieces_BT.shape
    scores = float(packing.same_piece_B1TT.sum()) * heads
    num_bytes = 2 * rows * length * heads * size  # of one of the four vectors, in bf16
    product = 2 * scores * size

    def make(dtype: torch.dtype) -> Tensors:
        return {"qkv": torch.randn(rows, length, 3, heads, size, device=device, dtype=torch.float64).to(dtype)}

    def run(function: Any, leaves: Tensors, dropout: Dropout | None) -> Tensors:
        return {"output": function(leaves["qkv"], packing, dropout)}

    return Case(
        name,
        make,
        run,
        lambda leaves, dropout: {"output": _exact(leaves["qkv"], packing, dropout)},
        _dense_peers(device) if is_dense else {"sdpa with a mask": partial(_masked_peer, packing)},
        Cost(4 * num_bytes, 2 * product),
        Cost(12 * num_bytes, 7 * product),  # the scores are made again
        keep=lambda dropout: _keep_of_identity(dropout, device),
        kept=lambda function, dropout: _kept(function, dropout, device),
        draws_otherwise=frozenset({"torch"} if device == "cuda" else ()),
    )


def _exact(qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
    """Dropout(softmax(QK^T / sqrt(D))) V within pieces."""
    query_BHTD, key_BHTD, value_BHTD = qkv_BT3HD.permute(2, 0, 3, 1, 4)
    scores_BHTT = query_BHTD @ key_BHTD.transpose(-1, -2) / math.sqrt(query_BHTD.shape[-1])
    pieces_BT = packing.pieces_BT
    same_piece_BTT = pieces_BT[:, :, None] == pieces_BT[:, None, :]
    probabilities_BHTT = scores_BHTT.masked_fill(~same_piece_BTT[:, None], -torch.inf).softmax(-1)
    if dropout:
        keep_BHTT = _keep(dropout, packing, query_BHTD.shape[1])
        probabilities_BHTT = probabilities_BHTT * keep_BHTT * dropout.scale
    return (probabilities_BHTT @ value_BHTD).transpose(1, 2)


def _keep(dropout: Dropout, packing: Packing, heads: int) -> Tensor:
    """By the definition: a row for each token and head, a column for each place in the piece."""
    rows, length = packing.pieces_BT.shape
    token_BT = torch.arange(rows * length, device=packing.pieces_BT.device).view(rows, length)
    row_BHT1 = (token_BT[:, None] * heads + torch.arange(heads, device=token_BT.device)[:, None])[..., None]
    place_B11T = (token_BT[:1] - packing.begin_BT)[:, None, None]
    return keeps(dropout, row_BHT1, place_B11T.clamp(min=0))


_IDENTITY = (4, 2, 64)  # rows, heads, tokens and head size


def _keep_of_identity(dropout: Dropout, device: str) -> Tensor:
    rows, heads, size = _IDENTITY
    return _keep(dropout, Packing(torch.zeros(rows, size, dtype=torch.long, device=device)), heads).flatten(0, 1)


def _kept(function: Any, dropout: Dropout, device: str) -> tuple[Tensor, Tensor]:
    """With V = I the output is P·M / (1 - p); with an output gradient of I that of V is its transpose."""
    rows, heads, size = _IDENTITY
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key = (torch.randn(rows, size, heads, size, device=device).to(dtype) for _ in "qk")
    identity = torch.eye(size, dtype=dtype, device=device)[None, :, None].expand(rows, size, heads, size)
    qkv_BT3HD = torch.stack([query, key, identity], 2).requires_grad_()
    out = function(qkv_BT3HD, Packing(torch.zeros(rows, size, dtype=torch.long, device=device)), dropout)
    (gradient,) = torch.autograd.grad(out, qkv_BT3HD, identity.contiguous())
    forward_BHTT, backward_BHTT = out.detach().transpose(1, 2), gradient[:, :, 2].permute(0, 2, 3, 1)
    return (forward_BHTT != 0).flatten(0, 1), (backward_BHTT != 0).flatten(0, 1)


def _dense_peers(device: str) -> dict[str, Peer]:
    """torch's kernels over whole rows, no mask: their fastest case."""
    if device == "cpu":
        return {"sdpa": lambda leaves: _sdpa(leaves["qkv"])}
    return {f"sdpa {name}": partial(_dense_peer, backend) for name, backend in _DENSE.items()}


def _dense_peer(backend: SDPBackend, leaves: Tensors) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(leaves["qkv"])


def _masked_peer(packing: Packing, leaves: Tensors) -> Tensor:
    return _sdpa(leaves["qkv"], packing.same_piece_B1TT)


def _sdpa(qkv_BT3HD: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=DROPOUT).transpose(1, 2)
