"""What the sections on kernels ask of an operation: inputs, float64 formulas of its own, peers, the work it must do."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Work
from torch import Tensor

from model.kernels.dropout import Dropout

DROPOUT = 0.1
MAX_DEVIATION = 6.0  # standard deviations: one false alarm in half a billion
_ROTATED_BYTES = 256 * 2**20  # several times the L2 of any GPU here, so that inputs come from memory

Tensors = dict[str, Tensor]
Run = Callable[[Any, Tensors, Dropout | None], Tensors]
Exact = Callable[[Tensors, Dropout | None], Tensors]
Peer = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Cost:
    """The least that any implementation must do.

    Attributes:
        num_bytes: Each input read once, each output written once.
        flops: Of the matrix products.
    """

    num_bytes: float = 0.0
    flops: float = 0.0

    def floor_s(self, bytes_per_s: float, flop_per_s: float) -> float:
        """Seconds that the slower of the two takes."""
        return max(self.num_bytes / bytes_per_s, self.flops / flop_per_s)


@dataclass(frozen=True)
class Case:
    """One operation on inputs of one size.

    Attributes:
        name: Beside the operation's.
        make: Fresh random inputs that get gradients, values rounded to a dtype.
        run: A backend on them; ``output`` is what is differentiated, all others are compared only.
        exact: The same outputs by formulas in float64.
        peers: Others on the same inputs, as their users call them.
        forward: Least work without gradients.
        both: Least work with them.
        keep: Which elements a dropout keeps, by its definition; None where nothing is dropped.
        kept: Which elements a backend kept in its forward pass, and in its backward pass where that shows; the errors
            with dropout hold the rest.
        draws_otherwise: Backends whose dropout draws from torch's generator instead of by key.
        compare: Errors of outputs that are no numbers to subtract, which it takes away; None where there are none.
        tanh_gelu: Whether it is GELU's tanh form, the only one that some backends have.
    """

    name: str
    make: Callable[[torch.dtype], Tensors]
    run: Run
    exact: Exact
    peers: dict[str, Peer] = field(default_factory=dict)
    forward: Cost = Cost()
    both: Cost = Cost()
    keep: Callable[[Dropout], Tensor] | None = None
    kept: Callable[[Any, Dropout], tuple[Tensor, Tensor | None]] | None = None
    draws_otherwise: frozenset[str] = frozenset()
    compare: Callable[[Tensors, Tensors], dict[str, float]] | None = None
    tanh_gelu: bool = False

    def errors(self, function: Any, dtype: torch.dtype, dropout: Dropout | None) -> dict[str, float]:
        """Relative errors of outputs and gradients, on inputs drawn anew."""
        leaves = {name: leaf.requires_grad_() for name, leaf in self.make(dtype).items()}
        exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        found, expected = self.run(function, leaves, dropout), self.exact(exact_leaves, dropout)
        gradient = random_gradient(found["output"])
        found |= _gradients(found["output"], leaves, gradient)
        expected |= _gradients(expected["output"], exact_leaves, gradient.double())
        errors = self.compare(found, expected) if self.compare else {}
        return errors | {name: relative_error(found[name], expected[name]) for name in expected}

    def works(self, device: str, dtype: torch.dtype, function: Any) -> tuple[Work, Work]:
        """Calls without and with gradients, with dropout where the operation has it; inputs rotate."""
        dropout = random_dropout(device) if self.keep else None
        return self.calls(device, dtype, lambda leaves: self.run(function, leaves, dropout)["output"])

    def peer_works(self, device: str, dtype: torch.dtype, name: str) -> tuple[Work, Work]:
        """The same of a peer."""
        return self.calls(device, dtype, self.peers[name])

    def calls(self, device: str, dtype: torch.dtype, call: Peer) -> tuple[Work, Work]:
        """The same of any function of the inputs."""
        first = self.make(dtype)
        num_bytes = sum(leaf.numel() * leaf.element_size() for leaf in first.values())
        number = min(8, math.ceil(_ROTATED_BYTES / num_bytes)) if device == "cuda" else 1
        inputs = [first, *(self.make(dtype) for _ in range(number - 1))]
        rotating = itertools.cycle([{k: v.requires_grad_() for k, v in leaves.items()} for leaves in inputs])
        gradient = random_gradient(call(inputs[0]))

        def forward() -> None:
            with torch.no_grad():
                call(next(rotating))

        def both() -> None:
            leaves = next(rotating)
            torch.autograd.grad(call(leaves), list(leaves.values()), gradient)

        return forward, both


def _gradients(output: Tensor, leaves: Tensors, gradient: Tensor) -> Tensors:
    found = torch.autograd.grad(output, list(leaves.values()), gradient)
    return {f"gradient of {name}": value for name, value in zip(leaves, found, strict=True)}


def random_gradient(output: Tensor) -> Tensor:
    """Of either sign; of a loss a factor that keeps gradients of means above fp16's least number."""
    return torch.randn_like(output) if output.ndim else 2**14 * (1 + torch.rand_like(output))


def random_dropout(device: str) -> Dropout:
    """Dropout 0.1 by a fresh key."""
    return Dropout(DROPOUT, torch.randint(2**32, (), device=device))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64."""
    out, reference = out.detach(), reference.detach().double()
    return float((out.double() - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def dropout_record(case: Case, function: Any, backend: str, device: str) -> dict[str, Any]:
    """Whether a backend drops what the key says, as often as asked for, and the same in its backward pass."""
    assert case.keep and case.kept
    dropout = random_dropout(device)
    forward, backward = case.kept(function, dropout)
    share, kept = 1 - dropout.threshold / 65536, forward.double()
    deviation = float((kept.mean() - share).abs()) / math.sqrt(share * (1 - share) / kept.numel())
    found = {
        "dropout": DROPOUT,
        "kept_share": float(kept.mean()),
        "kept_share_deviations": deviation,
        "largest_correlation_deviations": _largest_correlation(kept),
        "backward_equals_forward": None if backward is None else torch.equal(forward, backward),
        "equals_definition": torch.equal(forward, case.keep(dropout)),
        "draws_by_key": backend not in case.draws_otherwise,
    }
    return found | {"problems": _dropout_problems(found)}


def _largest_correlation(kept: Tensor) -> float:
    """Greatest correlation of the mask with itself shifted, in standard deviations of independent draws."""
    centred = (kept - kept.mean()) / kept.std()
    largest = 0.0
    for dim in range(centred.ndim):
        for shift in (1, 2, 3, 4, 8, 16, 32):
            if shift < centred.shape[dim]:
                length = centred.shape[dim] - shift
                product = centred.narrow(dim, 0, length) * centred.narrow(dim, shift, length)
                largest = max(largest, abs(float(product.mean())) * math.sqrt(product.numel()))
    return largest


def _dropout_problems(found: dict[str, Any]) -> list[str]:
    problems = []
    if not found["kept_share_deviations"] <= MAX_DEVIATION:
        problems.append(f"dropout keeps {found['kept_share']:.4f} instead of {1 - DROPOUT}")
    if not found["largest_correlation_deviations"] <= MAX_DEVIATION:
        problems.append("dropped positions are correlated")
    if found["backward_equals_forward"] is False:
        problems.append("the backward pass drops other positions than the forward pass")
    if found["draws_by_key"] and not found["equals_definition"]:
        problems.append("the mask is not the key's")
    return problems
