"""Counter-based random numbers in torch: a draw is a function of its key alone.

The same key gives the same draw on every device, in every process and after
every resume, so nothing random has to be stored.
"""

import torch
from torch import Tensor

_M32, _M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def hash32(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain) on int64 tensors holding 32-bit values."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _M32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _M32
    return value ^ (value >> 16)


def keyed_bits(keys_B: Tensor, num_draws: int, stream: int) -> Tensor:
    """Uniform 32-bit integers, int64 ``(B, num_draws)``.

    Args:
        keys_B: int64 keys, one for each row; all 64 bits count.
        num_draws: Draws for each row.
        stream: Separates uses of the same key.
    """
    low, high = keys_B & _M32, (keys_B >> 32) & _M32
    row_B1 = hash32(hash32(low ^ (stream * 0x9E3779B9 & _M32)) ^ high)[:, None]
    counter_N = torch.arange(num_draws, device=keys_B.device)
    return hash32(hash32((counter_N * 0x9E3779B9) & _M32 ^ row_B1) ^ row_B1)


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
