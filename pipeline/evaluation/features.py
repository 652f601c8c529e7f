"""Token ids of examples, and rows of them without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_shards.tokenizer import Tokenizer
from model.finetuning import Examples
from model.kernels.attention import Packing

_SEGMENT_B = 1


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of the network: an example, or a window of one.

    Attributes:
        token_ids: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], int32.
        num_first: Tokens of the first segment, [CLS] and [SEP] included.
        example: Number of the example.
    """

    token_ids: np.ndarray
    num_first: int
    example: int

    def __len__(self) -> int:
        return len(self.token_ids)


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each text, without special tokens."""
    return [np.frombuffer(ids, tokenizer.dtype) for ids in tokenizer.encode_texts(list(texts))]


def join_segments(tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], and the number of tokens of the first segment."""
    special = tokenizer.special
    parts = [[special.cls], first, [special.sep]] + ([] if second is None else [second, [special.sep]])
    return np.concatenate(parts).astype(np.int32), len(first) + 2


def cut_pair(num_first: int, num_second: int, most: int) -> tuple[int, int]:
    """How much is left of two texts that are cut at the end of the longer one, token by token, until they fit."""
    if num_first + num_second <= most:
        return num_first, num_second
    if min(num_first, num_second) > most // 2:
        return most - most // 2, most // 2
    return (num_first, most - num_first) if num_first < num_second else (most - num_second, num_second)


def collate(features: Sequence[Feature], device: str) -> Examples:
    """Features one after the other in one row."""
    lengths = [len(feature) for feature in features]
    token_types = np.concatenate([np.arange(len(f)) >= f.num_first for f in features]) * _SEGMENT_B
    return Examples(
        token_ids_T=torch.from_numpy(np.concatenate([feature.token_ids for feature in features])).long(),
        token_types_T=torch.from_numpy(token_types).long(),
        packing=Packing.of_lengths(lengths),
    ).to(device)


def split_by_tokens(features: Sequence[Feature], most_tokens: int) -> Iterator[Sequence[Feature]]:
    """Consecutive features of no more than so many tokens together; a longer one comes alone."""
    first = tokens = 0
    for number, feature in enumerate(features):
        if number > first and tokens + len(feature) > most_tokens:
            yield features[first:number]
            first, tokens = number, 0
        tokens += len(feature)
    if first < len(features):
        yield features[first:]
