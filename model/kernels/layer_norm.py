"""Dropout, residual and LayerNorm, as they follow each sublayer; and LayerNorm with dropout after it.

Shapes: C columns, the last axis; all others together are rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.dropout import Dropout, drop, keep_mask_of, reference_dropout

AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float, Dropout | None], Tensor]


def reference_add_norm(
    x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
) -> Tensor:
    """LayerNorm(residual + dropout(x)), statistics in fp32 (Ba, Kiros and Hinton, 2016).

    Args:
        x: ``(…, C)``, what a sublayer gives; may be a view.
        residual: What it read, the same shape and dtype.
        weight_C: Gain.
        bias_C: Shift.
        eps: Added to the variance.
        dropout: Of ``x``. Rows are numbered through, columns are those of the tensor.

    Returns:
        ``(…, C)`` in the dtype of ``x``.
    """
    return reference_layer_norm(residual + reference_dropout(x, dropout), weight_C, bias_C, eps)


def reference_layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias by plain products."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normalized = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalized * weight_C + bias_C).to(x.dtype)


def torch_add_norm(
    x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
) -> Tensor:
    """The same by torch's LayerNorm; keeps the sum alone and draws the mask again in the backward pass."""
    if torch.compiler.is_compiling():  # the compiler fuses plain products, and decides itself what is kept
        return layer_norm(residual + reference_dropout(x, dropout), weight_C, bias_C, eps)
    return _AddNorm.apply(x, residual, weight_C, bias_C, eps, dropout)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """torch's LayerNorm, whose sums are in fp32 also where ``x`` is narrower."""
    dtype = _dtype_inside(x)
    return F.layer_norm(x.to(dtype), weight_C.shape, weight_C.to(dtype), bias_C.to(dtype), eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """``layer_norm`` as a module: ZeRO stage 3 gathers a module's weights when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        """``(…, C)`` in the dtype of ``x``."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def _dtype_inside(x: Tensor) -> torch.dtype:
    """On a CPU torch adds up gradients of gain and shift in the dtype of ``x``: for 8,192 rows in bf16 7 % off. On a
    GPU it adds up in fp32, and all its arguments have one dtype.
    """
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
    ) -> Tensor:
        if dropout is None:
            total = residual + x
        else:
            total = torch.addcmul(residual, x, keep_mask_of(x, dropout).to(x.dtype), value=dropout.scale)
        dtype = _dtype_inside(x)
        gain_C, shift_C = weight_C.to(dtype), bias_C.to(dtype)
        out, mean, rstd = torch.native_layer_norm(total, weight_C.shape, gain_C, shift_C, eps)
        ctx.save_for_backward(total, mean, rstd, weight_C, bias_C)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total, mean, rstd, weight_C, bias_C = ctx.saved_tensors
        dtype = _dtype_inside(total)
        d_total, d_weight_C, d_bias_C = torch.ops.aten.native_layer_norm_backward(
            gradient.to(dtype).contiguous(), total.to(dtype), weight_C.shape, mean, rstd, weight_C.to(dtype),
            bias_C.to(dtype), [True, True, True],
        )  # fmt: skip
        d_total = d_total.to(total.dtype)
        d_x = drop(d_total, ctx.dropout)
        return d_x, d_total, d_weight_C.to(weight_C.dtype), d_bias_C.to(bias_C.dtype), None, None


ADD_NORM: dict[str, AddNorm] = {"reference": reference_add_norm, "torch": torch_add_norm}
