"""AdamW over many tensors: unscaling and clipping, the update, and the copies that a forward pass in half precision
reads, in one pass where a backend can.

Pipeline's optimizer asks for the update alone: under ZeRO and in half precision DeepSpeed unscales, clips and copies
by itself, in passes of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Without bias correction torch's formula is used at a step count where 1 - beta^step is 1 exactly.
_STEP_WITHOUT_CORRECTION = 1e9


@dataclass(frozen=True)
class AdamWRule:
    """What an update depends on beside the tensors.

    Attributes:
        lr: Learning rate; the decay is multiplied by it too.
        betas: How much of the moments stays, each from 0 to 1.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        bias_correction: Whether moments are divided by 1 - beta^step. The released optimizer does not
            (google-research/electra, ``model/optimization.py``).
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    bias_correction: bool


_Tensors = list[Tensor]
AdamW = Callable[
    [_Tensors, _Tensors, _Tensors, _Tensors, _Tensors, AdamWRule, Tensor | None, _Tensors | None], None
]  # fmt: skip


@torch.no_grad()
def reference_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: AdamWRule,
    scale: Tensor | None = None,
    half_copies: list[Tensor] | None = None,
) -> None:
    """One update in place, by plain products (Loshchilov and Hutter, 2019, algorithm 2).

        g      = scale * gradient
        m     += (1 - beta1) * (g - m)
        v     += (1 - beta2) * (g^2 - v)
        weight -= lr * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * weight)

    Without bias correction the powers of beta are left out. NaN and inf go into the result: skipping such a step is
    the caller's part.

    Args:
        weights: fp32, contiguous, on one device; at least one.
        gradients: Of their shapes; all fp32, bf16 or fp16. Some backends leave them multiplied by ``scale``.
        exp_avgs: First moments m, like the weights.
        exp_avg_sqs: Second moments v.
        steps: fp32 scalars, updates so far; read and counted up with bias correction only.
        rule: Learning rate and the like.
        scale: fp32 scalar on the device for all gradients: clipping's factor over the loss scale.
        half_copies: bf16 or fp16 tensors that become the rounded weights.
    """
    beta1, beta2 = rule.betas
    for weight, gradient, mean, square, step in zip(weights, gradients, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = gradient.to(weight.dtype)
        if scale is not None:
            wide = wide * scale
        mean.lerp_(wide, 1 - beta1)
        square.lerp_(wide * wide, 1 - beta2)
        corrected_mean, corrected_square = mean, square
        if rule.bias_correction:
            exponent = step.add_(1).double()  # in fp32, 1 - beta^step would have three digits at the start
            corrected_mean, corrected_square = mean / (1 - beta1**exponent), square / (1 - beta2**exponent)
        weight.sub_(rule.lr * (corrected_mean / (corrected_square.sqrt() + rule.eps) + rule.weight_decay * weight))
    _copy(weights, half_copies)


@torch.no_grad()
def torch_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: AdamWRule,
    scale: Tensor | None = None,
    half_copies: list[Tensor] | None = None,
) -> None:
    """The same by torch's fused kernel, which scales fp32 gradients in place; copies are a pass of their own."""
    if rule.bias_correction:
        torch._foreach_add_(steps, 1)
    else:
        steps = [torch.full_like(steps[0], _STEP_WITHOUT_CORRECTION)] * len(steps)
    wide = [gradient.to(weight.dtype) for weight, gradient in zip(weights, gradients, strict=True)]
    torch._fused_adamw_(
        weights, wide, exp_avgs, exp_avg_sqs, [], steps,
        lr=rule.lr, beta1=rule.betas[0], beta2=rule.betas[1], weight_decay=rule.weight_decay, eps=rule.eps,
        amsgrad=False, maximize=False, grad_scale=None if scale is None else scale.reciprocal(),
    )  # fmt: skip
    _copy(weights, half_copies)


def _copy(weights: list[Tensor], half_copies: list[Tensor] | None) -> None:
    if half_copies is not None:
        torch._foreach_copy_(half_copies, weights)


ADAMW: dict[str, AdamW] = {"reference": reference_adamw, "torch": torch_adamw}
