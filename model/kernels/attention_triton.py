"""Attention within pieces by Triton kernels that keep scores, probabilities and dropout's mask on the chip.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) over packed rows. A program owns a block of tokens of one row and head
and visits the other side, block by block, from where the first of their pieces begins to where the last one ends.
Each result is summed by one program in a fixed order, so it is deterministic, and nothing waits for the host.

Shapes: B rows, T tokens of a row, N = B·T, H heads, D head size; Q queries and K keys of a block.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Kernels are no Python: their launch, constants and loops have types that Triton does not declare.

from dataclasses import dataclass
from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attention import Packing
from model.kernels.dropout import Dropout
from model.kernels.dropout_triton import hash32, row_keys
from model.keyed import GOLDEN
from model.keyed import hash32 as hash32_torch


@dataclass(frozen=True)
class Blocks:
    """How one kernel divides its work.

    Attributes:
        queries: Q, a power of two from 16.
        keys: K, likewise.
        warps: Of a program, 32 threads each; 4 for each 64 tokens of its own is what Hopper's matrix instruction takes.
        stages: Of the pipeline: blocks being loaded or multiplied at once.
        registers: At most so many for a thread; None leaves it to the compiler.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


_SMALL_HEADS = {
    "forward": Blocks(128, 64, 8, 2, registers=128),
    "query_gradient": Blocks(128, 32, 8, 2, registers=128),
    "key_gradient": Blocks(64, 128, 8, 2),
}
_LARGE_HEADS = {
    "forward": Blocks(128, 64, 8, 2),
    "query_gradient": Blocks(64, 64, 4, 2),
    "key_gradient": Blocks(32, 64, 4, 2),
}
_FP32 = {
    "forward": Blocks(32, 32, 4, 1),
    "query_gradient": Blocks(32, 16, 4, 1),
    "key_gradient": Blocks(32, 32, 4, 1),
}


def blocks_of(dtype: torch.dtype, size: int) -> dict[str, Blocks]:
    """Blocks of the three kernels for heads of D = ``size``.

    Chosen by what Triton 3.6 and 3.9 report for compute capability 9.0, not by timings: in half precision no register
    is spilled, and up to D = 64 two programs of ``forward`` and of ``query_gradient`` fit on a multiprocessor. fp32 is
    multiplied without tensor cores: for comparison, not for speed.
    """
    if dtype == torch.float32:
        return _FP32
    return _SMALL_HEADS if size <= 64 else _LARGE_HEADS


