"""Counter-based random numbers in torch: a draw is a function of its key alone.

The same key gives the same draw on every device, in every process and after
every resume, so nothing random has to be stored.
"""

from functools import lru_cache

import numpy as np
from torch import Tensor

_M32, _M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B9


def hash32(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain) on int64 tensors holding 32-bit values."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _M32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _M32
    return value ^ (value >> 16)


def keyed_bits(keys_B: Tensor, counters: Tensor, stream: int) -> Tensor:
    """Uniform 32-bit integers in int64, one for each counter of each row.

    Args:
        keys_B: int64 keys, one for each row; all 64 bits count.
        counters: Numbers of the draws, 0 to 2^32 - 1: ``(N,)`` for every row, or ``(B, N)``.
        stream: Separates uses of the same key.
    """
    low, high = keys_B & _M32, (keys_B >> 32) & _M32
    row_B1 = hash32(hash32(low ^ (stream * GOLDEN & _M32)) ^ high)[:, None]
    return hash32(hash32((counters * GOLDEN) & _M32) ^ row_B1)


def keyed_bits_numpy(keys_B: np.ndarray, counters: np.ndarray, stream: int) -> np.ndarray:
    """The same as uint32, for CPUs: a tenth of the time, since products and shifts wrap by themselves.

    Args:
        keys_B: As ``keyed_bits`` takes them.
        counters: Likewise; at most 2^24.
        stream: Likewise.
    """
    low, high = keys_B.astype(np.uint32), (keys_B >> 32).astype(np.uint32)
    row_B1 = hash32_numpy(hash32_numpy(low ^ np.uint32(stream * GOLDEN & _M32)) ^ high)[:, None]
    return hash32_numpy(hashed_counters(int(counters.max()) + 1)[counters] ^ row_B1)


def hash32_numpy(value: np.ndarray) -> np.ndarray:
    """``hash32`` of uint32 values, in place."""
    scratch = value >> np.uint32(16)
    value ^= scratch
    value *= np.uint32(0x85EBCA6B)
    value ^= np.right_shift(value, np.uint32(13), out=scratch)
    value *= np.uint32(0xC2B2AE35)
    value ^= np.right_shift(value, np.uint32(16), out=scratch)
    return value


def hashed_counters(count: int) -> np.ndarray:
    """The part of a draw that is the same for all rows, for counters 0, 1, … below ``count``; not to be written to."""
    return _hashed_counters(1 << (count - 1).bit_length())[:count]


@lru_cache(maxsize=16)
def _hashed_counters(count: int) -> np.ndarray:
    """``count`` is a power of two, so that few are kept."""
    return hash32_numpy(np.arange(count, dtype=np.uint32) * np.uint32(GOLDEN))


def seed_for(seed: int, step: int, micro_batch: int, stream: int) -> int:
    """A 63-bit seed for torch's generators, for one use in one micro-batch of one step."""
    key = 0
    for part in (seed, step, micro_batch, stream):
        key = _mix64(key ^ part)
    return key >> 1


def _mix64(value: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _M64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _M64
    return value ^ (value >> 31)
