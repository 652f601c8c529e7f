"""A backend against the reference on a small input, forward and backward, before a run relies on it.

Finds what compiles to something else on this GPU or not at all. A write out of bounds still ends the process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.adamw import AdamWRule, reference_adamw
from model.kernels.attention import Packing, reference_attention
from model.kernels.detection import reference_detect
from model.kernels.dropout import Dropout
from model.kernels.embedding import reference_embed
from model.kernels.gelu import reference_bias_gelu
from model.kernels.layer_norm import reference_add_norm
from model.kernels.vocabulary import Sampling, reference_predict

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the reference's largest value
_MOST_OTHER_SAMPLES = 0.1  # a logit that rounds otherwise may move a draw to a neighbouring token
_EPS = 1e-6

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Draw:
    """Inputs on a device, the same each time, without torch's own generator.

    Attributes:
        head_size: Of attention.
        approximate_gelu: Whether GELU has the tanh form.
    """

    generator: torch.Generator
    device: str
    dtype: torch.dtype
    head_size: int
    approximate_gelu: bool

    @property
    def rows(self) -> int:
        """More than any GPU's programs have at once, so that they go on to a second part."""
        return 1 << 16 if self.device == "cuda" else 300

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        """From 0 to ``end`` - 1, int64."""
        return torch.randint(end, shape, generator=self.generator).to(self.device)

    def dropout(self) -> Dropout:
        """An eighth."""
        return Dropout(0.125, torch.tensor(12345, device=self.device))