def triton_attention(qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
    """``reference_attention`` for fp32, fp16 and bf16; keeps only its input, its output and a logarithm for each query.

    Args:
        qkv_BT3HD: Queries, keys and values; a view is not copied where its last axis has stride 1.
        packing: Pieces of the rows.
        dropout: Of probabilities; the draws are the reference's.

    Returns:
        ``(B, T, H, D)``, contiguous.
    """
    assert qkv_BT3HD.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return _Attention.apply(qkv_BT3HD, packing, dropout)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> Tensor:
        qkv_BT3HD = _with_unit_stride(qkv_BT3HD)
        rows, length, _, heads, size = qkv_BT3HD.shape
        context_BTHD = qkv_BT3HD.new_empty(rows, length, heads, size)
        logsumexp_BHT = qkv_BT3HD.new_empty(rows, heads, length, dtype=torch.float32)
        blocks, shared = blocks_of(qkv_BT3HD.dtype, size)["forward"], _shared_arguments(qkv_BT3HD, packing, dropout)
        grid = (rows * heads * triton.cdiv(length, blocks.queries),)
        _forward[grid](context_BTHD, logsumexp_BHT, **shared, **_launch(blocks))
        ctx.save_for_backward(qkv_BT3HD, context_BTHD, logsumexp_BHT)
        ctx.packing, ctx.dropout = packing, dropout
        return context_BTHD

    @staticmethod
    def backward(ctx: Any, d_context_BTHD: Tensor) -> Any:
        qkv_BT3HD, context_BTHD, logsumexp_BHT = ctx.saved_tensors
        rows, length, _, heads, size = qkv_BT3HD.shape
        d_context_BTHD = _with_unit_stride(d_context_BTHD)
        d_qkv_BT3HD = qkv_BT3HD.new_empty(qkv_BT3HD.shape)
        delta_BHT = torch.empty_like(logsumexp_BHT)
        row_key_BHT = torch.empty_like(logsumexp_BHT, dtype=torch.int32)
        tensors = (d_context_BTHD, *d_context_BTHD.stride()[:3], d_qkv_BT3HD, logsumexp_BHT, delta_BHT, row_key_BHT)
        blocks, shared = blocks_of(qkv_BT3HD.dtype, size), _shared_arguments(qkv_BT3HD, ctx.packing, ctx.dropout)
        query_blocks = triton.cdiv(length, blocks["query_gradient"].queries)
        key_blocks = triton.cdiv(length, blocks["key_gradient"].keys)
        _query_gradient[(rows * heads * query_blocks,)](
            context_BTHD, *tensors, **shared, **_launch(blocks["query_gradient"])
        )
        _key_gradient[(rows * heads * key_blocks,)](*tensors, **shared, **_launch(blocks["key_gradient"]))
        return d_qkv_BT3HD, None, None


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared_arguments(qkv_BT3HD: Tensor, packing: Packing, dropout: Dropout | None) -> dict[str, Any]:
    """What all three kernels take."""
    _, length, _, heads, size = qkv_BT3HD.shape
    return {
        "qkv": qkv_BT3HD,
        **dict(zip(("row_stride", "token_stride", "kind_stride", "head_stride"), qkv_BT3HD.stride(), strict=False)),
        "begin_BT": packing.begin_BT.contiguous(),
        "end_BT": packing.end_BT.contiguous(),
        "column_BT": _columns(packing) if dropout else packing.begin_BT,
        "dropout_key": dropout.key if dropout else packing.begin_BT,
        "threshold": dropout.threshold if dropout else 0,
        "dropout_scale": dropout.scale if dropout else 1.0,
        "score_scale": size**-0.5 / log(2),
        "length": length,
        "heads": heads,
        "SIZE": size,
        "PADDED_SIZE": max(16, triton.next_power_of_2(size)),  # tl.dot's least
        "DROPS": dropout is not None,
    }


def _columns(packing: Packing) -> Tensor:
    """What a key's place in its piece adds to its draws, once for all layers.

    int64 ``(B, T)``: below bit 32 the column's part of the hash, above it how far left the draw's 16 bits must move.
    """
    if "columns_BT" not in vars(packing):
        offset_BT = torch.arange(packing.begin_BT.shape[1], device=packing.begin_BT.device) - packing.begin_BT
        words_BT = hash32_torch((offset_BT >> 1) * GOLDEN & 0xFFFFFFFF)
        vars(packing)["columns_BT"] = (words_BT | (1 - (offset_BT & 1)) << 36).contiguous()
    return vars(packing)["columns_BT"]


def _launch(blocks: Blocks) -> dict[str, int]:
    """How the kernel is compiled."""
    registers = {"maxnreg": blocks.registers} if blocks.registers else {}
    sizes = {"BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
    return sizes | {"num_warps": blocks.warps, "num_stages": blocks.stages} | registers


_LN_2: tl.constexpr = tl.constexpr(log(2))  # scores are in units of log 2: the hardware's exponential has base 2
_LOWEST: tl.constexpr = tl.constexpr(-1e38)  # a maximum before any score; finite, so that -inf minus it is no NaN
# No other machine code for another dropout key's address (keys are elements of one tensor) or another rate.
_jit = triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["dropout_key"])


@triton.jit
def _place(length, heads, BLOCK: tl.constexpr):
    """Row, head and first token of this program; programs of one head run together and share what they read."""
    blocks = tl.cdiv(length, BLOCK)
    row_head = tl.program_id(0) // blocks
    return row_head // heads, row_head % heads, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _visit(begin_BT, end_BT, row, token_P, length, BLOCK: tl.constexpr):
    """Begins and ends of the tokens' pieces; where visiting starts, where a border may come, where it stops.

    If all tokens are of one piece, all of the other side up to the last full block is of that piece too.
    """
    begin_P = tl.load(begin_BT + row * length + token_P).to(tl.int32)
    end_P = tl.load(end_BT + row * length + token_P).to(tl.int32)
    first, last = tl.min(begin_P, 0), tl.max(end_P, 0)
    full = tl.where(tl.max(begin_P, 0) == first, (last - first) // BLOCK * BLOCK, 0)
    return begin_P, end_P, first, first + full, last


@triton.jit
def _load(head, token_P, token_stride, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr):
    """Vectors ``(P, D)`` of some tokens, with zeros up to the padded size."""
    number_D = tl.arange(0, PADDED_SIZE)
    pointers = head + token_P[:, None] * token_stride + number_D[None, :]
    if SIZE == PADDED_SIZE:
        return tl.load(pointers)
    return tl.load(pointers, mask=number_D[None, :] < SIZE, other=0.0)


@triton.jit
def _store(head, value_PD, token_P, token_stride, length, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr):
    number_D = tl.arange(0, PADDED_SIZE)
    mask = (token_P[:, None] < length) & (number_D[None, :] < SIZE)
    tl.store(head + token_P[:, None] * token_stride + number_D[None, :], value_PD.to(head.dtype.element_ty), mask=mask)


@triton.jit
def _is_within(token, begin, end):
    return (token >= begin) & (token < end)


@triton.jit
def _keeps(row_key, column, threshold):
    """``model.kernels.dropout_triton.keeps`` with the columns' part of the hash at hand; draws in the upper 16 bits."""
    word = hash32(row_key ^ column.to(tl.uint32))
    return (word << (column >> 32).to(tl.uint32)) >= (threshold.to(tl.uint32) << 16)


@_jit
def _forward(
    context, logsumexp_BHT,
    qkv, row_stride, token_stride, kind_stride, head_stride, begin_BT, end_BT, column_BT,
    dropout_key, threshold, dropout_scale, score_scale, length, heads,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, DROPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The context of a block of queries, and log2 of each query's sum of exponentials."""
    row, head, first_query = _place(length, heads, BLOCK_Q)
    query_Q = first_query + tl.arange(0, BLOCK_Q)
    safe_Q = tl.minimum(query_Q, length - 1)
    begin_Q, end_Q, first, border, last = _visit(begin_BT, end_BT, row, safe_Q, length, BLOCK_K)
    row_key_Q = row_keys(tl.load(dropout_key), (row * length + query_Q) * heads + head)
    qkv += row.to(tl.int64) * row_stride + head * head_stride
    query_QD = _load(qkv, safe_Q, token_stride, SIZE, PADDED_SIZE)
    max_Q = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    sum_Q = tl.zeros([BLOCK_Q], tl.float32)
    context_QD = tl.zeros([BLOCK_Q, PADDED_SIZE], tl.float32)
    for MASKED in tl.static_range(2):
        for first_key in range(border if MASKED else first, last if MASKED else border, BLOCK_K):
            key_K = first_key + tl.arange(0, BLOCK_K)
            safe_K = tl.minimum(key_K, length - 1) if MASKED else key_K
            key_KD = _load(qkv + kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
            value_KD = _load(qkv + 2 * kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
            score_QK = tl.dot(query_QD, tl.trans(key_KD), input_precision="ieee")
            if MASKED:
                inside_QK = _is_within(key_K[None, :], begin_Q[:, None], end_Q[:, None])
                score_QK = tl.where(inside_QK, score_QK, -float("inf"))
            new_max_Q = tl.maximum(max_Q, tl.max(score_QK, 1) * score_scale)
            weight_QK = tl.exp2(score_QK * score_scale - new_max_Q[:, None])
            shrink_Q = tl.exp2(max_Q - new_max_Q)
            sum_Q = sum_Q * shrink_Q + tl.sum(weight_QK, 1)
            if DROPS:
                column_K = tl.load(column_BT + row * length + safe_K)
                weight_QK = tl.where(_keeps(row_key_Q[:, None], column_K[None, :], threshold), weight_QK, 0.0)
            context_QD *= shrink_Q[:, None]
            context_QD = tl.dot(weight_QK.to(value_KD.dtype), value_KD, context_QD, input_precision="ieee")
            max_Q = new_max_Q
    context_QD *= (dropout_scale / sum_Q)[:, None]
    token_BHT = (row * heads + head).to(tl.int64) * length + query_Q
    tl.store(logsumexp_BHT + token_BHT, max_Q + tl.log2(sum_Q), mask=query_Q < length)
    context += (row.to(tl.int64) * length * heads + head) * SIZE
    _store(context, context_QD, query_Q, heads * SIZE, length, SIZE, PADDED_SIZE)


@_jit
def _query_gradient(
    context, d_context, d_row_stride, d_token_stride, d_head_stride, d_qkv, logsumexp_BHT, delta_BHT, row_key_BHT,
    qkv, row_stride, token_stride, kind_stride, head_stride, begin_BT, end_BT, column_BT,
    dropout_key, threshold, dropout_scale, score_scale, length, heads,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, DROPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and for ``_key_gradient`` what the softmax takes off each score's gradient.

    Gradients of probabilities stay without dropout's scale until the end, hence ``delta`` has it divided out.
    """
    row, head, first_query = _place(length, heads, BLOCK_Q)
    query_Q = first_query + tl.arange(0, BLOCK_Q)
    safe_Q = tl.minimum(query_Q, length - 1)
    begin_Q, end_Q, first, border, last = _visit(begin_BT, end_BT, row, safe_Q, length, BLOCK_K)
    row_key_Q = row_keys(tl.load(dropout_key), (row * length + query_Q) * heads + head)
    qkv += row.to(tl.int64) * row_stride + head * head_stride
    d_context += row.to(tl.int64) * d_row_stride + head * d_head_stride
    context += (row.to(tl.int64) * length * heads + head) * SIZE
    query_QD = _load(qkv, safe_Q, token_stride, SIZE, PADDED_SIZE)
    d_context_QD = _load(d_context, safe_Q, d_token_stride, SIZE, PADDED_SIZE)
    context_QD = _load(context, safe_Q, heads * SIZE, SIZE, PADDED_SIZE)
    delta_Q = tl.sum(d_context_QD.to(tl.float32) * context_QD.to(tl.float32), 1) / dropout_scale
    token_BHT = (row * heads + head).to(tl.int64) * length + safe_Q
    tl.store(delta_BHT + token_BHT, delta_Q, mask=query_Q < length)
    if DROPS:
        tl.store(row_key_BHT + token_BHT, row_key_Q.to(tl.int32), mask=query_Q < length)
    logsumexp_Q = tl.load(logsumexp_BHT + token_BHT)
    d_query_QD = tl.zeros([BLOCK_Q, PADDED_SIZE], tl.float32)
    for MASKED in tl.static_range(2):
        for first_key in range(border if MASKED else first, last if MASKED else border, BLOCK_K):
            key_K = first_key + tl.arange(0, BLOCK_K)
            safe_K = tl.minimum(key_K, length - 1) if MASKED else key_K
            key_KD = _load(qkv + kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
            value_KD = _load(qkv + 2 * kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
            score_QK = tl.dot(query_QD, tl.trans(key_KD), input_precision="ieee")
            probability_QK = tl.exp2(score_QK * score_scale - logsumexp_Q[:, None])
            if MASKED:
                inside_QK = _is_within(key_K[None, :], begin_Q[:, None], end_Q[:, None])
                probability_QK = tl.where(inside_QK, probability_QK, 0.0)
            d_kept_QK = tl.dot(d_context_QD, tl.trans(value_KD), input_precision="ieee")
            if DROPS:
                column_K = tl.load(column_BT + row * length + safe_K)
                d_kept_QK = tl.where(_keeps(row_key_Q[:, None], column_K[None, :], threshold), d_kept_QK, 0.0)
            d_score_QK = (probability_QK * (d_kept_QK - delta_Q[:, None])).to(key_KD.dtype)
            d_query_QD = tl.dot(d_score_QK, key_KD, d_query_QD, input_precision="ieee")
    d_query_QD *= dropout_scale * score_scale * _LN_2
    d_qkv += (row.to(tl.int64) * length * 3 * heads + head) * SIZE
    _store(d_qkv, d_query_QD, query_Q, 3 * heads * SIZE, length, SIZE, PADDED_SIZE)


@_jit
def _key_gradient(
    d_context, d_row_stride, d_token_stride, d_head_stride, d_qkv, logsumexp_BHT, delta_BHT, row_key_BHT,
    qkv, row_stride, token_stride, kind_stride, head_stride, begin_BT, end_BT, column_BT,
    dropout_key, threshold, dropout_scale, score_scale, length, heads,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, DROPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of their values; keys are the rows here, so nothing is transposed twice."""
    row, head, first_key = _place(length, heads, BLOCK_K)
    key_K = first_key + tl.arange(0, BLOCK_K)
    safe_K = tl.minimum(key_K, length - 1)
    begin_K, end_K, first, border, last = _visit(begin_BT, end_BT, row, safe_K, length, BLOCK_Q)
    column_K = tl.load(column_BT + row * length + safe_K)
    qkv += row.to(tl.int64) * row_stride + head * head_stride
    d_context += row.to(tl.int64) * d_row_stride + head * d_head_stride
    token_BHT = (row * heads + head).to(tl.int64) * length
    key_KD = _load(qkv + kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
    value_KD = _load(qkv + 2 * kind_stride, safe_K, token_stride, SIZE, PADDED_SIZE)
    d_key_KD = tl.zeros([BLOCK_K, PADDED_SIZE], tl.float32)
    d_value_KD = tl.zeros([BLOCK_K, PADDED_SIZE], tl.float32)
    for MASKED in tl.static_range(2):
        for first_query in range(border if MASKED else first, last if MASKED else border, BLOCK_Q):
            query_Q = first_query + tl.arange(0, BLOCK_Q)
            safe_Q = tl.minimum(query_Q, length - 1) if MASKED else query_Q
            query_QD = _load(qkv, safe_Q, token_stride, SIZE, PADDED_SIZE)
            d_context_QD = _load(d_context, safe_Q, d_token_stride, SIZE, PADDED_SIZE)
            logsumexp_Q = tl.load(logsumexp_BHT + token_BHT + safe_Q)
            delta_Q = tl.load(delta_BHT + token_BHT + safe_Q)
            score_KQ = tl.dot(key_KD, tl.trans(query_QD), input_precision="ieee")
            probability_KQ = tl.exp2(score_KQ * score_scale - logsumexp_Q[None, :])
            if MASKED:
                inside_KQ = _is_within(query_Q[None, :], begin_K[:, None], end_K[:, None])
                probability_KQ = tl.where(inside_KQ, probability_KQ, 0.0)
            d_kept_KQ = tl.dot(value_KD, tl.trans(d_context_QD), input_precision="ieee")
            kept_KQ = probability_KQ
            if DROPS:
                row_key_Q = tl.load(row_key_BHT + token_BHT + safe_Q).to(tl.uint32)
                keep_KQ = _keeps(row_key_Q[None, :], column_K[:, None], threshold)
                kept_KQ = tl.where(keep_KQ, probability_KQ, 0.0)
                d_kept_KQ = tl.where(keep_KQ, d_kept_KQ, 0.0)
            d_value_KD = tl.dot(kept_KQ.to(d_context_QD.dtype), d_context_QD, d_value_KD, input_precision="ieee")
            d_score_KQ = (probability_KQ * (d_kept_KQ - delta_Q[None, :])).to(query_QD.dtype)
            d_key_KD = tl.dot(d_score_KQ, query_QD, d_key_KD, input_precision="ieee")
    d_key_KD *= dropout_scale * score_scale * _LN_2
    d_value_KD *= dropout_scale
    d_qkv += (row.to(tl.int64) * length * 3 * heads + head) * SIZE
    _store(d_qkv + heads * SIZE, d_key_KD, key_K, 3 * heads * SIZE, length, SIZE, PADDED_SIZE)
    _store(d_qkv + 2 * heads * SIZE, d_value_KD, key_K, 3 * heads * SIZE, length, SIZE, PADDED_SIZE)
