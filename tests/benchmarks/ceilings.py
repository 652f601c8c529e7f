"""What this machine reaches at best: a large matrix product, a device copy, and the model's own products."""

import itertools
import math
from typing import Any

import torch
from section import Context
from timing import Timer, measure, spread

SQUARE = 8192
MODEL_ROWS = 32_768  # 64 rows of 512 tokens
MODEL_PRODUCTS_KN = [(1024, 1024), (1024, 3072), (1024, 4096), (256, 256), (256, 768), (256, 1024)]
_ROTATED_BYTES = 256 * 2**20  # several times the L2 of any GPU here, so that operands come from memory
_COPY_BYTES = 4 * 2**30


def run(context: Context) -> None:
    """bf16 products in TFLOP/s, a copy in TB/s (bytes read plus bytes written)."""
    timer = Timer(context.device)
    torch.manual_seed(context.seed)
    results = context.results
    results["clock"] = timer.clock
    results["square_product"] = square_product(timer, context.is_tiny)
    results["copy"] = device_copy(timer, context.is_tiny)
    rows = 16 if context.is_tiny else MODEL_ROWS
    best = results["square_product"]["tflop_per_s"]
    results["model_products"] = []
    for k, n in MODEL_PRODUCTS_KN:
        product = _product(timer, rows, k, n, context.is_tiny)
        results["model_products"].append(product | {"pct_of_square": 100 * product["tflop_per_s"] / best})


def square_product(timer: Timer, is_tiny: bool) -> dict[str, Any]:
    """The ceiling for matrix work: an 8192x8192x8192 product of random bf16 matrices."""
    size = 256 if is_tiny else SQUARE
    return _product(timer, size, size, size, is_tiny)


def _product(timer: Timer, m: int, k: int, n: int, is_tiny: bool) -> dict[str, Any]:
    """(m, k) times (k, n) in bf16. Operands rotate over several sets, so that none stays in cache."""
    one_set_bytes = 2 * (m * k + k * n + m * n)
    num_sets = 2 if is_tiny else max(2, math.ceil(_ROTATED_BYTES / one_set_bytes))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": timer.device}
    sets = [
        (torch.randn(m, k, **options), torch.randn(k, n, **options), torch.empty(m, n, **options))
        for _ in range(num_sets)
    ]
    rotating = itertools.cycle(sets)

    def product() -> None:
        left, right, out = next(rotating)
        torch.mm(left, right, out=out)

    seconds = spread(measure(timer, product, sample_s=_sample_s(is_tiny)))
    return {
        "m_k_n": [m, k, n],
        "dtype": "bfloat16",
        "operand_sets": num_sets,
        "us": seconds["median"] * 1e6,
        "tflop_per_s": 2 * m * k * n / seconds["median"] / 1e12,
        "spread_pct": 100 * (seconds["max"] - seconds["min"]) / seconds["median"],
    }


def device_copy(timer: Timer, is_tiny: bool) -> dict[str, Any]:
    """The ceiling for memory: a copy of 4 GiB of random bytes."""
    num_bytes = 4 * 2**20 if is_tiny else _COPY_BYTES
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    seconds = spread(measure(timer, lambda: target.copy_(source), sample_s=_sample_s(is_tiny)))
    return {
        "bytes_read_plus_written": 2 * num_bytes,
        "ms": seconds["median"] * 1e3,
        "tb_per_s": 2 * num_bytes / seconds["median"] / 1e12,
    }


def _sample_s(is_tiny: bool) -> float:
    return 0.002 if is_tiny else 0.02


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    square = results["square_product"]
    lines = [
        (f"bf16 product {square['m_k_n'][0]}³", f"{square['tflop_per_s']:.3g} TFLOP/s"),
        ("device copy (read plus written)", f"{results['copy']['tb_per_s']:.3g} TB/s"),
    ]
    for product in results["model_products"]:
        m, k, n = product["m_k_n"]
        lines.append((f"product {m}×{k}×{n}", f"{product['tflop_per_s']:.3g} TFLOP/s"))
    return lines
