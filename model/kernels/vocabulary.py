"""The output layer over the vocabulary: product, cross-entropy and a sample for each position, never all logits.

A sample is drawn by inverting the distribution function: one uniform number u a position, and the first token at
which the sum of the probabilities exceeds u. It takes what the softmax needs anyway, where the Gumbel-max trick
takes a draw and two logarithms for each token of the vocabulary; both are exact draws from the softmax.

Shapes: N positions, C of a chunk, R of those at once; E width of the token table; V vocabulary, W filled up to whole
blocks, K blocks, S tokens of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.keyed import keyed_bits, keyed_bits_numpy

_STREAM = 0x5A
_BLOCK = 128  # tokens whose probabilities are added up first: sums of sums round less; products like whole blocks
_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}  # glibc gives back, and clears, what is above 32 MiB each time
_SCORED_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}  # logits: a core's cache; little memory next to a chunk


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        uniform_N: float64 in [0, 1), one for each position.
        temperature: Divides the logits.
        excludes_original: Never draw the original token.
    """

    uniform_N: Tensor
    temperature: float = 1.0
    excludes_original: bool = False


@dataclass(frozen=True)
class Predictions:
    """What a distribution over the vocabulary says at each position.

    Attributes:
        loss: Weighted sum of the negative log-likelihoods, fp32, a scalar; the only one with a gradient.
        nll_N: Negative log-likelihood of the original, fp32.
        is_correct_N: Whether the most likely token is the original.
        sampled_N: Drawn tokens, int64; None where no sampling was asked for.
    """

    loss: Tensor
    nll_N: Tensor
    is_correct_N: Tensor
    sampled_N: Tensor | None


Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Sampling | None], Predictions]


def uniform(seed: int, number: int, device: torch.device | str) -> Tensor:
    """``number`` draws from [0, 1) with 53 bits, float64; a function of a 63-bit seed."""
    if torch.device(device).type != "cpu" or number == 0:
        return uniform_torch(seed, number, device)
    high, low = keyed_bits_numpy(np.array([seed], np.int64), np.arange(2 * number), _STREAM).reshape(2, number)
    return torch.from_numpy((high * 2.0**21 + (low >> np.uint32(11))) * 2.0**-53)


def uniform_torch(seed: int, number: int, device: torch.device | str) -> Tensor:
    """``uniform`` on any device."""
    key_1 = torch.full((1,), seed, device=device)
    high, low = keyed_bits(key_1, torch.arange(2 * number, device=device), _STREAM).view(2, number)
    return ((high << 21) + (low >> 11)).double() * 2.0**-53


def reference_predict(
    hidden_NE: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    original_N: Tensor,
    weights_N: Tensor,
    sampling: Sampling | None,
) -> Predictions:
    """Cross-entropy and samples from softmax(hidden · table^T + bias), in fp32 from logits in their own precision.

    Args:
        hidden_NE: What the head gives at the positions.
        table_VE: The token table.
        bias_V: Of each token.
        original_N: Tokens to find, int64.
        weights_N: fp32 weight of each position in the loss; no gradient.
        sampling: How to draw tokens; None for none.

    Returns:
        See ``Predictions``; holds all logits.
    """
    logits_NV = F.linear(hidden_NE, table_VE, bias_V)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = F.cross_entropy(logits_NV, original_N, reduction="none")
    with torch.no_grad():
        sampled_N = None if sampling is None else sample(logits_NV, original_N, sampling)
        is_correct_N = logits_NV.argmax(-1) == original_N
    return Predictions((nll_N * weights_N).sum(), nll_N.detach(), is_correct_N, sampled_N)


def sample(logits_NV: Tensor, original_N: Tensor, sampling: Sampling) -> Tensor:
    """Draws from softmax(logits / temperature), with or without the original; sums in float64."""
    logits_NV = logits_NV / sampling.temperature
    if sampling.excludes_original:
        logits_NV = logits_NV.scatter(1, original_N[:, None], -torch.inf)
    cumulated_NV = logits_NV.softmax(-1).double().cumsum(-1)
    return _invert(cumulated_NV, sampling.uniform_N * cumulated_NV[:, -1])


def _invert(cumulated_NV: Tensor, target_N: Tensor) -> Tensor:
    """The first column whose cumulated sum exceeds the target; 0 where the sums are NaN."""
    found_N1 = torch.searchsorted(cumulated_NV, target_N[:, None], right=True)
    # Rounding may put the target at the whole sum, behind the last token of any probability.
    found_N1 = found_N1.minimum(torch.searchsorted(cumulated_NV, cumulated_NV[:, -1:].contiguous()))
    return torch.where(found_N1 < cumulated_NV.shape[1], found_N1, 0).squeeze(1)


Scores = tuple[Tensor, Tensor, Tensor | None]
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Sampling | None, Tensor | None], Scores]
"""What a backend does with a chunk.

Args:
    logits_CW: Without the bias, in the precision of the hidden vectors; 0 behind the vocabulary.
    bias_W: fp32; -inf behind the vocabulary.
    original_C, weights_C, sampling: Of the chunk, contiguous.
    d_bias_W: fp32. If it is there, its weighted gradient is added to it, and softmax - one-hot left in ``logits_CW``.

Returns:
    nll_C, is_correct_C, sampled_C as ``Predictions`` has them.
"""


