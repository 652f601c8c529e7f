"""AdamW on one process's share of ELECTRA-Large: updates against float64, torch's optimizers as peers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import Cost, relative_error
from timing import Work
from torch import Tensor

from model.kernels.adamw import AdamWRule
from model.kernels.dropout import Dropout

_SHARE = 355_000_000 // 8
_SHARE_PARTS = 4  # flat groups of ZeRO
_UPDATES = 3


@dataclass(frozen=True)
class AdamWCase:
    """Updates of several tensors with clipping and copies in half precision. Looks like a ``kernel_case.Case``.

    Attributes:
        device: Where the tensors lie.
        sizes: Their numbers of elements.
        bias_correction: Of the rule.
    """

    device: str
    sizes: tuple[int, ...]
    bias_correction: bool
    keep = None
    tanh_gelu = False

    @property
    def name(self) -> str:
        """Size and rule."""
        return f"{sum(self.sizes)} weights, {'with' if self.bias_correction else 'without'} bias correction"

    @property
    def forward(self) -> Cost:
        """Weights and moments read and written, gradients of bf16 read, copies written."""
        return Cost(sum(self.sizes) * (3 * 8 + 2 + 2))

    @property
    def both(self) -> Cost:
        """There is nothing to differentiate."""
        return self.forward

    @property
    def peers(self) -> tuple[str, ...]:
        """torch's optimizer, which reads gradients in fp32 and writes no copies."""
        return ("torch.optim fused", "torch.optim foreach")

    def _rule(self) -> AdamWRule:
        return AdamWRule(1e-3, (0.9, 0.999), 1e-6, 0.01, self.bias_correction)

    def _state(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        weights = [0.1 * torch.randn(size, device=self.device) for size in self.sizes]
        exp_avgs = [0.01 * torch.randn_like(weight) for weight in weights]
        exp_avg_sqs = [1e-3 * torch.rand_like(weight) for weight in weights]
        return weights, exp_avgs, exp_avg_sqs, [torch.zeros((), device=self.device) for _ in weights]

    def errors(self, function: Any, dtype: torch.dtype, _: Dropout | None) -> dict[str, float]:
        """Relative errors of what some updates change, for gradients of ``dtype``."""
        weights, means, squares, steps = self._state()
        before = [weight.double() for weight in weights]
        exact = [(w.double(), m.double(), v.double()) for w, m, v in zip(weights, means, squares, strict=True)]
        scale = torch.tensor(0.25, device=self.device)
        copies = [torch.full_like(w, torch.nan, dtype=torch.bfloat16) for w in weights]
        for number in range(1, _UPDATES + 1):
            gradients = [torch.randn_like(weight).to(dtype) for weight in weights]
            exact = [
                self._exact(*tensors, 0.25 * gradient.double(), number)
                for tensors, gradient in zip(exact, gradients, strict=True)
            ]
            function(weights, gradients, means, squares, steps, self._rule(), scale, copies)
        start, (exact_weights, exact_means, exact_squares) = torch.cat(before), map(torch.cat, zip(*exact, strict=True))
        pairs = {
            "update": (torch.cat(weights).double() - start, exact_weights - start),
            "first moments": (torch.cat(means), exact_means),
            "second moments": (torch.cat(squares), exact_squares),
        }
        errors = {name: relative_error(*pair) for name, pair in pairs.items()}
        rounding = relative_error(torch.cat(copies), exact_weights)
        errors["half copies"] = 0.0 if rounding <= 2**-8 else rounding  # bf16's bound, also where it is cut off
        return errors

    def _exact(
        self, weight: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loshchilov and Hutter, 2019, algorithm 2."""
        rule, (beta1, beta2) = self._rule(), self._rule().betas
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        corrected = (1 - beta1**number, 1 - beta2**number) if self.bias_correction else (1, 1)
        step = mean / corrected[0] / ((square / corrected[1]).sqrt() + rule.eps)
        return weight - rule.lr * (step + rule.weight_decay * weight), mean, square

    def works(self, device: str, dtype: torch.dtype, function: Any) -> tuple[Work, None]:
        """One update; gradients of ``dtype``."""
        weights, means, squares, steps = self._state()
        gradients = [torch.randn_like(weight).to(dtype) for weight in weights]
        copies = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        scale = torch.ones((), device=device)
        return lambda: function(weights, gradients, means, squares, steps, self._rule(), scale, copies), None

    def peer_works(self, device: str, dtype: torch.dtype, name: str) -> tuple[Work, None]:
        """One step of torch's optimizer."""
        del device, dtype
        weights, rule = self._state()[0], self._rule()
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        way = {name.removeprefix("torch.optim "): True}
        return torch.optim.AdamW(weights, rule.lr, rule.betas, rule.eps, rule.weight_decay, **way).step, None


def adamw(device: str, is_tiny: bool, for_times: bool) -> Iterator[AdamWCase]:
    """With and without bias correction; the latter, the released rule, is timed."""
    sizes = (100, 3, 1000) if is_tiny else (_SHARE // _SHARE_PARTS,) * _SHARE_PARTS if for_times else (1 << 20, 3, 1001)
    for bias_correction in (False,) if for_times else (False, True):
        yield AdamWCase(device, sizes, bias_correction)
