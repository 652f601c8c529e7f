"""The draws of ``model.kernels.dropout`` inside Triton kernels.

Shapes: R rows, C columns; both broadcast.
"""

import triton
import triton.language as tl


@triton.jit
def hash32(value):
    """``model.keyed.hash32`` of uint32 values; products wrap."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def row_keys(key, rows_R):
    """The part of a draw that a row's columns share, uint32. ``key`` is loaded from the int64 tensor."""
    return hash32(hash32(rows_R.to(tl.uint32) * 0x9E3779B9) ^ key.to(tl.uint32))


@triton.jit
def keeps(row_keys_R1, columns_1C, threshold):
    """True where an element stays: 16 bits of the word that columns 2i and 2i + 1 share."""
    columns_1C = columns_1C.to(tl.uint32)
    words = hash32(hash32((columns_1C >> 1) * 0x9E3779B9) ^ row_keys_R1)
    return (words >> ((columns_1C & 1) << 4) & 0xFFFF) >= threshold
