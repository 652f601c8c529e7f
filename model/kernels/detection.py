"""Replaced token detection: the loss and what is counted of it, in one pass.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

COUNTS = ("detected", "detected_replaced", "discriminator_bce", "discriminator_correct", "flagged", "flagged_replaced")
"""What is added up over tokens: their weights; of those that are replaced; losses; right answers; answers "replaced",
and of those the right ones."""


@dataclass(frozen=True)
class Detection:
    """How well replaced tokens were told from original ones.

    Attributes:
        loss: Weighted sum of the tokens' losses, fp32, a scalar; the only one with a gradient.
        bce_BT: Loss of each token, fp32.
        sums: float32 ``(6,)`` in the order of ``COUNTS``.
    """

    loss: Tensor
    bce_BT: Tensor
    sums: Tensor


Detect = Callable[[Tensor, Tensor, Tensor], Detection]


def reference_detect(logits_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Detection:
    """Binary cross-entropy of sigmoid(logits) in fp32.

    Args:
        logits_BT: Positive means replaced; any float type.
        is_replaced_BT: The labels, bool.
        weights_BT: fp32 weight of each token; no gradient.

    Returns:
        See ``Detection``.
    """
    logits_BT = logits_BT.to(torch.promote_types(logits_BT.dtype, torch.float32))
    bce_BT = F.binary_cross_entropy_with_logits(logits_BT, is_replaced_BT.to(logits_BT.dtype), reduction="none")
    loss = (bce_BT * weights_BT).sum()
    return Detection(loss, bce_BT.detach(), _count(logits_BT.detach(), bce_BT.detach(), is_replaced_BT, weights_BT))


def _count(logits_BT: Tensor, bce_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Tensor:
    is_flagged_BT = logits_BT > 0
    counted = (
        torch.ones_like(bce_BT), is_replaced_BT, bce_BT, is_flagged_BT == is_replaced_BT, is_flagged_BT,
        is_flagged_BT & is_replaced_BT,
    )  # fmt: skip
    return torch.stack([(c * weights_BT).sum() for c in counted])


def torch_detect(logits_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Detection:
    """``reference_detect``; keeps the logits' gradient alone."""
    return Detection(*_Detect.apply(logits_BT, is_replaced_BT, weights_BT))


class _Detect(torch.autograd.Function):
    """d bce / d logit = sigmoid(logit) - label."""

    @staticmethod
    def forward(ctx: Any, logits_BT: Tensor, is_replaced_BT: Tensor, weights_BT: Tensor) -> Any:
        found = reference_detect(logits_BT, is_replaced_BT, weights_BT)
        wide_BT = logits_BT.to(found.bce_BT.dtype)
        # Not in fp16 yet: the factor that scales its losses comes with d_loss.
        ctx.save_for_backward((wide_BT.sigmoid() - is_replaced_BT.to(wide_BT.dtype)) * weights_BT)
        ctx.dtype = logits_BT.dtype
        ctx.mark_non_differentiable(found.bce_BT, found.sums)
        return found.loss, found.bce_BT, found.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        (gradient_BT,) = ctx.saved_tensors
        return (gradient_BT * d_loss).to(ctx.dtype), None, None


DETECT: dict[str, Detect] = {"reference": reference_detect, "torch": torch_detect}
