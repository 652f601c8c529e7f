"""Bias and GELU, between the two products of feed-forward.

Shapes: F columns, the last axis.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BiasGelu = Callable[[Tensor, Tensor, bool], Tensor]


def reference_bias_gelu(x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
    """GELU(x + bias) by plain products, in fp32 (Hendrycks and Gimpel, 2016).

    Args:
        x: ``(…, F)``; may be a view.
        bias_F: Of the product that made ``x``.
        approximate: The tanh form instead of the exact one by erf.

    Returns:
        ``(…, F)`` in the dtype of ``x``.
    """
    total = x.to(torch.promote_types(x.dtype, torch.float32)) + bias_F
    if approximate:
        inner = math.sqrt(2 / math.pi) * (total + 0.044715 * total**3)
        return (0.5 * total * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * total * (1 + torch.erf(total / math.sqrt(2)))).to(x.dtype)


def torch_bias_gelu(x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
    """The same by torch's GELU; keeps the sum alone."""
    if torch.compiler.is_compiling():
        return F.gelu(x + bias_F, approximate=_form(approximate))
    return _BiasGelu.apply(x, bias_F, approximate)  # type: ignore[no-any-return]


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
        total = x + bias_F.to(x.dtype)
        ctx.save_for_backward(total)
        ctx.form, ctx.bias_dtype = _form(approximate), bias_F.dtype
        return F.gelu(total, approximate=ctx.form)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (total,) = ctx.saved_tensors
        d_total = torch.ops.aten.gelu_backward(gradient.contiguous(), total, approximate=ctx.form)
        return d_total, d_total.flatten(0, -2).sum(0, dtype=ctx.bias_dtype), None


def gelu_linear(
    x: Tensor, bias_F: Tensor, weight_HF: Tensor, bias_H: Tensor, approximate: bool, bias_gelu: BiasGelu
) -> Tensor:
    """The product that follows, GELU(x + bias_F) · weight^T + bias_H, keeping ``x`` alone for the backward pass.

    GELU's output, a seventh of what a layer keeps, is made again there: about 1 % of a step's time.

    Args:
        x: ``(…, F)``, what the product before gives without its bias.
        bias_F: That bias.
        weight_HF: Of the product that follows.
        bias_H: Its bias.
        approximate: As ``bias_gelu`` takes it.
        bias_gelu: A backend.

    Returns:
        ``(…, H)``.
    """
    if torch.compiler.is_compiling():
        return F.linear(bias_gelu(x, bias_F, approximate), weight_HF, bias_H)
    return _GeluLinear.apply(x, bias_F, weight_HF, bias_H, approximate, bias_gelu)  # type: ignore[no-any-return]


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias_F: Tensor, weight_HF: Tensor, bias_H: Tensor, approximate: bool, bias_gelu: BiasGelu
    ) -> Tensor:
        ctx.save_for_backward(x, bias_F, weight_HF)
        ctx.bias_gelu, ctx.approximate, ctx.bias_dtype = bias_gelu, approximate, bias_H.dtype
        return F.linear(bias_gelu(x, bias_F, approximate), weight_HF, bias_H)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, bias_F, weight_HF = (saved.detach() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            leaves = x.requires_grad_(), bias_F.requires_grad_()
            inner = ctx.bias_gelu(*leaves, ctx.approximate)
        flat, inner_NF = gradient.flatten(0, -2), inner.detach().flatten(0, -2).to(gradient.dtype)
        d_weight_HF, d_bias_H = flat.t() @ inner_NF, flat.sum(0, dtype=ctx.bias_dtype)
        d_inner = (flat @ weight_HF.to(flat.dtype)).view_as(inner).to(inner.dtype)
        d_x, d_bias_F = torch.autograd.grad(inner, leaves, d_inner)
        return d_x, d_bias_F, d_weight_HF, d_bias_H, None, None


def _form(approximate: bool) -> str:
    return "tanh" if approximate else "none"


BIAS_GELU: dict[str, BiasGelu] = {"reference": reference_bias_gelu, "torch": torch_bias_gelu}