def predict_in_chunks(
    score: Score,
    hidden_NE: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    original_N: Tensor,
    weights_N: Tensor,
    sampling: Sampling | None,
    max_rows: int | None = None,
) -> Predictions:
    """``reference_predict`` over chunks of positions, gradients made on the way: logits of a chunk become theirs.

    Args:
        score: What a backend does with a chunk.
        max_rows: Of a chunk; by default as many as make its logits a quarter of a GiB, on a CPU 24 MiB.
    """
    arguments = hidden_NE, table_VE, bias_V, original_N, weights_N, sampling
    return Predictions(*_Predict.apply(*arguments, score, max_rows, torch.is_grad_enabled()))


class _Predict(torch.autograd.Function):
    """The loss is one number, so its gradients are known up to a factor as soon as it is."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, table_VE: Tensor, bias_V: Tensor, original_N: Tensor, weights_N: Tensor,
        sampling: Sampling | None, score: Score, max_rows: int | None, makes_gradients: bool,
    ) -> Any:  # fmt: skip
        original_N = original_N.contiguous()
        chunks = _Chunks(table_VE, bias_V, score, [makes_gradients and needed for needed in ctx.needs_input_grad[:3]])
        # Relative to the largest: a mean over a global batch weighs too little for fp16, whose loss is scaled later.
        largest = F.pad(weights_N.abs(), (0, 1)).amax().clamp_min(torch.finfo(weights_N.dtype).tiny)
        relative_N = (weights_N.to(chunks.bias_W.dtype) / largest).contiguous()
        rows = chunks.rows(len(hidden_NE), max_rows)
        parts = []
        for first in range(0, max(1, len(hidden_NE)), rows):
            part = slice(first, first + rows)
            drawn = sampling and replace(sampling, uniform_N=sampling.uniform_N[part].contiguous())
            parts.append(chunks.predict(hidden_NE[part], original_N[part], relative_N[part], drawn))
        nll_N, is_correct_N, sampled_N, d_hidden_NE = map(_join, zip(*parts, strict=True))
        assert nll_N is not None
        ctx.save_for_backward(d_hidden_NE, *chunks.gradients(), largest)
        ctx.dtypes = hidden_NE.dtype, table_VE.dtype, bias_V.dtype
        outputs = (nll_N * weights_N).sum(), nll_N, is_correct_N, sampled_N
        ctx.mark_non_differentiable(*(t for t in outputs[1:] if t is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        *gradients, largest = ctx.saved_tensors
        factor_1 = (d_loss * largest).view(1)  # with a dimension: fp16 would round one without
        return *(
            g if g is None else torch.mul(g, factor_1, out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ), *[None] * 6  # fmt: skip


def _join(pieces: tuple[Any, ...]) -> Tensor | None:
    return None if pieces[0] is None else torch.cat(pieces)


class _Chunks:
    """Some positions at a time; adds up, in fp32 at least, what belongs to the table."""

    def __init__(self, table_VE: Tensor, bias_V: Tensor, score: Score, needs_gradients: list[bool]):
        self.score, self.vocab_size = score, len(table_VE)
        self._needs_hidden, self._needs_table, self._needs_bias = needs_gradients
        fill = -len(table_VE) % _BLOCK
        # Tensor cores want aligned rows. A CPU's products do not care, and the copy would cost more.
        self.table = F.pad(table_VE, (0, 0, 0, fill)) if table_VE.is_cuda else table_VE
        dtype = torch.promote_types(bias_V.dtype, torch.float32)
        self.bias_W = F.pad(bias_V.to(dtype), (0, fill), value=-torch.inf)
        self._d_table: Tensor | None = None
        self._d_bias_W = torch.zeros_like(self.bias_W) if any(needs_gradients) else None

    def rows(self, number: int, max_rows: int | None) -> int:
        """Of a chunk: ``number`` in equal parts."""
        max_rows = max_rows or _CHUNK_BYTES[self.table.device.type] // (len(self.bias_W) * self.table.element_size())
        return -(-number // max(1, -(-number // max(1, max_rows)))) or 1

    def predict(
        self, hidden_CE: Tensor, original_C: Tensor, weights_C: Tensor, sampling: Sampling | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Negative log-likelihoods, whether they are right, samples, gradient of the hidden vectors."""
        logits_CW = hidden_CE.new_empty(len(hidden_CE), len(self.bias_W))
        logits_CW[:, len(self.table) :] = 0
        product = torch.mm(hidden_CE, self.table.t(), out=logits_CW[:, : len(self.table)])
        scores = self.score(logits_CW, self.bias_W, original_C, weights_C, sampling, self._d_bias_W)
        if self._needs_table:
            weighted_CE = hidden_CE * weights_C[:, None].to(hidden_CE.dtype)
            self._d_table = _add_product(self._d_table, product.t(), weighted_CE)
        return *scores, (product @ self.table).mul_(weights_C[:, None]) if self._needs_hidden else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the table and the bias."""
        d_table = None if self._d_table is None else self._d_table[: self.vocab_size]
        return d_table, self._d_bias_W[: self.vocab_size] if self._needs_bias and self._d_bias_W is not None else None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``; a GPU's products come in fp32, a CPU's are rounded one by one to what they are of."""
    is_half = a.dtype.itemsize == 2
    if total is not None and not is_half:
        return total.addmm_(a, b)
    product = torch.mm(a, b, out_dtype=torch.float32) if is_half and a.is_cuda else a @ b
    return product if total is None else total.float().add_(product)