def deviation(
    operation: str, function: Operation, device: str, dtype: torch.dtype, approximate_gelu: bool, head_size: int = 64
) -> str | None:
    """How a backend's outputs and gradients differ from the reference's, or what it raises; None where they agree.

    Args:
        operation: As in ``model.kernels.select``.
        function: The backend's.
        device: ``cpu`` or ``cuda``.
        dtype: Of activations and weights.
        approximate_gelu: Whether to ask for the tanh form of GELU.
        head_size: Columns of one attention head.
    """
    check, reference = _CHECKS[operation]

    def run(function: Operation) -> dict[str, Tensor]:
        draw = Draw(torch.Generator().manual_seed(1), device, dtype, head_size, approximate_gelu)
        with torch.enable_grad(), _any_algorithm():
            return check(function, draw)

    expected = run(reference)
    try:
        found = run(function)
        return next(filter(None, (_difference(name, found[name], expected[name], dtype) for name in expected)), None)
    except Exception as error:  # whatever a compiler or a driver brings about
        return f"raises {type(error).__name__}: {(str(error).splitlines() or ['nothing said'])[0]}"


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """The reference may sum in any order, also where ``train.deterministic`` lets torch refuse that."""
    is_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not is_on:  # setting it imports torch's compiler
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def _difference(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{name}: {found.dtype} {tuple(found.shape)} and not {expected.dtype} {tuple(expected.shape)}"
    if not expected.is_floating_point():
        others = float((found != expected).double().mean())
        return f"{name}: {100 * others:.0f} % are others" if others > _MOST_OTHER_SAMPLES else None
    found, expected = found.detach().double(), expected.detach().double()
    off = float((found - expected).abs().max() / expected.abs().max())
    return None if off <= _TOLERANCE[dtype] else f"{name}: off by {off:.1e} of the largest value in {dtype}"


def _with_gradients(function: Operation, leaves: list[Tensor]) -> dict[str, Tensor]:
    """The output of a function of one tensor, or the outputs by name, and the gradient of each leaf."""
    out = function(*(leaf.requires_grad_() for leaf in leaves))
    outputs = {"output": out} if isinstance(out, Tensor) else {k: v for k, v in vars(out).items() if v is not None}
    loss = next(iter(outputs.values()))
    # Small enough for fp16, which ends at 65,504: a bias's gradient is their sum over all rows. Their mean is not 0.
    weights = torch.linspace(-0.25, 0.5, max(loss.numel(), 2), device=loss.device)[-loss.numel() :].view(loss.shape)
    gradients = torch.autograd.grad(loss, leaves, weights.to(loss.dtype))
    return outputs | {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}


def _attention(function: Operation, draw: Draw) -> dict[str, Tensor]:
    """A piece longer than a block, so that whole blocks need no mask."""
    length = 320 if draw.device == "cuda" else 80  # an interpreter's blocks are smaller, and it is slow
    pieces_BT = (torch.arange(length, device=draw.device) >= 19).long().expand(2, -1).contiguous()
    leaves = [draw.normal(2, length, 3, 2, draw.head_size)]
    return _with_gradients(lambda qkv: function(qkv, Packing(pieces_BT), draw.dropout()), leaves)


def _add_norm(function: Operation, draw: Draw) -> dict[str, Tensor]:
    leaves = [draw.normal(draw.rows, 72), draw.normal(draw.rows, 72), draw.normal(72), draw.normal(72)]
    return _with_gradients(lambda *x: function(*x, _EPS, draw.dropout()), leaves)


def _bias_gelu(function: Operation, draw: Draw) -> dict[str, Tensor]:
    leaves = [draw.normal(draw.rows, 72), draw.normal(72)]
    return _with_gradients(lambda x, bias_F: function(x, bias_F, draw.approximate_gelu), leaves)


def _embed(function: Operation, draw: Draw) -> dict[str, Tensor]:
    """The small tables have ids that occur more often than a chunk is long."""
    leaves = [draw.normal(size, 40) for size in (30, 9, 2)]
    indices = [draw.integers(len(table), 2, 150) for table in leaves]
    leaves += [draw.normal(40), draw.normal(40)]
    return _with_gradients(lambda *x: function(x[:3], indices, *x[3:], _EPS, draw.dropout()), leaves)


def _predict(function: Operation, draw: Draw) -> dict[str, Tensor]:
    """A vocabulary of more than a tile, and positions of more than a block."""
    original_N, weights_N = draw.integers(4200, 140), draw.normal(140, dtype=torch.float32).abs()
    uniform_N = torch.rand(140, generator=draw.generator, dtype=torch.float64).to(draw.device)
    leaves = [draw.normal(140, 24), draw.normal(4200, 24), draw.normal(4200)]
    return _with_gradients(lambda *x: function(*x, original_N, weights_N, Sampling(uniform_N)), leaves)


def _detect(function: Operation, draw: Draw) -> dict[str, Tensor]:
    shape = 3, draw.rows
    is_replaced_BT, weights_BT = draw.integers(2, *shape).bool(), draw.normal(*shape, dtype=torch.float32).abs()
    return _with_gradients(lambda logits_BT: function(logits_BT, is_replaced_BT, weights_BT), [draw.normal(*shape)])


def _adamw(function: Operation, draw: Draw) -> dict[str, Tensor]:
    weights, means, squares = ([draw.normal(n, dtype=torch.float32) for n in (7, 1025)] for _ in range(3))
    squares = [square.square() for square in squares]
    steps = [torch.tensor(3.0, device=draw.device) for _ in weights]
    rule = AdamWRule(0.05, (0.9, 0.999), _EPS, 0.01, True)
    function(weights, [draw.normal(7), draw.normal(1025)], means, squares, steps, rule, None, None)
    return {"weight": torch.cat(weights), "first moment": torch.cat(means), "second moment": torch.cat(squares)}


_CHECKS: dict[str, tuple[Callable[[Operation, Draw], dict[str, Tensor]], Operation]] = {
    "attention": (_attention, reference_attention),
    "add_norm": (_add_norm, reference_add_norm),
    "bias_gelu": (_bias_gelu, reference_bias_gelu),
    "embed": (_embed, reference_embed),
    "predict": (_predict, reference_predict),
    "detect": (_detect, reference_detect),
    "adamw": (_adamw, reference_adamw),
}
