"""``model.kernels.vocabulary`` in Triton: one kernel between the products, a program for each position.

Shapes: N positions, C of a chunk; E width of the token table; V vocabulary, W filled up to whole blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.vocabulary import Predictions, Sampling, Scores, predict_in_chunks

TOKENS = 4096  # of the vocabulary at a time
_TILE: dict[str, Any] = {"ROWS": 64, "COLUMNS": 64}
_MINUS_INFINITY = tl.constexpr(float("-inf"))


def triton_predict(
    hidden_NE: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    original_N: Tensor,
    weights_N: Tensor,
    sampling: Sampling | None,
    max_rows: int | None = None,
) -> Predictions:
    """``reference_predict`` by ``predict_in_chunks``; a uniform so near to 1 that rounding puts it behind the last
    token gives the most likely one."""
    assert hidden_NE.dtype != torch.float64, "the kernel computes in fp32"
    return predict_in_chunks(_score, hidden_NE, table_VE, bias_V, original_N, weights_N, sampling, max_rows)


def _score(
    logits_CW: Tensor, bias_W: Tensor, original_C: Tensor, weights_C: Tensor, sampling: Sampling | None,
    d_bias_W: Tensor | None,
) -> Scores:  # fmt: skip
    num_rows, width = logits_CW.shape
    nll_C = torch.empty(num_rows, device=logits_CW.device)
    is_correct_C = torch.empty_like(nll_C, dtype=torch.bool)
    sampled_C = None if sampling is None else torch.empty_like(nll_C, dtype=torch.int64)
    if num_rows == 0:
        return nll_C, is_correct_C, sampled_C
    tokens = min(TOKENS, triton.next_power_of_2(width))
    options: dict[str, Any] = {
        "RESHAPES": sampling is not None and (sampling.temperature != 1 or sampling.excludes_original),
        "EXCLUDES": sampling is not None and sampling.excludes_original,
        "DIFFERENTIATES": d_bias_W is not None, "TOKENS": tokens, "num_warps": max(1, tokens // 512),
    }  # fmt: skip
    uniform_C, per_temperature = (None, 1.0) if sampling is None else (sampling.uniform_N, 1 / sampling.temperature)
    _score_position[(num_rows,)](
        logits_CW, bias_W, original_C, nll_C, is_correct_C, sampled_C, uniform_C, width, per_temperature, **options
    )
    if d_bias_W is not None:
        grid = (triton.cdiv(width, _TILE["COLUMNS"]),)
        _add_columns[grid](logits_CW, weights_C, d_bias_W, num_rows, width, **_TILE)
    return nll_C, is_correct_C, sampled_C


@triton.jit
def _load(logits, bias, tokens, width):
    """Logits of some tokens of one position in fp32, -inf behind the vocabulary."""
    inside = tokens < width
    return tl.load(logits + tokens, inside, other=0.0).to(tl.float32) + tl.load(bias + tokens, inside, _MINUS_INFINITY)


@triton.jit
def _reshape(values, tokens, original, per_temperature, EXCLUDES: tl.constexpr):
    """Logits of the distribution that is drawn from."""
    values = values * per_temperature
    if EXCLUDES:
        values = tl.where(tokens == original, _MINUS_INFINITY, values)
    return values


@triton.jit
def _add_powers(values, start, highest, likeliest, total):
    """Takes some tokens into a softmax: the highest logit, its token, the sum of exp(logit - highest) in float64.

    NaN is never the highest, and makes the sum NaN.
    """
    numbers = tl.where(values == values, values, _MINUS_INFINITY)  # noqa: PLR0124
    top, top_at = tl.max(numbers, 0, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    likeliest = tl.where(top > highest, start + top_at, likeliest)
    top = tl.maximum(top, highest)
    zero = tl.where(top == _MINUS_INFINITY, 0.0, top)  # no token of any probability yet
    total = total * tl.exp(highest - zero) + tl.sum(tl.exp(values - zero), 0)
    return top, likeliest, total


@triton.jit
def _first_above(powers, tokens, target, width):
    """The first token at which the cumulated powers exceed the target, else the last with any."""
    above = tl.min(tl.where((tl.cumsum(powers, 0) > target) & (powers > 0), tokens, width), 0)
    return tl.minimum(above, tl.max(tl.where(powers > 0, tokens, 0), 0))


@triton.jit
def _score_position(
    logits, bias, original_C, nll_C, is_correct_C, sampled_C, uniform_C, width, per_temperature,
    RESHAPES: tl.constexpr, EXCLUDES: tl.constexpr, DIFFERENTIATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Reads the logits twice: for the sums, then for the sample and the gradient. The second time the cache has them.

    RESHAPES: whether samples come from another distribution than the loss.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    original = tl.load(original_C + row).to(tl.int32)
    original_logit = tl.load(logits + original).to(tl.float32) + tl.load(bias + original)

    highest, likeliest, total = tl.full((), _MINUS_INFINITY, tl.float32), original * 0, tl.full((), 0.0, tl.float64)
    drawn_highest, sampled, drawn_total = highest, likeliest, total
    for start in range(0, width, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        values = _load(logits, bias, tokens, width)
        highest, likeliest, total = _add_powers(values, start, highest, likeliest, total)
        if RESHAPES:
            values = _reshape(values, tokens, original, per_temperature, EXCLUDES)
            drawn_highest, sampled, drawn_total = _add_powers(values, start, drawn_highest, sampled, drawn_total)
    tl.store(nll_C + row, tl.log(total.to(tl.float32)) + (highest - original_logit))
    tl.store(is_correct_C + row, likeliest == original)

    if sampled_C is not None or DIFFERENTIATES:
        if not RESHAPES:
            drawn_total, sampled = total, likeliest
        target = total * 0
        if sampled_C is not None:
            target = tl.load(uniform_C + row) * drawn_total
        before = total * 0
        scale = (1 / total).to(tl.float32)
        for start in range(0, width, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            values = _load(logits, bias, tokens, width)
            powers = tl.exp(values - highest)
            if DIFFERENTIATES:
                gradient = tl.where(tokens == original, powers * scale - 1, powers * scale)
                tl.store(logits + tokens, gradient, tokens < width)
            if sampled_C is not None:
                if RESHAPES:
                    powers = tl.exp(_reshape(values, tokens, original, per_temperature, EXCLUDES) - drawn_highest)
                after = before + tl.sum(powers, 0)
                if (before <= target) & (target < after):
                    sampled = _first_above(powers, tokens, (target - before).to(tl.float32), width)
                before = after
    if sampled_C is not None:
        tl.store(sampled_C + row, sampled)


@triton.jit
def _add_columns(d_logits_CW, weights_C, sums_W, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds weighted sums over rows, always in the same order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * width + columns
        inside = (rows < num_rows)[:, None] & (columns < width)
        weights = tl.load(weights_C + rows, rows < num_rows, other=0.0)
        sums += tl.load(d_logits_CW + offsets, inside, other=0.0).to(tl.float32) * weights[:, None]
    tl.store(sums_W + columns, tl.load(sums_W + columns, columns < width) + tl.sum(sums, 0), columns < width)
