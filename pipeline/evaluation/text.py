"""Classification, pairs and regression: a linear layer on [CLS]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.tokenizer import Tokenizer
from model.config import ModelConfig
from model.finetuning import Examples, LinearHead
from pipeline.evaluation.features import Feature, cut_pair, encode_texts, join_segments
from pipeline.evaluation.processors import Outcome, write_lines
from pipeline.evaluation.recipes import Recipe
from pipeline.evaluation.scores import score
from pipeline.evaluation.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class TextFeature(Feature):
    """``target`` is the number of a class, or a score scaled to 0..1."""

    target: float


class TextProcessor:
    """See ``pipeline.evaluation.processors.Processor``."""

    reads_first = True

    def __init__(self, task: Task, recipe: Recipe, tokenizer: Tokenizer):
        self._task, self._recipe, self._tokenizer = task, recipe, tokenizer
        self._classes = task.classes()
        self._number = {name: number for number, name in enumerate(self._classes or ())}
        self._lowest, self._highest = task.config.label_range or self._range_of_train()

    def _range_of_train(self) -> tuple[float, float]:
        """Adam moves the head by about its learning rate a step: labels of any size have to come near 0 to 1."""
        if self._classes is not None:
            return 0.0, 1.0
        labels = [float(example.label) for example in self._task.examples("train")]
        lowest, highest = min(labels), max(labels)
        return lowest, highest if highest > lowest else lowest + 1.0

    def head(self, model: ModelConfig) -> LinearHead:
        """Dropout and a linear layer."""
        return LinearHead(model, len(self._classes) if self._classes else 1, model.dropout)

    def features(self, split: str) -> list[TextFeature]:
        """One feature for each example; two in training for a pair whose order means nothing."""
        examples = self._task.examples(split)
        features = self._encode(examples, [example.texts for example in examples])
        if split == "train" and self._recipe.both_orders:
            features += self._encode(examples, [example.texts[::-1] for example in examples])
        return features

    def _encode(self, examples: list[Example], texts: list[tuple[str, ...]]) -> list[TextFeature]:
        columns = [encode_texts(column, self._tokenizer) for column in zip(*texts, strict=True)]
        features = []
        for number, (example, ids) in enumerate(zip(examples, zip(*columns, strict=True), strict=True)):
            room = self._recipe.max_length - 1 - len(ids)
            if len(ids) == 1:
                joined = join_segments(self._tokenizer, ids[0][:room])
            else:
                num_first, num_second = cut_pair(len(ids[0]), len(ids[1]), room)
                joined = join_segments(self._tokenizer, ids[0][:num_first], ids[1][:num_second])
            features.append(TextFeature(*joined, number, self._target(example.label)))
        return features

    def _target(self, label: str | float | None) -> float:
        if label is None:  # of a test file
            return 0.0
        if self._classes:
            return float(self._number[str(label)])
        return (float(label) - self._lowest) / (self._highest - self._lowest)

    def loss(self, head: LinearHead, hidden_PH: Tensor, examples: Examples, features: Sequence[TextFeature]) -> Tensor:
        """Cross-entropy, or squared error of the scaled score; summed over features."""
        del examples
        outputs_PC = head(hidden_PH)
        targets_P = torch.tensor([feature.target for feature in features], device=hidden_PH.device)
        if self._classes is None:
            return F.mse_loss(outputs_PC.squeeze(1), targets_P, reduction="sum")
        return F.cross_entropy(outputs_PC, targets_P.long(), reduction="sum")

    def outputs(
        self, head: LinearHead, hidden_PH: Tensor, examples: Examples, features: Sequence[TextFeature]
    ) -> list[str | float]:
        """A class or a score for each feature."""
        del examples
        outputs_PC = head(hidden_PH)
        if self._classes is None:
            scale = self._highest - self._lowest
            return [self._lowest + scale * value for value in outputs_PC.squeeze(1).tolist()]
        return [self._classes[number] for number in outputs_PC.argmax(1).tolist()]

    def outcome(self, split: str, features: Sequence[TextFeature], outputs: list[Any]) -> Outcome:
        """Metrics of a labelled split, and what is written of any."""
        del features
        examples = self._task.examples(split)
        rows = [
            {"id": example.id, "label": example.label, "prediction": prediction}
            for example, prediction in zip(examples, outputs, strict=True)
        ]
        labels = [example.label for example in examples]
        metrics = {}
        if None not in labels:
            positive = self._task.config.positive or (self._classes[-1] if self._classes else None)
            metrics = {name: score(name, labels, outputs, positive) for name in self._task.config.metrics}
        return Outcome(metrics, outputs, {"predictions.jsonl": write_lines(rows)})
