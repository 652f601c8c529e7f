"""Sequence tagging: a linear layer on the first token of each word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.tokenizer import Tokenizer
from model.config import ModelConfig
from model.finetuning import Examples, LinearHead
from pipeline.evaluation.features import Feature, encode_texts, join_segments
from pipeline.evaluation.processors import Outcome, write_lines
from pipeline.evaluation.recipes import Recipe
from pipeline.evaluation.scores import score, to_bio, to_bioes
from pipeline.evaluation.tasks import TaggedSentence, Task

_ALL_SEGMENT_B = 0  # tokens of segment A: the released code has token type 1 throughout
_NO_TARGET = -1  # of a tag that training does not have, and of test files


@dataclass(frozen=True, slots=True)
class TagFeature(Feature):
    """Some words of a sentence.

    Attributes:
        first_word: Number of the first of them in the sentence.
        word_starts: Place of each word's first token.
        targets: Number of each word's tag.
    """

    first_word: int
    word_starts: np.ndarray
    targets: np.ndarray


class TaggingProcessor:
    """See ``pipeline.evaluation.processors.Processor``."""

    reads_first = False

    def __init__(self, task: Task, recipe: Recipe, tokenizer: Tokenizer):
        self._task, self._recipe, self._tokenizer = task, recipe, tokenizer
        self._converts = task.config.tag_scheme == "bioes"
        tags = {tag for sentence in task.examples("train") for tag in self._as_trained(sentence.tags)}
        self._tags = sorted(tags)
        self._number = {tag: number for number, tag in enumerate(self._tags)}

    def _as_trained(self, tags: Sequence[str]) -> Sequence[str]:
        return to_bioes(list(tags)) if self._converts else tags

    def head(self, model: ModelConfig) -> LinearHead:
        """A linear layer."""
        return LinearHead(model, len(self._tags), dropout=0.0)

    def features(self, split: str) -> list[TagFeature]:
        """One feature for each sentence; more for one that is longer than ``max_length``."""
        sentences = self._task.examples(split)
        ids = iter(encode_texts([word for sentence in sentences for word in sentence.words], self._tokenizer))
        return [
            feature
            for number, sentence in enumerate(sentences)
            for feature in self._encode(number, sentence, [next(ids) for _ in sentence.words])
        ]

    def _encode(self, number: int, sentence: TaggedSentence, ids: list[np.ndarray]) -> Iterator[TagFeature]:
        room = self._recipe.max_length - 2
        unknown = np.array([self._tokenizer.special.unk])  # some words are nothing to a tokenizer
        words = [word[:room] if len(word) else unknown for word in ids]
        tags = self._as_trained(sentence.tags) if sentence.tags is not None else [None] * len(words)
        targets = np.array([self._number.get(tag, _NO_TARGET) if tag is not None else _NO_TARGET for tag in tags])
        for first, last in _windows([len(word) for word in words], room):
            chosen = words[first:last]
            starts = 1 + np.cumsum([0, *(len(word) for word in chosen[:-1])])
            token_ids, _ = join_segments(self._tokenizer, np.concatenate(chosen))
            yield TagFeature(token_ids, _ALL_SEGMENT_B, number, first, starts, targets[first:last])

    def loss(self, head: LinearHead, hidden_TH: Tensor, examples: Examples, features: Sequence[TagFeature]) -> Tensor:
        """Cross-entropy summed over the words of all features, as released."""
        targets_N = torch.from_numpy(np.concatenate([feature.targets for feature in features])).to(hidden_TH.device)
        logits_NC = head(hidden_TH.index_select(0, _places(examples, features)))
        return F.cross_entropy(logits_NC, targets_N, reduction="sum", ignore_index=_NO_TARGET)

    def outputs(
        self, head: LinearHead, hidden_TH: Tensor, examples: Examples, features: Sequence[TagFeature]
    ) -> list[list[str]]:
        """The words' tags, for each feature."""
        numbers = iter(head(hidden_TH.index_select(0, _places(examples, features))).argmax(1).tolist())
        return [[self._tags[next(numbers)] for _ in feature.targets] for feature in features]

    def outcome(self, split: str, features: Sequence[TagFeature], outputs: list[Any]) -> Outcome:
        """Metrics of a labelled split, and what is written of any: tags in the files' scheme, or BIO for BIOES."""
        sentences = self._task.examples(split)
        predicted: list[list[str]] = [[] for _ in sentences]
        for feature, tags in zip(features, outputs, strict=True):  # a sentence's windows stand in order
            predicted[feature.example] += tags
        if self._converts:
            predicted = [to_bio(tags) for tags in predicted]
        rows = [
            {"id": sentence.id, "label": sentence.tags and list(sentence.tags), "prediction": tags}
            for sentence, tags in zip(sentences, predicted, strict=True)
        ]
        labels = [list(sentence.tags) for sentence in sentences if sentence.tags is not None]
        if self._converts:
            labels = [to_bio(tags) for tags in labels]
        metrics = {}
        if len(labels) == len(sentences):
            metrics = {name: score(name, labels, predicted) for name in self._task.config.metrics}
        return Outcome(metrics, predicted, {"predictions.jsonl": write_lines(rows)})


def _windows(lengths: list[int], room: int) -> Iterator[tuple[int, int]]:
    """Ranges of words that fit."""
    first = tokens = 0
    for number, length in enumerate(lengths):
        if tokens + length > room:
            yield first, number
            first, tokens = number, 0
        tokens += length
    yield first, len(lengths)


def _places(examples: Examples, features: Sequence[TagFeature]) -> Tensor:
    first_tokens = np.cumsum([0, *examples.lengths[:-1]])
    places = [first + feature.word_starts for first, feature in zip(first_tokens, features, strict=True)]
    return torch.from_numpy(np.concatenate(places)).to(examples.token_ids_T.device)
