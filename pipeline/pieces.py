"""Weights and moments on the first process, from the pieces that ZeRO has left on each.

    own fragments, as they lie ───────────▶ pieces ──▶ Snapshot
    others' fragments ──send──▶ buffers ──▶

Each number travels once, and only to where it is saved. ``Engine.full_state``
says the same in another way: whole tensors, on every process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.fragments import Fragment

_CHUNK_NUMBERS = 16 << 20  # fp32, 64 MiB, unless one piece is larger


class Piece(NamedTuple):
    """A part of one tensor of the state.

    Attributes:
        kind: ``weight``, or a moment.
        name: Of the parameter.
        offset: First element of the piece in the parameter.
        values: The piece, fp32, flat.
    """

    kind: str
    name: str
    offset: int
    values: Tensor


class _Span(NamedTuple):
    """Which part of a parameter a fragment is."""

    name: str
    offset: int
    numel: int


class Pieces:
    """Who has what of the state."""

    def __init__(
        self, fragments: list[Fragment], read: Callable[[Fragment, str], Tensor], shapes: dict[str, list[int]],
        are_spread: bool, is_beside: bool,
    ):  # fmt: skip
        """Tells the first process what each has; a collective.

        Args:
            fragments: Of this process.
            read: A fragment's values of a kind, fp32 and flat; those in use.
            shapes: Of every parameter, whole.
            are_spread: False where every process has everything.
            is_beside: Whether a thread shall gather beside the steps, over a group of its own.
        """
        self._fragments, self._read = fragments, read
        self._rank = dist.get_rank()
        self._group: Any = None
        mine = [_Span(fragment.name, fragment.offset, fragment.numel) for fragment in fragments]
        self._spans = [mine]
        if are_spread and dist.get_world_size() > 1:
            self._spans = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(self._spans, mine)
            if is_beside:
                self._group = dist.new_group()
        self._check({name: math.prod(shape) for name, shape in shapes.items()})

    def gather(self, kinds: Sequence[str]) -> Iterator[Piece]:
        """Yields every piece of the state on the first process, none on the others; a collective.

        Own pieces are those in use. On CPUs any one thread of each process may iterate.
        """
        if self._rank == 0:
            for fragment in self._fragments:
                for kind in kinds:
                    yield Piece(kind, fragment.name, fragment.offset, self._read(fragment, kind))
        for rank, spans in enumerate(self._spans[1:], start=1):
            for kind in kinds:
                for chunk in _chunks(spans):
                    if self._rank == 0:
                        yield from self._receive(rank, kind, spans[chunk])
                    elif self._rank == rank:
                        self._send(kind, self._fragments[chunk])

    def _check(self, sizes: dict[str, int]) -> None:
        """Every element of every parameter is in one piece."""
        ends = dict.fromkeys(sizes, 0)
        for span in sorted(chain.from_iterable(self._spans), key=lambda span: span.offset):
            assert span.offset == ends[span.name], f"{span.name}: element {ends[span.name]} is in no piece, or in two"
            ends[span.name] += span.numel
        assert ends == sizes, f"no piece has the end of {[name for name in sizes if ends[name] != sizes[name]]}"

    def _send(self, kind: str, fragments: list[Fragment]) -> None:
        pieces = [self._read(fragment, kind) for fragment in fragments]
        is_on_host = pieces[0].device.type == "cpu"  # where torch would take the step's threads
        values = torch.from_numpy(np.concatenate([p.numpy() for p in pieces])) if is_on_host else torch.cat(pieces)
        self._exchange(dist.isend, values, 0)

    def _receive(self, rank: int, kind: str, spans: list[_Span]) -> Iterator[Piece]:
        sizes = [span.numel for span in spans]
        buffer = torch.empty(sum(sizes), device=self._fragments[0].tensor.device)
        self._exchange(dist.irecv, buffer, rank)
        for span, values in zip(spans, buffer.split(sizes), strict=True):
            yield Piece(kind, span.name, span.offset, values)

    def _exchange(self, how: Callable[..., Any], values: Tensor, peer: int) -> None:
        """As a batch of one, for which NCCL needs no communicator beside the group's."""
        for work in dist.batch_isend_irecv([dist.P2POp(how, values, peer, self._group)]):
            work.wait()


def _chunks(spans: list[_Span]) -> Iterator[slice]:
    """Consecutive spans that travel together."""
    first, numbers = 0, 0
    for place, span in enumerate(spans):
        if numbers and numbers + span.numel > _CHUNK_NUMBERS:
            yield slice(first, place)
            first, numbers = place, 0
        numbers += span.numel
    if numbers:
        yield slice(first, len(spans))