def torch_predict(
    hidden_NE: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    original_N: Tensor,
    weights_N: Tensor,
    sampling: Sampling | None,
    max_rows: int | None = None,
) -> Predictions:
    """``reference_predict`` by ``predict_in_chunks``."""
    return predict_in_chunks(_score, hidden_NE, table_VE, bias_V, original_N, weights_N, sampling, max_rows)


def _score(
    logits_CW: Tensor, bias_W: Tensor, original_C: Tensor, weights_C: Tensor, sampling: Sampling | None,
    d_bias_W: Tensor | None,
) -> Scores:  # fmt: skip
    """A few rows at a time, which stay in the cache."""
    rows = max(1, _SCORED_AT_ONCE[logits_CW.device.type] // len(bias_W))
    parts = []
    for first in range(0, max(1, len(logits_CW)), rows):
        part = slice(first, first + rows)
        drawn = sampling and replace(sampling, uniform_N=sampling.uniform_N[part])
        parts.append(_score_rows(logits_CW[part], bias_W, original_C[part, None], weights_C[part], drawn, d_bias_W))
    nll_C, is_correct_C, sampled_C = map(_join, zip(*parts, strict=True))
    assert nll_C is not None and is_correct_C is not None
    return nll_C, is_correct_C, sampled_C


def _score_rows(
    logits_RW: Tensor, bias_W: Tensor, original_R1: Tensor, weights_R: Tensor, sampling: Sampling | None,
    d_bias_W: Tensor | None,
) -> Scores:  # fmt: skip
    wide_RW = logits_RW.to(bias_W.dtype).add_(bias_W)
    best_R1 = _argmax(wide_RW)
    probability_RW = wide_RW.softmax(-1)
    # The highest probability is 1 over the sum of the powers.
    log_sum_R1 = wide_RW.gather(1, best_R1) - probability_RW.gather(1, best_R1).log()
    nll_R1 = log_sum_R1 - wide_RW.gather(1, original_R1)
    sampled_R = None
    if sampling is not None:
        sampled_R = _draw(_drawn_from(wide_RW, probability_RW, original_R1, sampling), sampling.uniform_N)
    if d_bias_W is not None:
        probability_RW.scatter_add_(1, original_R1, probability_RW.new_full((1, 1), -1.0).expand_as(original_R1))
        d_bias_W.addmv_(probability_RW.t(), weights_R)
        logits_RW.copy_(probability_RW)
    return nll_R1.squeeze(1), (best_R1 == original_R1).squeeze(1), sampled_R


def _argmax(wide_RW: Tensor) -> Tensor:
    """``argmax(-1, keepdim=True)`` of whole blocks: the best block, then the best in it. A CPU takes a sixth of the
    time."""
    block_R = wide_RW.unflatten(1, (-1, _BLOCK)).amax(-1).argmax(-1)
    return (block_R * _BLOCK + _take_block(wide_RW, block_R).argmax(-1))[:, None]


def _take_block(wide_RW: Tensor, block_R: Tensor) -> Tensor:
    """One block of each row, ``(R, S)``."""
    return wide_RW.unflatten(1, (-1, _BLOCK))[torch.arange(len(block_R), device=block_R.device), block_R]


def _drawn_from(wide_RW: Tensor, probability_RW: Tensor, original_R1: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 1 and not sampling.excludes_original:
        return probability_RW
    scaled_RW = wide_RW / sampling.temperature
    if sampling.excludes_original:
        scaled_RW.scatter_(1, original_R1, -torch.inf)
    return scaled_RW.softmax(-1)


def _draw(probability_RW: Tensor, uniform_R: Tensor) -> Tensor:
    """Which block of tokens, then which token in it."""
    cumulated_RK = probability_RW.unflatten(1, (-1, _BLOCK)).sum(-1).double().cumsum(-1)
    target_R = uniform_R * cumulated_RK[:, -1]
    block_R = _invert(cumulated_RK, target_R)
    before_R1 = F.pad(cumulated_RK, (1, 0)).gather(1, block_R[:, None])
    cumulated_RS = _take_block(probability_RW, block_R).double().cumsum(-1)
    return block_R * _BLOCK + _invert(cumulated_RS, target_R - before_R1.squeeze(1))


PREDICT: dict[str, Predict] = {"reference": reference_predict, "torch": torch_predict}
