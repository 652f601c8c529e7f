"""``model.kernels.embedding`` in Triton.

Gradients of tables are added up in an order that depends on the indices alone: the rows of a gradient are sorted by
index and cut into chunks of one size. A program adds up each run of equal indices within its chunk. Runs that cross
borders of chunks leave a sum for each, which a second kernel adds up; so a token that is everywhere is many programs'
work.

    sorted indices   2 2 2 5 | 7 7 7 7 | 7 9 9 9      chunks of 4
    sums written     2   5 b | a       | a   9        to the table, or as part (a: continues, b: begins) of one

Shapes: B rows, T tokens of a row, R = B · T; E columns of the tables; K positions of a chunk, N chunks; P programs.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.dropout import Dropout
from model.kernels.layer_norm_triton import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    dropped,
    layer_norm_gradient,
    load_row,
    mask_of,
    num_programs,
    statistics_of,
    store_partials,
    sum_partials,
    tile_at,
    tile_of,
)

_CHUNK = 64


def triton_embed(
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    weight_E: Tensor,
    bias_E: Tensor,
    eps: float,
    dropout: Dropout | None,
) -> Tensor:
    """``reference_embed``; keeps two numbers a row, and looks up again in the backward pass."""
    return _Embed.apply(weight_E, bias_E, eps, dropout, *tables, *indices)  # type: ignore[no-any-return]


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_E: Tensor, bias_E: Tensor, eps: float, dropout: Dropout | None, *tables_and_indices: Tensor
    ) -> Tensor:
        weight_E, bias_E, *operands = (operand.contiguous() for operand in (weight_E, bias_E, *tables_and_indices))
        tables, indices = _halves(operands)
        num_rows, num_columns = indices[0].numel(), weight_E.numel()
        out = tables[0].new_empty(*indices[0].shape, num_columns)
        statistics_2R = out.new_empty(2, num_rows, dtype=torch.float32)
        tile = tile_of(num_columns, FORWARD_ELEMENTS)
        if num_rows:
            _forward[(triton.cdiv(num_rows, tile["ROWS"]),)](
                tables, indices, weight_E, bias_E, out, statistics_2R, num_rows, eps, *mask_of(dropout),
                C=num_columns, **tile,
            )  # fmt: skip
        ctx.save_for_backward(weight_E, bias_E, statistics_2R, *operands)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight_E, bias_E, statistics_2R, *operands = ctx.saved_tensors
        tables, indices = _halves(operands)
        num_rows, num_columns = indices[0].numel(), weight_E.numel()
        d_total_RE = tables[0].new_empty(num_rows, num_columns)
        tile = tile_of(num_columns, BACKWARD_ELEMENTS)
        programs = num_programs(triton.cdiv(num_rows, tile["ROWS"]), tile["num_warps"], gradient.device)
        partials_P2C = gradient.new_empty(programs, 2 * num_columns, dtype=torch.float32)
        if num_rows:
            _backward[(programs,)](
                gradient.contiguous(), tables, indices, statistics_2R, weight_E, d_total_RE, partials_P2C, num_rows,
                *mask_of(ctx.dropout), C=num_columns, **tile,
            )  # fmt: skip
        d_tables = [
            _table_gradient(d_total_RE, index, table) if needed else None
            for table, index, needed in zip(tables, indices, ctx.needs_input_grad[4:], strict=False)
        ]
        return *sum_partials(partials_P2C, weight_E, bias_E), None, None, *d_tables, *(None for _ in indices)


def _halves(operands: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tables and indices; tuples, as kernels take them."""
    return tuple(operands[: len(operands) // 2]), tuple(operands[len(operands) // 2 :])


def _table_gradient(d_total_RE: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Rows of ``d_total_RE`` added up by index, in the shape and dtype of ``table``."""
    narrow = torch.int16 if len(table) <= 1 << 15 else torch.int32  # a sort takes time by the byte
    sorted_R, order_R = index.flatten().to(narrow).sort(stable=True)
    d_table, (num_rows, num_columns) = torch.zeros_like(table), d_total_RE.shape
    chunks = triton.cdiv(num_rows, _CHUNK)
    last_R = sorted_R[_CHUNK - 1 :: _CHUNK].contiguous()
    ends_N = torch.searchsorted(sorted_R, last_R, right=True, out_int32=True)
    partials_N2E = d_total_RE.new_empty(chunks, 2, num_columns, dtype=torch.float32)
    columns = min(128, max(16, triton.next_power_of_2(num_columns)))
    across = triton.cdiv(num_columns, columns)
    if chunks:
        precision = "ieee" if d_total_RE.dtype == torch.float32 else "tf32"  # which holds narrower numbers exactly
        _sum_runs[(chunks, across)](
            d_total_RE, sorted_R, order_R, d_table, partials_N2E, num_rows,
            E=num_columns, K=_CHUNK, COLUMNS=columns, PRECISION=precision,
        )  # fmt: skip
    if len(ends_N):
        _sum_crossing_runs[(len(ends_N), across)](
            sorted_R, ends_N, d_table, partials_N2E, num_rows, E=num_columns, K=_CHUNK, COLUMNS=columns
        )
    return d_table


@triton.jit
def _look_up(tables, indices, rows_R1, columns_1C, inside_RC, num_rows, C: tl.constexpr):
    """The tables' sum of a tile in fp32."""
    total_RC = tl.zeros(inside_RC.shape, tl.float32)
    for i in tl.static_range(len(tables)):
        index_R1 = tl.load(indices[i] + rows_R1, rows_R1 < num_rows, other=0).to(tl.int64)
        total_RC += tl.load(tables[i] + index_R1 * C + columns_1C, inside_RC, other=0).to(tl.float32)
    return total_RC


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["key"])
def _forward(
    tables, indices, weight_C, bias_C, out, statistics_2R, num_rows, eps, key, THRESHOLD: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows_R1, columns_1C, inside_RC, offsets_RC = tile_at(tl.program_id(0), num_rows, C, ROWS, COLUMNS)
    total_RC = _look_up(tables, indices, rows_R1, columns_1C, inside_RC, num_rows, C)
    mean_R1, rstd_R1 = statistics_of(total_RC, columns_1C, eps, C)
    tl.store(statistics_2R + rows_R1, mean_R1, rows_R1 < num_rows)
    tl.store(statistics_2R + num_rows + rows_R1, rstd_R1, rows_R1 < num_rows)
    out_RC = (total_RC - mean_R1) * rstd_R1 * load_row(weight_C, 0, C, COLUMNS) + load_row(bias_C, 0, C, COLUMNS)
    if THRESHOLD is not None:
        key = tl.load(key)
    out_RC = dropped(out_RC, key, rows_R1, columns_1C, THRESHOLD)
    tl.store(out + offsets_RC, out_RC, inside_RC)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["key"])
def _backward(
    gradient, tables, indices, statistics_2R, weight_C, d_total, partials_P2C, num_rows, key, THRESHOLD: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns_1C = tl.arange(0, COLUMNS)[None, :]
    weight_1C = load_row(weight_C, 0, C, COLUMNS)
    if THRESHOLD is not None:
        key = tl.load(key)
    d_weight_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_bias_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows_R1, _, inside_RC, offsets_RC = tile_at(tile, num_rows, C, ROWS, COLUMNS)
        gradient_RC = tl.load(gradient + offsets_RC, inside_RC, other=0).to(tl.float32)
        gradient_RC = dropped(gradient_RC, key, rows_R1, columns_1C, THRESHOLD)
        total_RC = _look_up(tables, indices, rows_R1, columns_1C, inside_RC, num_rows, C)
        mean_R1 = tl.load(statistics_2R + rows_R1, rows_R1 < num_rows, other=0)
        rstd_R1 = tl.load(statistics_2R + num_rows + rows_R1, rows_R1 < num_rows, other=0)
        normalized_RC = (total_RC - mean_R1) * rstd_R1
        d_total_RC = layer_norm_gradient(gradient_RC, normalized_RC, rstd_R1, weight_1C, C)
        tl.store(d_total + offsets_RC, d_total_RC, inside_RC)
        d_weight_RC += gradient_RC * normalized_RC
        d_bias_RC += gradient_RC
    store_partials(partials_P2C, d_weight_RC, d_bias_RC, columns_1C, C)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_runs(
    d_total, sorted_R, order_R, d_table, partials_N2E, num_rows,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    columns_1E = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at_K = chunk * K + tl.arange(0, K)
    inside_K = at_K < num_rows
    index_K = tl.load(sorted_R + at_K, inside_K, other=-1).to(tl.int32)
    next_K = tl.load(sorted_R + at_K + 1, at_K + 1 < num_rows, other=-1).to(tl.int32)
    before = tl.load(sorted_R + chunk * K - 1, chunk > 0, other=-1).to(tl.int32)

    order_K1 = tl.load(order_R + at_K, inside_K, other=0)[:, None]
    inside_KE = inside_K[:, None] & (columns_1E < E)
    d_total_KE = tl.load(d_total + order_K1 * E + columns_1E, inside_KE, other=0)
    equal_KK = (index_K[:, None] == index_K[None, :]).to(tl.float32)
    sums_KE = tl.dot(equal_KK, d_total_KE.to(tl.float32), input_precision=PRECISION)  # at each position its run's sum

    ends_K = index_K != next_K
    whole_K = ends_K & (index_K != before)
    tl.store(d_table + index_K[:, None].to(tl.int64) * E + columns_1E, sums_KE, inside_KE & whole_K[:, None])
    part_K = (ends_K | (tl.arange(0, K) == K - 1)) & (whole_K == 0)
    which_K = chunk * 2 + (index_K != before).to(tl.int32)
    tl.store(partials_N2E + which_K[:, None] * E + columns_1E, sums_KE, inside_KE & part_K[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _sum_crossing_runs(
    sorted_R, ends_N, d_table, partials_N2E, num_rows, E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program takes the run that begins in its chunk and goes on in the next, if there is one."""
    chunk = tl.program_id(0)
    index = tl.load(sorted_R + chunk * K + K - 1).to(tl.int64)
    before = tl.load(sorted_R + chunk * K - 1, chunk > 0, other=-1).to(tl.int64)
    end = tl.load(ends_N + chunk)
    if (index != before) & (end > (chunk + 1) * K):
        columns_1E = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        begins_1E = tl.load(partials_N2E + (chunk * 2 + 1) * E + columns_1E, columns_1E < E, other=0)
        sums_NE = tl.zeros((32, COLUMNS), tl.float32)
        last = tl.cdiv(end, K)
        for first in range(chunk + 1, last, 32):
            chunks_N1 = (first + tl.arange(0, 32))[:, None]
            inside_NE = (chunks_N1 < last) & (columns_1E < E)
            sums_NE += tl.load(partials_N2E + chunks_N1 * 2 * E + columns_1E, inside_NE, other=0)
        sums_1E = begins_1E + tl.sum(sums_NE, 0, keep_dims=True)
        tl.store(d_table + index * E + columns_1E, sums_1E, columns_1E < E)
