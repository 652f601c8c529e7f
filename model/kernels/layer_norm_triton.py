"""``model.kernels.layer_norm`` in Triton, and what other kernels over whole rows share with it.

Shapes: R rows, C columns. A program works on tiles of a few whole rows, as many columns wide as the next power of two.
P programs share the rows of a backward pass; each adds up gradients of gain and shift for itself, and a second kernel
adds up theirs, always in the same order.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.dropout import Dropout
from model.kernels.dropout_triton import keeps, row_keys

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 2048  # of a tile: 32 and 16 a thread, so loads of 16 bytes in flight
_WARPS_PER_PROCESSOR = 16  # of programs that stay until all rows are done; registers allow no more


def triton_add_norm(
    x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
) -> Tensor:
    """``reference_add_norm``; keeps the sum and two numbers a row, and draws the mask again in the backward pass."""
    return _AddNorm.apply(x, residual, weight_C, bias_C, eps, dropout)  # type: ignore[no-any-return]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
    ) -> Tensor:
        x, residual, weight_C, bias_C = (operand.contiguous() for operand in (x, residual, weight_C, bias_C))
        num_columns = x.shape[-1]
        num_rows = x.numel() // num_columns
        out, total = torch.empty_like(x), torch.empty_like(x)
        statistics_2R = x.new_empty(2, num_rows, dtype=torch.float32)
        tile = tile_of(num_columns, FORWARD_ELEMENTS)
        if num_rows:
            _forward[(triton.cdiv(num_rows, tile["ROWS"]),)](
                x, residual, weight_C, bias_C, out, total, statistics_2R, num_rows, eps, *mask_of(dropout),
                C=num_columns, **tile,
            )  # fmt: skip
        ctx.save_for_backward(total, statistics_2R, weight_C, bias_C)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total, statistics_2R, weight_C, bias_C = ctx.saved_tensors
        num_columns, num_rows = total.shape[-1], statistics_2R.shape[1]
        d_total = torch.empty_like(total)
        d_x = d_total if ctx.dropout is None else torch.empty_like(total)
        tile = tile_of(num_columns, BACKWARD_ELEMENTS)
        programs = num_programs(triton.cdiv(num_rows, tile["ROWS"]), tile["num_warps"], total.device)
        partials_P2C = total.new_empty(programs, 2 * num_columns, dtype=torch.float32)
        if num_rows:
            _backward[(programs,)](
                gradient.contiguous(), total, statistics_2R, weight_C, d_total, d_x, partials_P2C, num_rows,
                *mask_of(ctx.dropout), C=num_columns, **tile,
            )  # fmt: skip
        d_weight_C, d_bias_C = sum_partials(partials_P2C, weight_C, bias_C)
        return d_x, d_total, d_weight_C, d_bias_C, None, None


def mask_of(dropout: Dropout | None) -> tuple[Tensor | None, int | None]:
    """A kernel's arguments ``key`` and ``THRESHOLD``."""
    return (None, None) if dropout is None else (dropout.key, dropout.threshold)


