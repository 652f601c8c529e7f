"""``model.kernels.detection`` in Triton, in one pass.

Shapes: B rows, T tokens of a row; X all of them; K counts; P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.detection import COUNTS, Detection

PROGRAMS = 512  # at most; a fixed number, so that sums are the same on every device
_OPTIONS: dict[str, Any] = {"TOKENS": 256}


def triton_detect(logits_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Detection:
    """``reference_detect``; keeps the logits' gradient alone."""
    assert logits_BT.dtype != torch.float64, "the kernel computes in fp32"
    return Detection(*_Detect.apply(logits_BT, is_replaced_BT, weights_BT))


class _Detect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Any:
        number = logits_BT.numel()
        bce_BT = torch.empty(logits_BT.shape, dtype=torch.float32, device=logits_BT.device)
        d_logits_BT = torch.empty_like(bce_BT)
        programs = min(PROGRAMS, int(triton.cdiv(number, _OPTIONS["TOKENS"])))
        partials_KP = bce_BT.new_empty(len(COUNTS), programs)
        if number:
            _detect_tokens[(programs,)](
                logits_BT.contiguous(), is_replaced_BT.contiguous(), weights_BT.contiguous(), bce_BT, d_logits_BT,
                partials_KP, number, **_OPTIONS,
            )  # fmt: skip
        sums = partials_KP.sum(1)
        ctx.save_for_backward(d_logits_BT)
        ctx.dtype = logits_BT.dtype
        ctx.mark_non_differentiable(bce_BT, sums)
        return sums[COUNTS.index("discriminator_bce")].clone(), bce_BT, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        (d_logits_BT,) = ctx.saved_tensors
        return (d_logits_BT * d_loss).to(ctx.dtype), None, None


@triton.jit
def _detect_tokens(logits_X, is_replaced_X, weights_X, bce_X, d_logits_X, partials_KP, number, TOKENS: tl.constexpr):
    """Loss and gradient of each token; sums of ``COUNTS`` over every P-th block of tokens."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    zeros = tl.zeros((TOKENS,), tl.float32)
    detected, replaced, bces, correct, flagged, found = zeros, zeros, zeros, zeros, zeros, zeros
    for block in range(program, tl.cdiv(number, TOKENS), programs):
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        inside = tokens < number
        logits = tl.load(logits_X + tokens, inside, other=0.0).to(tl.float32)
        is_replaced = tl.load(is_replaced_X + tokens, inside, other=0) != 0
        weights = tl.load(weights_X + tokens, inside, other=0.0).to(tl.float32)
        labels = is_replaced.to(tl.float32)
        power = tl.exp(-tl.abs(logits))
        one_more = 1 + power  # log(1 + power) from what addition rounded it to (Kahan): exact for small powers too
        log_1p = tl.where(one_more == 1, power, tl.log(one_more) * (power / tl.maximum(one_more - 1, 1e-30)))
        bce = tl.maximum(logits, 0.0) - logits * labels + log_1p
        is_flagged = logits > 0
        tl.store(bce_X + tokens, bce, inside)
        sigmoid = tl.where(logits < 0, power, 1.0) / one_more
        tl.store(d_logits_X + tokens, (sigmoid - labels) * weights, inside)
        detected += weights
        replaced += tl.where(is_replaced, weights, 0.0)
        bces += bce * weights
        correct += tl.where(is_flagged == is_replaced, weights, 0.0)
        flagged += tl.where(is_flagged, weights, 0.0)
        found += tl.where(is_flagged & is_replaced, weights, 0.0)
    partials_KP += program
    tl.store(partials_KP, tl.sum(detected, 0))
    tl.store(partials_KP + programs, tl.sum(replaced, 0))
    tl.store(partials_KP + 2 * programs, tl.sum(bces, 0))
    tl.store(partials_KP + 3 * programs, tl.sum(correct, 0))
    tl.store(partials_KP + 4 * programs, tl.sum(flagged, 0))
    tl.store(partials_KP + 5 * programs, tl.sum(found, 0))
