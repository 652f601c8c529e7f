"""LayerNorm after a sublayer, bias and GELU, embeddings, detection: cases, formulas in float64, eager torch as peer.

Shapes: B rows of T tokens, C columns.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_case import DROPOUT, Case, Cost, Peer, Tensors
from torch import Tensor

from model.kernels.dropout import Dropout, keep_mask

_EPS = 1e-12
_HALF_BYTES = 2  # of a number in bf16


def _tokens(is_tiny: bool, for_times: bool) -> tuple[int, int]:
    return (3, 24) if is_tiny else (64 if for_times else 8, 512)


def _drawn(device: str, dtype: torch.dtype, *shape: int, mean: float = 0.0) -> Tensor:
    return (mean + torch.randn(shape, dtype=torch.float64, device=device)).to(dtype)


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    return x * keep_mask(dropout, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape) * dropout.scale


def add_norm(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """LayerNorm(residual + dropout(x)) in the widths of both networks."""
    for columns in [48] if is_tiny else [1024, 256]:
        yield _add_norm(device, (*_tokens(is_tiny, for_times), columns))


def _add_norm(device: str, shape: tuple[int, int, int]) -> Case:
    rows, columns = shape[0] * shape[1], shape[2]
    one_bytes = _HALF_BYTES * rows * columns

    def make(dtype: torch.dtype) -> Tensors:
        x, residual = (_drawn(device, dtype, *shape) for _ in range(2))
        gain, shift = _drawn(device, dtype, columns, mean=1), _drawn(device, dtype, columns)
        return {"x": x, "residual": residual, "gain": gain, "shift": shift}

    def run(function: Any, leaves: Tensors, dropout: Dropout | None) -> Tensors:
        return {"output": function(*leaves.values(), _EPS, dropout)}

    def exact(leaves: Tensors, dropout: Dropout | None) -> Tensors:
        x, residual, gain, shift = leaves.values()
        return {"output": F.layer_norm(residual + _dropped(x, dropout), (columns,), gain, shift, _EPS)}

    def kept(function: Any, dropout: Dropout) -> tuple[Tensor, Tensor]:
        sign_C = torch.where(torch.arange(columns, device=device) % 2 == 0, 1.0, -1.0)
        x = sign_C.expand(rows, columns).contiguous().requires_grad_()
        out = function(x, torch.zeros_like(x), torch.ones_like(sign_C), torch.zeros_like(sign_C), _EPS, dropout)
        (d_x,) = torch.autograd.grad(out, x, torch.randn_like(out))
        low, high = out.detach().amin(-1, keepdim=True), out.detach().amax(-1, keepdim=True)
        # A row holds three values: those of 1 and -1, and of what was dropped, which lies in the middle.
        return (out.detach() - (low + high) / 2).abs() > (high - low) / 4, d_x != 0

    peers: dict[str, Peer] = {"eager": _eager_norm}
    if device == "cuda" and importlib.util.find_spec("transformer_engine"):
        peers["transformer_engine"] = _te_norm(columns)
    return Case(
        f"{rows}×{columns}", make, run, exact, peers, Cost(3 * one_bytes), Cost(8 * one_bytes),
        keep=lambda dropout: keep_mask(dropout, rows, columns), kept=kept,
    )  # fmt: skip


def _eager_norm(leaves: Tensors) -> Tensor:
    x, residual, gain, shift = leaves.values()
    return F.layer_norm(residual + F.dropout(x, DROPOUT), gain.shape, gain, shift, _EPS)


def _te_norm(columns: int) -> Peer:
    """TransformerEngine's LayerNorm after eager dropout and sum; it keeps gain and shift itself."""
    engine = importlib.import_module("transformer_engine.pytorch")
    norm = engine.LayerNorm(columns, eps=_EPS, params_dtype=torch.bfloat16)

    def call(leaves: Tensors) -> Tensor:
        out = norm(leaves["residual"] + F.dropout(leaves["x"], DROPOUT))
        return out + 0 * (leaves["gain"] + leaves["shift"]).sum()  # which the clock asks the gradients of

    return call


