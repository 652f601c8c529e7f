"""What fine-tuning asks of every kind of task."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from model.config import ModelConfig
from model.finetuning import Examples
from pipeline.evaluation.features import Feature


@dataclass(frozen=True)
class Outcome:
    """What became of a split.

    Attributes:
        metrics: By name, as fractions of 1; empty for a split without labels.
        answers: One for each example, in the split's order, or by question id.
        files: Content of the files to write, by name.
    """

    metrics: dict[str, float]
    answers: Any
    files: dict[str, str]


class Processor(Protocol):
    """Turns a task's examples into features, and what the network says of them into predictions.

    Attributes:
        reads_first: Whether the head reads [CLS] alone, so that it gets ``(P, H)`` in place of ``(T, H)``.
    """

    reads_first: bool

    def head(self, model: ModelConfig) -> nn.Module:
        """A new head, from torch's generator."""
        ...

    def features(self, split: str) -> Sequence[Feature]:
        """Features of ``train``, of a labelled part, or of a test file, in its order."""
        ...

    def loss(self, head: Any, hidden: Tensor, examples: Examples, features: Any, /) -> Tensor:
        """The loss of some features, summed, a scalar."""
        ...

    def outputs(self, head: Any, hidden: Tensor, examples: Examples, features: Any, /) -> list[Any]:
        """What ``outcome`` needs of each feature."""
        ...

    def outcome(self, split: str, features: Any, outputs: list[Any]) -> Outcome:
        """Predictions and metrics, from the outputs of all features of a split."""
        ...


def write_lines(rows: Iterable[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
