"""``model.kernels.gelu`` in Triton.

Shapes: R rows, F columns. Tiles are a few rows high and at most 1024 columns wide; P programs share the rows of a
backward pass.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.layer_norm_triton import BACKWARD_ELEMENTS, FORWARD_ELEMENTS, load_row, num_programs, sum_partials

_NORMAL_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TWICE_SQRT_2_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))
_ERF_P = tl.constexpr(0.3275911 * math.sqrt(0.5))


def triton_bias_gelu(x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
    """``reference_bias_gelu``; keeps ``x`` alone."""
    return _BiasGelu.apply(x, bias_F, approximate)  # type: ignore[no-any-return]


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
        x, bias_F, num_columns = x.contiguous(), bias_F.contiguous(), x.shape[-1]
        num_rows, out = x.numel() // num_columns, torch.empty_like(x)
        tile = _tile_of(num_columns, FORWARD_ELEMENTS)
        if num_rows:
            grid = (triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(num_columns, tile["COLUMNS"]))
            _forward[grid](x, bias_F, out, num_rows, APPROXIMATE=approximate, F=num_columns, **tile)
        ctx.save_for_backward(x, bias_F)
        ctx.approximate = approximate
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, bias_F = ctx.saved_tensors
        num_columns, d_x = x.shape[-1], torch.empty_like(x)
        num_rows, tile = x.numel() // num_columns, _tile_of(num_columns, BACKWARD_ELEMENTS)
        across = triton.cdiv(num_columns, tile["COLUMNS"])
        down = triton.cdiv(num_rows, tile["ROWS"])
        programs = min(down, max(1, num_programs(down * across, tile["num_warps"], x.device) // across))
        partials_PF = x.new_empty(programs, num_columns, dtype=torch.float32)
        if num_rows:
            _backward[(programs, across)](
                gradient.contiguous(), x, bias_F, d_x, partials_PF, num_rows,
                APPROXIMATE=ctx.approximate, F=num_columns, **tile,
            )  # fmt: skip
        return d_x, *sum_partials(partials_PF, bias_F), None


def _tile_of(num_columns: int, elements: int) -> dict[str, int]:
    """Its rows lie within threads, so that a bias' gradient is added up without exchange."""
    columns = min(1024, max(16, int(triton.next_power_of_2(num_columns))))
    num_warps = max(1, columns // 256)
    return {"ROWS": elements // 4 * num_warps // max(256, columns), "COLUMNS": columns, "num_warps": num_warps}


@triton.jit
def _share_and_slope(x, APPROXIMATE: tl.constexpr):
    """GELU(x) / x and its derivative.

    The tanh form by 1 + tanh(y) = 2 sigmoid(2y). The exact one by Abramowitz and Stegun, formula 7.1.26, whose erf is
    off by 1.5e-7 at most: its exponential is the derivative's too, so that an element takes 37 instructions of an H100
    instead of the 50 with CUDA's erf, where memory leaves time for about 40; 31 instead of 37 forward.
    """
    if APPROXIMATE:
        share = tl.sigmoid(x * (1 + 0.044715 * x * x) * _TWICE_SQRT_2_PI)
        slope = share * (1 - share) * (1 + 3 * 0.044715 * x * x) * _TWICE_SQRT_2_PI
    else:
        bell = tl.exp(-0.5 * x * x)
        t = 1 / (1 + tl.abs(x) * _ERF_P)
        series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        tail = 0.5 * series * bell
        share = tl.where(x < 0, tail, 1 - tail)
        slope = bell * _NORMAL_AT_0
    return share, slope


@triton.jit
def _load(x, tile, num_rows, columns_1F, F: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of a tile, which of its elements exist, and the tile in fp32."""
    rows_R1 = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    offsets_RF = rows_R1.to(tl.int64) * F + columns_1F
    inside_RF = (rows_R1 < num_rows) & (columns_1F < F)
    return offsets_RF, inside_RF, tl.load(x + offsets_RF, inside_RF, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x, bias_F, out, num_rows, APPROXIMATE: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    first = tl.program_id(1) * COLUMNS
    columns_1F = first + tl.arange(0, COLUMNS)[None, :]
    offsets_RF, inside_RF, x_RF = _load(x, tl.program_id(0), num_rows, columns_1F, F, ROWS)
    total_RF = x_RF + load_row(bias_F, first, F, COLUMNS)
    share_RF, _ = _share_and_slope(total_RF, APPROXIMATE)
    tl.store(out + offsets_RF, total_RF * share_RF, inside_RF)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    gradient, x, bias_F, d_x, partials_PF, num_rows,
    APPROXIMATE: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * COLUMNS
    columns_1F = first + tl.arange(0, COLUMNS)[None, :]
    bias_1F = load_row(bias_F, first, F, COLUMNS)
    d_bias_1F = tl.zeros((1, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=3):
        offsets_RF, inside_RF, x_RF = _load(x, tile, num_rows, columns_1F, F, ROWS)
        gradient_RF = tl.load(gradient + offsets_RF, inside_RF, other=0).to(tl.float32)
        total_RF = x_RF + bias_1F
        share_RF, slope_RF = _share_and_slope(total_RF, APPROXIMATE)
        d_total_RF = gradient_RF * (share_RF + total_RF * slope_RF)
        tl.store(d_x + offsets_RF, d_total_RF, inside_RF)
        d_bias_1F += tl.sum(d_total_RF, 0, keep_dims=True)
    tl.store(partials_PF + tl.program_id(0) * F + columns_1F, d_bias_1F, columns_1F < F)