def tile_of(num_columns: int, elements: int) -> dict[str, int]:
    """Rows and columns of a tile of whole rows, and its warps: one spans 256 columns of two bytes at a time."""
    columns = max(16, int(triton.next_power_of_2(num_columns)))
    return {"ROWS": min(64, max(1, elements // columns)), "COLUMNS": columns, "num_warps": 4 if columns <= 1024 else 8}


def num_programs(num_tiles: int, num_warps: int, device: torch.device) -> int:
    """Programs that share ``num_tiles`` and all run at once."""
    return min(num_tiles, _num_processors(device) * _WARPS_PER_PROCESSOR // num_warps)


@lru_cache
def _num_processors(device: torch.device) -> int:
    """Of a GPU; on a CPU Triton's interpreter runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def sum_partials(partials_PN: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
    """Sums over programs, fp32 ``(P, N)``, cut into gradients of the vectors in ``like``, in their dtypes."""
    num_partials, num_columns = partials_PN.shape
    sums_N = partials_PN.new_empty(num_columns)
    columns = 16  # few, so that the programs are many
    _sum_rows[(triton.cdiv(num_columns, columns),)](
        partials_PN, sums_N, num_partials, num_columns, ROWS=128, COLUMNS=columns
    )
    parts = sums_N.split([vector.numel() for vector in like])
    return tuple(part.to(vector.dtype) for part, vector in zip(parts, like, strict=True))


@triton.jit
def tile_at(number, num_rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column numbers of a tile, which of its elements exist, and where they lie."""
    rows_R1 = (number * ROWS + tl.arange(0, ROWS))[:, None]
    columns_1C = tl.arange(0, COLUMNS)[None, :]
    return rows_R1, columns_1C, (rows_R1 < num_rows) & (columns_1C < C), rows_R1.to(tl.int64) * C + columns_1C


@triton.jit
def load_row(vector_C, first, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Gain, shift or bias, in fp32."""
    columns_C = first + tl.arange(0, COLUMNS)
    return tl.load(vector_C + columns_C, columns_C < C, other=0).to(tl.float32)[None, :]


@triton.jit
def dropped(x_RC, key, rows_R1, columns_1C, THRESHOLD: tl.constexpr):
    """``reference_dropout`` of a tile in fp32; ``key`` is loaded, which loops should not do each time."""
    if THRESHOLD is not None:
        keep_RC = keeps(row_keys(key, rows_R1), columns_1C, THRESHOLD)
        x_RC = tl.where(keep_RC, x_RC * (65536 / (65536 - THRESHOLD)), 0)
    return x_RC


@triton.jit
def statistics_of(total_RC, columns_1C, eps, C: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows that are 0 outside."""
    mean_R1 = tl.sum(total_RC, 1, keep_dims=True) / C
    centred_RC = tl.where(columns_1C < C, total_RC - mean_R1, 0)
    return mean_R1, tl.rsqrt(tl.sum(centred_RC * centred_RC, 1, keep_dims=True) / C + eps)


@triton.jit
def layer_norm_gradient(gradient_RC, normalized_RC, rstd_R1, weight_1C, C: tl.constexpr):
    """The gradient of LayerNorm's input; ``gradient_RC`` is 0 outside."""
    weighted_RC = gradient_RC * weight_1C
    mean_R1 = tl.sum(weighted_RC, 1, keep_dims=True) / C
    slope_R1 = tl.sum(weighted_RC * normalized_RC, 1, keep_dims=True) / C
    return (weighted_RC - mean_R1 - normalized_RC * slope_R1) * rstd_R1


@triton.jit
def store_partials(partials_P2C, d_weight_RC, d_bias_RC, columns_1C, C: tl.constexpr):
    """What this program contributes to the gradients of gain and shift."""
    partials_P2C += tl.program_id(0) * 2 * C + columns_1C
    tl.store(partials_P2C, tl.sum(d_weight_RC, 0, keep_dims=True), columns_1C < C)
    tl.store(partials_P2C + C, tl.sum(d_bias_RC, 0, keep_dims=True), columns_1C < C)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["key"])
def _forward(
    x, residual, weight_C, bias_C, out, total, statistics_2R, num_rows, eps, key, THRESHOLD: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows_R1, columns_1C, inside_RC, offsets_RC = tile_at(tl.program_id(0), num_rows, C, ROWS, COLUMNS)
    x_RC = tl.load(x + offsets_RC, inside_RC, other=0).to(tl.float32)
    residual_RC = tl.load(residual + offsets_RC, inside_RC, other=0).to(tl.float32)
    if THRESHOLD is not None:
        key = tl.load(key)
    sum_RC = (residual_RC + dropped(x_RC, key, rows_R1, columns_1C, THRESHOLD)).to(total.dtype.element_ty)
    tl.store(total + offsets_RC, sum_RC, inside_RC)
    sum_RC = sum_RC.to(tl.float32)  # as it is kept, so that forward and backward have the same statistics
    mean_R1, rstd_R1 = statistics_of(sum_RC, columns_1C, eps, C)
    tl.store(statistics_2R + rows_R1, mean_R1, rows_R1 < num_rows)
    tl.store(statistics_2R + num_rows + rows_R1, rstd_R1, rows_R1 < num_rows)
    out_RC = (sum_RC - mean_R1) * rstd_R1 * load_row(weight_C, 0, C, COLUMNS) + load_row(bias_C, 0, C, COLUMNS)
    tl.store(out + offsets_RC, out_RC, inside_RC)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["key"])
def _backward(
    gradient, total, statistics_2R, weight_C, d_total, d_x, partials_P2C, num_rows, key, THRESHOLD: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns_1C = tl.arange(0, COLUMNS)[None, :]
    weight_1C = load_row(weight_C, 0, C, COLUMNS)
    if THRESHOLD is not None:
        key = tl.load(key)
    d_weight_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_bias_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=3):
        rows_R1, _, inside_RC, offsets_RC = tile_at(tile, num_rows, C, ROWS, COLUMNS)
        gradient_RC = tl.load(gradient + offsets_RC, inside_RC, other=0).to(tl.float32)
        total_RC = tl.load(total + offsets_RC, inside_RC, other=0).to(tl.float32)
        mean_R1 = tl.load(statistics_2R + rows_R1, rows_R1 < num_rows, other=0)
        rstd_R1 = tl.load(statistics_2R + num_rows + rows_R1, rows_R1 < num_rows, other=0)
        normalized_RC = (total_RC - mean_R1) * rstd_R1
        d_total_RC = layer_norm_gradient(gradient_RC, normalized_RC, rstd_R1, weight_1C, C)
        tl.store(d_total + offsets_RC, d_total_RC, inside_RC)
        if THRESHOLD is not None:
            tl.store(d_x + offsets_RC, dropped(d_total_RC, key, rows_R1, columns_1C, THRESHOLD), inside_RC)
        d_weight_RC += gradient_RC * normalized_RC
        d_bias_RC += gradient_RC
    store_partials(partials_P2C, d_weight_RC, d_bias_RC, columns_1C, C)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_rows(x_RC, sums_C, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns_1C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows_R1 = (first + tl.arange(0, ROWS))[:, None]
        inside_RC = (rows_R1 < num_rows) & (columns_1C < num_columns)
        sums_RC += tl.load(x_RC + rows_R1 * num_columns + columns_1C, inside_RC, other=0)
    tl.store(sums_C + columns_1C, tl.sum(sums_RC, 0, keep_dims=True), columns_1C < num_columns)
