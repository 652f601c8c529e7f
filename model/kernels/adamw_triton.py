"""AdamW with unscaling, clipping and the copy to half precision in one pass, many tensors in one launch.

A launch reads a table with a row of addresses for each tensor, and a list that tells each program its tensor and its
block of elements in it. Elements are independent, so the result depends on nothing else.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.adamw import AdamWRule

_BLOCK = 4096
_NUM_WARPS = 8  # 16 elements a thread: four loads of 128 bits from each tensor
_COLUMNS: tl.constexpr = tl.constexpr(6)  # of the table: weight, gradient, moments, copy, elements
_FLOAT: tl.constexpr = tl.constexpr(tl.float32)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@torch.no_grad()
def triton_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: AdamWRule,
    scale: Tensor | None = None,
    half_copies: list[Tensor] | None = None,
) -> None:
    """See ``model.kernels.adamw.reference_adamw``; gradients stay as they are."""
    gradients = [gradient.contiguous() for gradient in gradients]
    lists = [weights, gradients, exp_avgs, exp_avg_sqs, half_copies if half_copies is not None else weights]
    assert all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists), "one dtype in each list"
    assert all(tensor.dtype == torch.float32 for tensor in (weights[0], exp_avgs[0], exp_avg_sqs[0]))
    assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)
    addresses = tuple(zip(*([tensor.data_ptr() for tensor in tensors] for tensors in lists), strict=True))
    sizes, device = tuple(weight.numel() for weight in weights), weights[0].device
    blocks_K2 = _blocks(sizes, device)
    _adamw_kernel[(len(blocks_K2),)](
        _table(addresses, sizes, device), blocks_K2, scale,
        _corrections(steps, rule.betas) if rule.bias_correction else None,
        rule.lr, 1 - rule.betas[0], 1 - rule.betas[1], rule.eps, rule.weight_decay,
        GRADIENT=_TYPES[gradients[0].dtype], HALF=_TYPES[half_copies[0].dtype] if half_copies else None,
        IS_ALIGNED=all(address % 16 == 0 for row in addresses for address in row), BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,  # type: ignore[call-arg]
    )  # fmt: skip


def _corrections(steps: list[Tensor], betas: tuple[float, float]) -> Tensor:
    """Counts up; what the first moment and the root of the second one are multiplied by, ``(N, 2)``."""
    torch._foreach_add_(steps, 1)
    exponent_N = torch.stack(steps).double()
    return torch.stack([1 / (1 - betas[0] ** exponent_N), (1 - betas[1] ** exponent_N).rsqrt()], 1).float()


@lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """A row for each tensor. Kept, since addresses mostly repeat from step to step and a copy waits for the GPU."""
    rows = [(*row, size) for row, size in zip(addresses, sizes, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).to(device)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Tensor and number of the block in it for each of K programs, int32 ``(K, 2)``."""
    counts = [-(-size // _BLOCK) for size in sizes]
    tensor_K = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    block_K = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    return torch.from_numpy(np.stack([tensor_K, block_K], 1)).to(device)


@triton.jit
def _adamw_kernel(
    table_ptr, blocks_ptr, scale_ptr, corrections_ptr, lr, rate1, rate2, eps, weight_decay,
    GRADIENT: tl.constexpr, HALF: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program)
    first = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK
    row_ptr = table_ptr + tensor * _COLUMNS
    size = tl.load(row_ptr + 5)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    mean_factor = 1.0
    root_factor = 1.0
    if corrections_ptr is not None:
        mean_factor = tl.load(corrections_ptr + 2 * tensor)
        root_factor = tl.load(corrections_ptr + 2 * tensor + 1)
    if first + BLOCK <= size:  # without a mask loads are wide
        _update(
            row_ptr, first, None, scale, mean_factor, root_factor, lr, rate1, rate2, eps, weight_decay,
            GRADIENT, HALF, IS_ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        _update(
            row_ptr, first, first + tl.arange(0, BLOCK) < size, scale, mean_factor, root_factor,
            lr, rate1, rate2, eps, weight_decay, GRADIENT, HALF, IS_ALIGNED, BLOCK,
        )  # fmt: skip


@triton.jit
def _update(
    row_ptr, first, mask, scale, mean_factor, root_factor, lr, rate1, rate2, eps, weight_decay,
    GRADIENT: tl.constexpr, HALF: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight_ptr = _elements(row_ptr, first, _FLOAT, IS_ALIGNED, BLOCK)
    gradient_ptr = _elements(row_ptr + 1, first, GRADIENT, IS_ALIGNED, BLOCK)
    mean_ptr = _elements(row_ptr + 2, first, _FLOAT, IS_ALIGNED, BLOCK)
    square_ptr = _elements(row_ptr + 3, first, _FLOAT, IS_ALIGNED, BLOCK)
    weight = tl.load(weight_ptr, mask)
    gradient = tl.load(gradient_ptr, mask).to(tl.float32) * scale
    mean = tl.load(mean_ptr, mask)
    square = tl.load(square_ptr, mask)
    mean += rate1 * (gradient - mean)
    square += rate2 * (gradient * gradient - square)
    direction = tl.div_rn(mean * mean_factor, tl.sqrt_rn(square) * root_factor + eps)
    weight -= lr * (direction + weight_decay * weight)
    tl.store(mean_ptr, mean, mask)
    tl.store(square_ptr, square, mask)
    tl.store(weight_ptr, weight, mask)
    if HALF is not None:
        tl.store(_elements(row_ptr + 4, first, HALF, IS_ALIGNED, BLOCK), weight.to(HALF), mask)


@triton.jit
def _elements(slot_ptr, first, TYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the elements of a block of the tensor whose address lies in the table."""
    pointer = tl.load(slot_ptr).to(tl.pointer_type(TYPE))  # type: ignore[arg-type]
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + first + tl.arange(0, BLOCK)
