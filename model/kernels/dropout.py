"""Dropout whose mask is a function of a key, so that forward, backward and recomputation agree on every device.

An element has a row and a column number. Two neighbouring columns share a 32-bit word, 16 bits each: a hash of key, row
and column // 2, like those of ``model.keyed``. All backends draw the same.

Shapes: R rows, C columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.keyed import GOLDEN, hash32, hash32_numpy, hashed_counters, keyed_bits_numpy

_M32 = 0xFFFFFFFF
_STREAM = 0xD0
_WORDS_AT_ONCE = 1 << 16  # 256 KiB stay in a core's cache: four times as fast


@dataclass(frozen=True)
class Dropout:
    """Drop elements of one tensor.

    Attributes:
        probability: Of dropping one, from 0 to 1; rounded to a multiple of 2^-16 below 1.
        key: int64 scalar below 2^32 on the device; another one for each use.
    """

    probability: float
    key: Tensor

    @property
    def threshold(self) -> int:
        """Draws of 16 bits below it drop; the highest one always stays."""
        return min(round(self.probability * 65536), 65535)

    @property
    def scale(self) -> float:
        """What the others are multiplied by."""
        return 65536 / (65536 - self.threshold)


def dropout_keys(seed: int, network: int, number: int, device: torch.device | str) -> Tensor:
    """Keys for ``number`` uses in a network, int64 ``(number,)``; a function of a 63-bit seed."""
    keys = keyed_bits_numpy(np.array([seed], np.int64), np.arange(number), _STREAM + network)[0]
    return torch.from_numpy(keys.astype(np.int64)).to(device, non_blocking=True)


def dropout_at(keys_S: Tensor | None, site: int, probability: float) -> Dropout | None:
    """Dropout number ``site`` of a network; None where nothing is dropped."""
    return Dropout(probability, keys_S[site]) if keys_S is not None and probability > 0 else None


def keeps(dropout: Dropout, rows: Tensor, columns: Tensor) -> Tensor:
    """True where an element stays, for int64 row and column numbers that broadcast; the definition."""
    row_key = hash32(hash32(rows * GOLDEN & _M32) ^ dropout.key)
    words = hash32(hash32((columns >> 1) * GOLDEN & _M32) ^ row_key)
    return (words >> ((columns & 1) << 4) & 0xFFFF) >= dropout.threshold


def keep_mask(dropout: Dropout, num_rows: int, num_columns: int) -> Tensor:
    """True where an element of rows 0, 1, … and columns 0, 1, … stays, ``(R, C)``."""
    if dropout.key.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(keep_rows_numpy(dropout, np.arange(num_rows, dtype=np.uint32), num_columns))
    rows_R1 = torch.arange(num_rows, device=dropout.key.device)[:, None]
    return keeps(dropout, rows_R1, torch.arange(num_columns, device=dropout.key.device))


def keep_rows_numpy(dropout: Dropout, rows_R: np.ndarray, num_columns: int) -> np.ndarray:
    """``keeps`` for some rows and columns 0, 1, … on a CPU, bool ``(R, C)``; a third of a nanosecond an element.

    Args:
        dropout: Its key lies on the CPU.
        rows_R: uint32 row numbers.
        num_columns: C.
    """
    column_words = hashed_counters((num_columns + 1) // 2)
    row_keys_R1 = hash32_numpy(hash32_numpy(rows_R * np.uint32(GOLDEN)) ^ np.uint32(int(dropout.key)))[:, None]
    keep_RC = np.empty((len(rows_R), 2 * len(column_words)), np.bool_)
    rows_at_once = max(1, _WORDS_AT_ONCE // len(column_words))
    for first in range(0, len(rows_R), rows_at_once):
        part = slice(first, first + rows_at_once)
        words = hash32_numpy(column_words ^ row_keys_R1[part])
        np.greater_equal(words.view("<u2"), dropout.threshold, out=keep_RC[part])
    return keep_RC[:, :num_columns]


def reference_dropout(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Drops elements of ``x (…, C)``, whose rows are numbered through, and scales the others; by plain products."""
    if dropout is None:
        return x
    keep = keep_mask(dropout, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
    return x * keep * dropout.scale


class _DropoutFunction(torch.autograd.Function):
    """Draws the mask once more in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return drop(x, dropout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return drop(gradient, ctx.dropout), None


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """``reference_dropout`` without a graph."""
    if dropout is None:
        return x
    return (x * keep_mask_of(x, dropout)).mul_(dropout.scale)


def keep_mask_of(x: Tensor, dropout: Dropout) -> Tensor:
    """``keep_mask`` in the shape of ``x``, as uint8: a CPU multiplies by these five times as fast as by bool."""
    keep = keep_mask(dropout, x.numel() // x.shape[-1], x.shape[-1])
    return keep.view(torch.uint8).view(x.shape)


def torch_dropout(x: Tensor, dropout: Dropout | None) -> Tensor:
    """The same as ``reference_dropout``, keeping no mask."""
    return x if dropout is None else _DropoutFunction.apply(x, dropout)  # type: ignore[no-any-return]
