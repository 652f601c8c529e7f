"""The generator's output layer: cases, formulas in float64, eager torch and its fused linear cross-entropy as peers.

Shapes: N positions, E width of the table, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from kernel_case import Case, Cost, Peer, Tensors
from torch import Tensor

from model.kernels.dropout import Dropout
from model.kernels.vocabulary import Sampling

_SCALE = 0.03  # of the table: logits of a head at 1024 columns have a deviation of about 1


def predict(device: str, is_tiny: bool, for_times: bool) -> Iterator[Case]:
    """Masked positions of 64 and of 128 rows of 512 tokens."""
    if is_tiny:
        yield _case(device, 24, 32, 150)
        return
    for number in (8192, 16384) if for_times else (1024,):
        yield _case(device, number, 1024, 30522)


def _case(device: str, number: int, width: int, vocab_size: int) -> Case:
    original_N = torch.randint(vocab_size, (number,), device=device)
    weights_N = (torch.rand(number, device=device) < 0.95).float() / number
    sampling = Sampling(torch.rand(number, dtype=torch.float64, device=device))

    def make(dtype: torch.dtype) -> Tensors:
        options: dict[str, Any] = {"device": device, "dtype": torch.float64}
        return {
            "hidden": torch.randn(number, width, **options).to(dtype),
            "table": (_SCALE * torch.randn(vocab_size, width, **options)).to(dtype),
            "bias": torch.randn(vocab_size, **options).to(dtype),
        }

    def run(function: Any, leaves: Tensors, _: Dropout | None) -> Tensors:
        found = function(*leaves.values(), original_N, weights_N, sampling)
        return {"output": found.loss, "loss of each": found.nll_N, "sampled": found.sampled_N}

    def exact(leaves: Tensors, _: Dropout | None) -> Tensors:
        logits_NV = F.linear(*leaves.values())
        nll_N = F.cross_entropy(logits_NV, original_N, reduction="none")
        cumulated_NV = logits_NV.detach().softmax(-1).cumsum(-1)
        loss = (nll_N * weights_N).sum()
        return {"output": loss, "loss of each": nll_N.detach(), "cumulated": cumulated_NV}

    def compare(found: Tensors, expected: Tensors) -> dict[str, float]:
        """How far a position's draw lies outside of the probabilities of the token that it gave."""
        sampled_N1, cumulated_NV = found.pop("sampled")[:, None], expected.pop("cumulated")
        high_N = cumulated_NV.gather(1, sampled_N1).squeeze(1)
        low_N = F.pad(cumulated_NV, (1, 0)).gather(1, sampled_N1).squeeze(1)
        outside_N = (low_N - sampling.uniform_N).clamp_min(0) + (sampling.uniform_N - high_N).clamp_min(0)
        return {"sampled": float(outside_N.max())}

    product = 2.0 * number * width * vocab_size
    num_bytes = 2 * (number * width + vocab_size * width)
    return Case(
        f"{number}×{width}×{vocab_size}", make, run, exact, _peers(original_N, weights_N),
        Cost(num_bytes, product), Cost(2 * num_bytes, 3 * product), compare=compare,
    )  # fmt: skip


def _peers(original_N: Tensor, weights_N: Tensor) -> dict[str, Peer]:
    def sampled(logits_NV: Tensor) -> None:
        noise_NV = torch.empty_like(logits_NV).exponential_().log()
        torch.argmax(logits_NV - noise_NV, -1)  # the Gumbel-max trick

    def eager(leaves: Tensors) -> Tensor:
        logits_NV = F.linear(*leaves.values()).float()
        with torch.no_grad():
            sampled(logits_NV)
        return (F.cross_entropy(logits_NV, original_N, reduction="none") * weights_N).sum()

    def linear_cross_entropy(leaves: Tensors) -> Tensor:
        """Samples from logits of its own: the fused operation shows none."""
        hidden_NE, table_VE, bias_V = leaves.values()
        with torch.no_grad():
            sampled(F.linear(hidden_NE, table_VE, bias_V).float())
        nll_N = getattr(F, "linear_cross_entropy")(  # noqa: B009
            hidden_NE, table_VE, original_N, linear_bias=bias_V, reduction="none"
        )
        return (nll_N * weights_N).sum()

    fused: dict[str, Peer] = {"F.linear_cross_entropy": linear_cross_entropy}
    return {"eager": eager} | (fused if hasattr(F, "linear_cross_entropy") else {})