def bias_gelu(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """GELU(x + bias), both forms, in the widths of both feed-forwards."""
    for approximate in (False, True):
        for columns in [48] if is_tiny else [4096, 1024]:
            yield _bias_gelu(device, (*_tokens(is_tiny, for_times), columns), approximate)


def _bias_gelu(device: str, shape: tuple[int, int, int], approximate: bool) -> Case:
    rows, form = shape[0] * shape[1], "tanh" if approximate else "none"
    one_bytes = _HALF_BYTES * rows * shape[2]

    def make(dtype: torch.dtype) -> Tensors:
        return {"x": _drawn(device, dtype, *shape), "bias": _drawn(device, dtype, shape[2])}

    def run(function: Any, leaves: Tensors, _: Dropout | None) -> Tensors:
        return {"output": function(leaves["x"], leaves["bias"], approximate)}

    def eager(leaves: Tensors) -> Tensor:
        return F.gelu(leaves["x"] + leaves["bias"], approximate=form)

    return Case(
        f"{'tanh' if approximate else 'exact'}, {rows}×{shape[2]}", make, run,
        lambda leaves, _: {"output": eager(leaves)}, {"eager": eager}, Cost(2 * one_bytes), Cost(5 * one_bytes),
        tanh_gelu=approximate,
    )  # fmt: skip


def embed(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """Tokens, positions and types, LayerNorm, dropout; one token is as frequent as [MASK]."""
    tokens = _tokens(is_tiny, for_times)
    rows, (vocab_size, columns) = tokens[0] * tokens[1], (60, 48) if is_tiny else (30522, 1024)
    sizes = vocab_size, tokens[1], 2
    token_BT = torch.randint(vocab_size, tokens, device=device)
    token_BT[torch.rand(tokens, device=device) < 0.13] = 4
    position_BT = torch.arange(tokens[1], device=device).expand(tokens)
    indices = token_BT, position_BT, (position_BT > tokens[1] // 2).long()
    one_bytes = _HALF_BYTES * rows * columns

    def make(dtype: torch.dtype) -> Tensors:
        tables = {f"table {i}": _drawn(device, dtype, size, columns) for i, size in enumerate(sizes)}
        gain, shift = _drawn(device, dtype, columns, mean=1), _drawn(device, dtype, columns)
        return {**tables, "gain": gain, "shift": shift}

    def run(function: Any, leaves: Tensors, dropout: Dropout | None) -> Tensors:
        *tables, gain, shift = leaves.values()
        return {"output": function(tables, indices, gain, shift, _EPS, dropout)}

    def summed(leaves: Tensors) -> Tensor:
        *tables, gain, shift = leaves.values()
        total = sum(F.embedding(index, table) for table, index in zip(tables, indices, strict=True))
        return F.layer_norm(torch.as_tensor(total), (columns,), gain, shift, _EPS)

    def kept(function: Any, dropout: Dropout) -> tuple[Tensor, None]:
        out = run(function, make(torch.float32), dropout)["output"]
        return (out != 0).flatten(0, 1), None

    yield Case(
        f"{rows}×{columns}", make, run, lambda leaves, dropout: {"output": _dropped(summed(leaves), dropout)},
        {"eager": lambda leaves: F.dropout(summed(leaves), DROPOUT)},
        Cost(2 * one_bytes), Cost(4 * one_bytes + _HALF_BYTES * vocab_size * columns),
        keep=lambda dropout: keep_mask(dropout, rows, columns), kept=kept,
    )  # fmt: skip


def detect(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """The discriminator's loss and counts; a few hundred kilobytes, so launches are what is timed."""
    shape = _tokens(is_tiny, for_times)
    is_replaced_BT = torch.rand(shape, device=device) < 0.1
    weights_BT = (torch.rand(shape, device=device) < 0.9).float() / 100
    count = shape[0] * shape[1]

    def make(dtype: torch.dtype) -> Tensors:
        return {"logits": 2 * _drawn(device, dtype, *shape)}

    def run(function: Any, leaves: Tensors, _: Dropout | None) -> Tensors:
        found = function(leaves["logits"], is_replaced_BT, weights_BT)
        return {"output": found.loss, "loss of each": found.bce_BT, "counts": found.sums}

    yield Case(
        f"{shape[0]}×{shape[1]}", make, run, partial(_detect_exact, is_replaced_BT, weights_BT),
        {"eager": lambda leaves: _detect_exact(is_replaced_BT, weights_BT, leaves, None)["output"]},
        Cost(count * (2 + 1 + 4 + 4)), Cost(count * (2 + 1 + 4 + 4 + 2)),
    )  # fmt: skip


def _detect_exact(is_replaced_BT: Tensor, weights_BT: Tensor, leaves: Tensors, _: Dropout | None) -> Tensors:
    """In the dtype of the logits; weights are exact in both. The counts are those of ``model.kernels.detection``."""
    logits_BT = leaves["logits"]
    bce_BT = F.binary_cross_entropy_with_logits(logits_BT, is_replaced_BT.to(logits_BT.dtype), reduction="none")
    is_flagged_BT = logits_BT > 0
    parts = (
        torch.ones_like(bce_BT), is_replaced_BT, bce_BT, is_flagged_BT == is_replaced_BT, is_flagged_BT,
        is_flagged_BT & is_replaced_BT,
    )  # fmt: skip
    sums = torch.stack([(part * weights_BT).sum() for part in parts])
    return {"output": (bce_BT * weights_BT).sum(), "loss of each": bce_BT.detach(), "counts": sums.detach()}
