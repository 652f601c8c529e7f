"""What both sides of ``cpu_step.py`` train on: documents, their batches, the config; and our side's step."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from cpu_step_peer import PeerBatch, peer_batch
from row_peers import make_collator
from text_to_shards import make_tokenizer, read_texts

from data_shards.loader import KeyedRows
from data_shards.rows import pack_rows
from data_shards.special import SpecialIds
from data_shards.tokenizer import Tokenizer
from model.batch import GlobalCounts, MicroBatch
from pipeline.batches import to_micro_batch
from pipeline.config import Config

MASK_FRACTION, VOCAB_SIZE, LEARNING_RATE, SEED = 0.15, 30_522, 5e-4, 1


@dataclass(frozen=True)
class Text:
    """Token ids of documents, without special tokens, and the ids of these."""

    documents: list[np.ndarray]
    special: SpecialIds

    def windows(self, length: int, has_borders: bool) -> np.ndarray:
        """The token stream in windows ``(N, length)``; [SEP] ends each document where there are borders."""
        end = [self.special.sep] if has_borders else []
        stream = np.concatenate([np.append(document, end).astype(np.int32) for document in self.documents])
        return stream[: len(stream) // length * length].reshape(-1, length)

    def pieces(self, length: int) -> list[np.ndarray]:
        """Documents cut to ``length``, [CLS] and [SEP] around each piece, the shortest first."""
        cls, sep = [self.special.cls], [self.special.sep]
        starts = ((document, start) for document in self.documents for start in range(0, len(document), length - 2))
        pieces = [np.concatenate([cls, document[start : start + length - 2], sep]) for document, start in starts]
        return sorted(pieces, key=len)


def read_first(options: argparse.Namespace) -> list[str]:
    """The first documents of the text."""
    documents = read_texts(options.text)
    sizes = itertools.accumulate(len(document.encode()) for document in documents)
    return [text for text, size in zip(documents, sizes, strict=True) if size <= options.megabytes * 1e6]


def read_text(folder: Path, options: argparse.Namespace) -> dict[str, Text]:
    """The first documents of the text, tokenized: ``lines``, each a document, and ``blocks`` between blank lines."""
    blocks = read_first(options)
    tokenizer = Tokenizer(make_tokenizer(folder / "tokenizer", "wordpiece", blocks, options.vocab))
    texts = {}
    for unit, documents in (("lines", [line for block in blocks for line in block.splitlines()]), ("blocks", blocks)):
        encoded = [np.frombuffer(ids, tokenizer.dtype) for ids in tokenizer.encode_texts(documents)]
        texts[unit] = Text([ids for ids in encoded if len(ids)], tokenizer.special)
        lengths = [len(ids) for ids in texts[unit].documents]
        print(
            f"{sum(lengths):,} tokens in {len(lengths):,} {unit}: mean {np.mean(lengths):.0f}, "
            f"median {np.median(lengths):.0f}; vocabulary {tokenizer.vocab_size:,}"
        )
    return texts


def make_config(options: argparse.Namespace, length: int, rows: int, precision: str, **sections: Any) -> Config:
    """ELECTRA-Small with one micro-batch a step; what the published recipe sets is as in ``configs/small.yaml``."""
    values = {
        "data": {"corpora": [{"name": "text", "path": "none"}], "sequence_length": length},
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "model": synthetic.TINY_MODEL if options.tiny else {"size": "small"},
        "objective": {"mask_fraction": MASK_FRACTION, "discriminator_loss_weight": 50},
        "train": {"steps": 1000, "global_batch_size": rows, "micro_batch_size": rows, "precision": precision},
        "optimizer": {"lr": LEARNING_RATE},
    }
    return synthetic.make_config(False, rows, **values | sections)


def our_stepper(config: Config) -> tuple[Callable[[MicroBatch], object], int]:
    """The program's training step, and how many parameters it trains."""
    engine, plan = synthetic.build_engine(config, "cpu", SEED)

    def step(batch: MicroBatch) -> None:
        counts = GlobalCounts(float(batch.num_masked), batch.num_tokens)
        engine.step([(batch, counts)], LEARNING_RATE)

    return step, plan.parameters_trained


def our_batches(windows: Iterator[np.ndarray], special: SpecialIds, config: Config) -> list[MicroBatch]:
    """Windows of the token stream packed and masked as the program does it."""
    draw = np.random.default_rng(SEED)
    batches = []
    for number, raw in enumerate(windows):
        keys = draw.integers(0, 2**63, len(raw), dtype=np.uint64)
        rows = KeyedRows(pack_rows(raw, keys, special), keys, special)
        batches.append(to_micro_batch(rows, config, VOCAB_SIZE, "cpu", SEED + number, 1.0))
    return batches


def draw_batches(
    texts: dict[str, Text], case: str, config: Config, num_batches: int
) -> tuple[list[MicroBatch], list[PeerBatch]]:
    """Different batches for each side: rows of the text at random.

    Pieces are drawn with one from each of as many shares of the pieces as there are rows, by length, so that the
    padding of a few batches is that of the whole text.
    """
    text = texts.get(case, texts["blocks"])
    length, num_rows = config.data.sequence_length, config.train.global_batch_size
    draw = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    windows = text.windows(length, has_borders=case != "full")
    drawn = [windows[draw.integers(0, len(windows), num_rows)] for _ in range(num_batches)]
    ours = our_batches(iter(drawn), text.special, config)
    if case != "full":
        pieces = text.pieces(length)
        # As many rows as fill a step of about as many slots as ours, so that fixed costs weigh the same.
        num_rows = round(num_rows * length / min(length, max(map(len, pieces[: -len(pieces) // 50]))))
        shares = (np.arange(num_rows) + draw.random((num_batches, num_rows))) / num_rows
        rows = [[pieces[int(share * len(pieces))] for share in of_batch] for of_batch in shares]
    else:
        rows = [batch.token_ids_BT.numpy() for batch in ours]
    collate = make_collator(MASK_FRACTION, text.special, VOCAB_SIZE)
    return ours, [peer_batch(collate, of_batch) for of_batch in rows]
