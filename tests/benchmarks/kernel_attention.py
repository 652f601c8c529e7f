"""Attention in packed rows: inputs, a float64 reference of its own, dropout's statistics, times.

Shapes: B rows, H heads, T tokens, D head size.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from synthetic import random_pieces
from timing import Timer, interleave, paired_ratio, spread
from torch import Tensor

from model.kernels.attention import ATTENTION, Packing

_DROPOUT = 0.1
_LARGE_HEADS = {"discriminator": 16, "generator": 4}
_MAX_DEVIATION = 6.0  # standard deviations: one false alarm in half a billion


def accuracy(device: str, is_tiny: bool, dtypes: list[torch.dtype]) -> Iterator[dict[str, Any]]:
    """Relative errors of output and gradients of each backend, on inputs drawn anew for each check."""
    length, head_size, rows = (32, 8, 2) if is_tiny else (512, 64, 4)
    for network, heads in _LARGE_HEADS.items():
        for num_pieces in ("one piece", "several pieces"):
            pieces_BT = random_pieces(rows, length, num_pieces == "several pieces").to(device)
            for backend, attention in ATTENTION.items():
                for dtype in dtypes:
                    shape = (rows, heads, length, head_size)
                    record = {
                        "backend": backend,
                        "case": f"{network}, {num_pieces}",
                        "dtype": _name(dtype),
                        "shape_bhtd": list(shape),
                    }
                    yield record | _outcome(lambda a=attention, s=shape, p=pieces_BT, d=dtype: _errors(a, s, p, d))


def attention_float64(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, pieces_BT: Tensor) -> Tensor:
    """Softmax(QK^T / sqrt(D)) V within pieces; float64 in, float64 throughout."""
    scores_BHTT = query_BHTD @ key_BHTD.transpose(-1, -2) / math.sqrt(query_BHTD.shape[-1])
    same_piece_BTT = pieces_BT[:, :, None] == pieces_BT[:, None, :]
    return scores_BHTT.masked_fill(~same_piece_BTT[:, None], -torch.inf).softmax(-1) @ value_BHTD


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64."""
    out, reference = out.detach(), reference.detach()
    return float((out.double() - reference).norm() / reference.norm())


def _errors(
    attention: Callable[..., Tensor], shape: tuple[int, ...], pieces_BT: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """The inputs are rounded to ``dtype`` first, so that the errors are the backend's alone."""
    rounded = [torch.randn(shape, dtype=torch.float64, device=pieces_BT.device).to(dtype) for _ in range(4)]
    *inputs, gradient = (tensor.requires_grad_() for tensor in rounded)
    out = attention(*inputs, Packing(pieces_BT), 0.0)
    gradients = torch.autograd.grad(out, inputs, gradient.detach())
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = attention_float64(*exact_inputs, pieces_BT)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, gradient.detach().double())
    errors = {"output": relative_error(out, exact)}
    for name, found, expected in zip(("query", "key", "value"), gradients, exact_gradients, strict=True):
        errors[f"gradient of {name}"] = relative_error(found, expected)
    return {"relative_errors": errors}


