"""Which backend runs each operation, and why."""

from dataclasses import dataclass

from model.kernels.attention import ATTENTION, Attention


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every operation.

    Attributes:
        attention: See ``model.kernels.attention``.
        names: Operation to backend; stored with a run and kept when it resumes.
        reason: One sentence for the log.
    """

    attention: Attention
    names: dict[str, str]
    reason: str


def select_kernels(backend: str) -> Kernels:
    """Resolves ``kernels.backend``: ``auto``, ``reference`` or ``torch``."""
    chosen = "torch" if backend == "auto" else backend
    reason = "auto takes torch's own fused attention" if backend == "auto" else f"kernels.backend={backend}"
    return Kernels(attention=ATTENTION[chosen], names={"attention": chosen}, reason=reason)
