"""Peak rate and memory of the device, for MFU and reports."""

import time

import torch

# Dense bf16, FLOP/s, from NVIDIA's datasheets.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "V100": 125e12}


def peak_flops(device: str, threads: int) -> tuple[float, str]:
    """The rate that MFU refers to, in FLOP/s, and where it comes from.

    A known GPU's datasheet value; else the best of a few matrix products timed here.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for known, rate in _PEAK_BF16.items():
            if known in name:
                return rate, f"{name}, dense bf16 by its datasheet"
    size = 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best_s = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        float((a @ b)[0, 0])  # reading a value waits for the device
        best_s = min(best_s, time.perf_counter() - begin)
    return 2 * size**3 / best_s, f"{threads} threads, fp32 product of {size}x{size} matrices timed now"


def peak_memory_gib(device: str) -> float:
    """Highest memory use so far: of the GPU's allocator, or this process's resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