def dropout(device: str) -> Iterator[dict[str, Any]]:
    """What dropout does to the probabilities, seen by taking the identity matrix as values."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for backend, attention in ATTENTION.items():
        yield {"backend": backend, "dtype": _name(dtype)} | _outcome(lambda a=attention: _dropout(a, dtype, device))


def _dropout(attention: Callable[..., Tensor], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """With V = I the output is P·M/(1-p); with an output gradient of I that of V is its transpose."""
    size, rows, heads = 64, 8, 4
    query, key = (torch.randn(rows, heads, size, size, dtype=torch.float64, device=device).to(dtype) for _ in "qk")
    value = torch.eye(size, dtype=dtype, device=device).expand(rows, heads, size, size).contiguous().requires_grad_()
    pieces_BT = torch.zeros(rows, size, dtype=torch.long, device=device)
    out = attention(query, key, value, Packing(pieces_BT), _DROPOUT)
    (gradient,) = torch.autograd.grad(out, value, value.detach())
    kept = (out != 0).double()
    exact = attention_float64(query.double(), key.double(), value.detach().double(), pieces_BT)
    found = {
        "dropout": _DROPOUT,
        "kept_share": float(kept.mean()),
        "kept_share_deviations": float((kept.mean() - (1 - _DROPOUT)).abs())
        / math.sqrt(_DROPOUT * (1 - _DROPOUT) / kept.numel()),
        "largest_correlation_deviations": _largest_correlation(kept.flatten(0, 1)),
        "scaled_values_error": relative_error(out, exact * kept / (1 - _DROPOUT)),
        "backward_mask_error": relative_error(gradient.transpose(-1, -2), out.detach().double()),
    }
    return found | {"problems": _dropout_problems(found)}


def _largest_correlation(kept: Tensor) -> float:
    """Greatest correlation of the mask with itself shifted, in standard deviations of independent draws."""
    centred = (kept - kept.mean()) / kept.std()
    largest = 0.0
    for dim in range(centred.ndim):
        for shift in (1, 2, 3, 4, 8, 16, 32):
            if shift < centred.shape[dim]:
                length = centred.shape[dim] - shift
                product = centred.narrow(dim, 0, length) * centred.narrow(dim, shift, length)
                largest = max(largest, abs(float(product.mean())) * math.sqrt(product.numel()))
    return largest


def _dropout_problems(found: dict[str, Any]) -> list[str]:
    problems = []
    if not found["kept_share_deviations"] <= _MAX_DEVIATION:
        problems.append(f"dropout keeps {found['kept_share']:.4f} instead of {1 - _DROPOUT}")
    if not found["largest_correlation_deviations"] <= _MAX_DEVIATION:
        problems.append("dropped positions are correlated")
    if not found["scaled_values_error"] <= 2e-2:
        problems.append(f"kept probabilities are off by {found['scaled_values_error']:.1e}")
    if not found["backward_mask_error"] <= 2e-2:
        problems.append("the backward pass drops other positions than the forward pass")
    return problems


def times(timer: Timer, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds and nominal TFLOP/s of each backend with dropout 0.1, interleaved."""
    rows, length, head_size = (2, 32, 8) if is_tiny else (64, 512, 64)
    dtype = torch.float32 if is_tiny else torch.bfloat16
    for network, heads in _LARGE_HEADS.items():
        for num_pieces in ("one piece", "several pieces"):
            pieces_BT = random_pieces(rows, length, num_pieces == "several pieces").to(timer.device)
            shape = (rows, heads, length, head_size)
            flops = 4 * rows * heads * length * length * head_size
            for record in _times(timer, shape, pieces_BT, dtype, flops):
                yield {"case": f"{network}, {num_pieces}", "shape_bhtd": list(shape), "dtype": _name(dtype)} | record


def _times(
    timer: Timer, shape: tuple[int, ...], pieces_BT: Tensor, dtype: torch.dtype, flops: int
) -> Iterator[dict[str, Any]]:
    packing = Packing(pieces_BT)
    query, key, value, gradient = (torch.randn(shape, dtype=dtype, device=timer.device) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

    def forward(attention: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            attention(*inputs, packing, _DROPOUT)

    def forward_backward(attention: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attention(*inputs, packing, _DROPOUT), inputs, gradient)

    usable = {}
    for backend, attention in ATTENTION.items():
        outcome = _outcome(lambda a=attention: forward_backward(a))
        if "error" in outcome:
            yield {"backend": backend} | outcome
        else:
            usable[backend] = attention
    only_forward = interleave(timer, {n: lambda a=a: forward(a) for n, a in usable.items()}, rounds=5, calls=4)
    both = interleave(timer, {n: lambda a=a: forward_backward(a) for n, a in usable.items()}, rounds=5, calls=4)
    for backend in usable:
        forward_s, both_s = spread(only_forward[backend])["median"], spread(both[backend])["median"]
        yield {
            "backend": backend,
            "dropout": _DROPOUT,
            "forward_ms": forward_s * 1e3,
            "forward_backward_ms": both_s * 1e3,
            "forward_tflop_per_s": flops / forward_s / 1e12,
            "forward_backward_tflop_per_s": 3 * flops / both_s / 1e12,
            "speed_over_reference": paired_ratio(both["reference"], both[backend]),
        }


def _outcome(attempt: Callable[[], Any]) -> dict[str, Any]:
    """What an attempt returns, or the error of a backend that does not run here."""
    try:
        return attempt() or {}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
