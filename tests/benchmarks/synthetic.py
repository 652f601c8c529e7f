"""Inputs made here: configs, packed rows of random tokens, engines on them, and a small text corpus."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows
from data_shards.special import TRAINED
from model.batch import MicroBatch
from model.electra import Electra
from pipeline.batches import to_micro_batch
from pipeline.config import Config
from pipeline.devices import choose_kernels
from pipeline.distributed import Process, init_process_group
from pipeline.engine import Engine
from pipeline.plan import Plan, make_plan

TINY_MODEL = {
    "size": "tiny", "hidden_layers": 2, "hidden_size": 64, "attention_heads": 2, "feed_forward_size": 128,
    "embedding_size": 64,
}  # fmt: skip
_LARGE_DOCUMENT_TOKENS, _TINY_DOCUMENT_TOKENS = 170, 16
_VOWELS, _CONSONANTS = "aeiou", "bdfgklmnprstvz"


def make_config(is_tiny: bool, micro_batch_rows: int, precision: str = "bf16", **sections: Any) -> Config:
    """ELECTRA-Large at sequence length 512, or a tiny model, with one micro-batch a step.

    Args:
        is_tiny: Which of the two.
        micro_batch_rows: Rows of a step.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        **sections: Other sections of the config.
    """
    values = {
        "data": {"corpora": [{"name": "random", "path": "none"}], "sequence_length": 64 if is_tiny else 512},
        "tokenizer": {"vocab_size": 500 if is_tiny else 30522},
        "model": TINY_MODEL if is_tiny else {"size": "large"},
        "objective": {"mask_fraction": 0.25},
        "train": {
            "steps": 1000,
            "global_batch_size": micro_batch_rows,
            "micro_batch_size": micro_batch_rows,
            "precision": precision,
        },
        "optimizer": {"lr": 2e-4},
    }
    return Config.model_validate(values | sections)


def random_pieces(rows: int, length: int, several: bool) -> torch.Tensor:
    """Piece numbers ``(rows, length)`` by torch's seed: one piece in a row, or documents of about a third of it."""
    seed = int(torch.randint(2**31, ()))
    windows = _random_windows(rows, length, 100, max(2, length // 3) if several else None, seed)
    return torch.from_numpy(pack_rows(windows, np.zeros(rows, np.uint64), TRAINED).pieces).long()


def micro_batches(
    config: Config, device: str, number: int, several_pieces: bool, seed: int, is_tiny: bool
) -> list[MicroBatch]:
    """Micro-batches of random tokens as the program packs and masks them.

    Args:
        config: Sizes.
        device: Where they go.
        number: How many.
        several_pieces: Whether documents end within the rows; else each row is one piece.
        seed: Of tokens and masks.
        is_tiny: Which mean length of a document.
    """
    rows, length = config.train.global_batch_size, config.data.sequence_length
    document_tokens = _TINY_DOCUMENT_TOKENS if is_tiny else _LARGE_DOCUMENT_TOKENS
    batches = []
    for index in range(number):
        vocab_size = config.tokenizer.vocab_size
        windows = _random_windows(rows, length, vocab_size, document_tokens if several_pieces else None, seed + index)
        keys = np.random.default_rng(seed + index).integers(0, 2**63, rows, dtype=np.uint64)
        batches.append(
            to_micro_batch(
                KeyedRows(pack_rows(windows, keys, TRAINED), keys, TRAINED), config, vocab_size, device, seed + index, 1
            )
        )
    return batches


def _random_windows(rows: int, length: int, vocab_size: int, document_tokens: int | None, seed: int) -> np.ndarray:
    """Raw windows of uniform tokens; documents end with a chance of one in ``document_tokens``."""
    numbers = np.random.default_rng(seed)
    windows = numbers.integers(len(TRAINED.all), vocab_size, (rows, length), dtype=np.int32)
    if document_tokens:
        windows[numbers.random((rows, length)) < 1 / document_tokens] = TRAINED.sep
    return windows


def join_process_group(device: str) -> None:
    """Makes this process the only one of a group; DeepSpeed wants one."""
    if not torch.distributed.is_initialized():
        init_process_group(Process(), device)


def build_engine(config: Config, device: str, seed: int) -> tuple[Engine, Plan]:
    """A fresh model under the program's engine, DeepSpeed ZeRO stage 1 by default."""
    plan = make_plan(config, world_size=1)
    torch.manual_seed(seed)
    with torch.device(device):
        model = Electra(config.model, config.objective, plan.vocab_size, choose_kernels(config, device))
    return Engine(config, plan, model, device), plan


def write_small_buckets(folder: Path) -> Path:
    """A DeepSpeed JSON for tiny models: the default buckets hold 500 million numbers whatever the model's size."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}}))
    return path


def write_corpus(path: Path, size_bytes: int, seed: int) -> None:
    """Documents of made-up words with Zipf's frequencies, divided by blank lines."""
    numbers = random.Random(seed)
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    words = ["".join(numbers.choices(syllables, k=numbers.randint(1, 4))) for _ in range(5000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size_bytes:
            file.write(" ".join(numbers.choices(words, weights, k=numbers.randint(10, 300))) + "\n\n")
