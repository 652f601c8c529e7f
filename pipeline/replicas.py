"""Silent corruption: weights that all processes hold alike are hashed on each and compared.

A flipped bit in memory or in a sum makes no process fail; it makes them train different models.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 22
"""Numbers that are widened at a time."""
_WEIGHTS = 65521
"""A prime: places are weighted by their number modulo this, so that exchanged values show."""


@torch.no_grad()
def digest_of(tensors: Iterable[Tensor]) -> list[int]:
    """Two sums over the bits of each tensor, modulo 2^64, taken on its device; one flipped bit changes the first."""
    sums: list[Any] = []
    for tensor in tensors:
        parts = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()]).split(_AT_ONCE)
        sums.append(sum(_sums_of(part.long(), number * _AT_ONCE) for number, part in enumerate(parts)))
    return torch.stack(sums).flatten().tolist() if sums else []


def _sums_of(bits_N: Tensor, first: int) -> Tensor:
    places_N = torch.arange(first, first + len(bits_N), device=bits_N.device) % _WEIGHTS + 1
    return torch.stack((bits_N.sum(), (bits_N * places_N).sum()))


def deviating(digests: list[list[int]]) -> list[int]:
    """Ranks whose digest is not the one that most have; all of them where two are equally frequent."""
    counts = Counter(map(tuple, digests)).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        return list(range(len(digests)))
    return [rank for rank, digest in enumerate(digests) if tuple(digest) != counts[0][0]]
