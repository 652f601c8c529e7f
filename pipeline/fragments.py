"""This process's piece of every parameter: where it lies in the tensors that the optimizer updates.

Stage 0 leaves parameters whole, and every process has all of them. Stages 1 and
2 cut a group's flattened parameters in equal parts, wherever a parameter ends;
stage 3 cuts every parameter and pads its last parts. What belongs to no fragment
is padding.

The functions take DeepSpeed's objects (0.19) from ``pipeline.engine``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.lamb import Segment
from pipeline.optimizer import part_of

PARTS = ("embeddings", "generator", "discriminator")
"""What norms are reported for. All tables are embeddings here, whichever network they belong to."""


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter.

    Attributes:
        name: Of the parameter.
        tensor: What the optimizer updates, fp32; the piece is in it.
        start: First element of the piece in it.
        numel: Its elements.
        offset: First element of the piece in the parameter.
        read_gradient: Gives the piece's gradient between backward and step: summed over processes, not
            clipped, times the loss scale; None where there is none.
    """

    name: str
    tensor: Tensor
    start: int
    numel: int
    offset: int
    read_gradient: Callable[[], Tensor | None]

    @property
    def weight(self) -> Tensor:
        """The piece's fp32 weights, flat."""
        return self.of(self.tensor)

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor shaped as the updated one, flat."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


def whole(name: str, parameter: nn.Parameter, master: Tensor) -> Fragment:
    """Stage 0: the parameter itself, or its fp32 copy."""
    return Fragment(name, master, 0, master.numel(), 0, lambda: parameter.grad)


def in_flat_group(name: str, parameter: Any, groups: list[dict[str, Any]]) -> Fragment | None:
    """Stages 1 and 2; None where other processes have all of the parameter."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None

    def read_gradient() -> Tensor:
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if gradient.numel() > mapping.lp_fragment_address.numel:  # bf16 under stage 1 keeps all of it
            gradient = gradient.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        return gradient

    address = mapping.hp_fragment_address
    (tensor,) = groups[mapping.param_group_index]["params"]
    return Fragment(name, tensor, address.start, address.numel, mapping.lp_fragment_address.start, read_gradient)


def in_sub_group(name: str, parameter: Any, optimizer: Any, rank: int) -> Fragment | None:
    """Stage 3, by DeepSpeed's own optimizer; None where this process has padding alone.

    The padding of the weights is left out: it is memory that nobody has set.
    """
    number, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    numel = min(size, parameter.ds_numel - rank * size)
    if numel <= 0:
        return None
    tensor = optimizer.fp32_partitioned_groups_flat[number]
    return Fragment(
        name, tensor, start, numel, rank * size,
        lambda: optimizer.get_local_fp32_grad_for_param(parameter).view(-1)[:numel],
    )  # fmt: skip


def segments(
    fragments: Iterable[Fragment], names: Iterable[str], tensors: Iterable[Tensor]
) -> dict[Tensor, list[Segment]]:
    """The fragments as LAMB wants them: by updated tensor, parameters as numbers.

    Args:
        fragments: Of this process.
        names: All parameters, in an order that is the same on all processes.
        tensors: All that this process updates, those of padding alone included.
    """
    numbers = {name: number for number, name in enumerate(names)}
    table: dict[Tensor, list[Segment]] = {tensor: [] for tensor in tensors}
    for fragment in fragments:
        table[fragment.tensor].append(Segment(numbers[fragment.name], fragment.start, fragment.numel))
    return table


@torch.no_grad()
def measure_norms(
    fragments: list[Fragment],
    names: Iterable[str],
    loss_scale: float,
    sum_over_processes: Callable[[Tensor], Any] | None,
) -> dict[str, float]:
    """L2 norms of gradients and fp32 weights for each of ``PARTS`` that the model has; a collective.

    Args:
        fragments: Of this process.
        names: All parameters.
        loss_scale: What the gradients are divided by.
        sum_over_processes: Sums a tensor in place; None where every process holds all.

    Returns:
        ``train/grad_norm_<part>`` and ``train/parameter_norm_<part>``; inf where a gradient is not finite.
    """
    device = fragments[0].tensor.device if fragments else torch.device("cpu")
    squares = torch.zeros(2, len(PARTS), dtype=torch.float64, device=device)
    for number, part in enumerate(PARTS):
        mine = [fragment for fragment in fragments if _part(fragment.name) == part]
        gradients = [g.float() for fragment in mine if (g := fragment.read_gradient()) is not None]
        for row, tensors in enumerate((gradients, [fragment.weight for fragment in mine])):
            if tensors:
                squares[row, number] = torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    squares[0] /= loss_scale**2
    if sum_over_processes:
        sum_over_processes(squares)
    gradient_norms, weight_norms = squares.sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()
    present = {_part(name) for name in names}
    norms = {}
    for part, gradient_norm, weight_norm in zip(PARTS, gradient_norms, weight_norms, strict=True):
        if part in present:
            norms |= {f"train/grad_norm_{part}": gradient_norm, f"train/parameter_norm_{part}": weight_norm}
    return norms


def _part(name: str) -> str:
    if name.startswith(("embeddings.", "generator_embeddings.")):
        return "embeddings"
    return part_of(name)
