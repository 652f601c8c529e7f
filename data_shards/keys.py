"""Content keys: what the bytes of a tokenizer and of a shard folder depend on, hashed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_shards.corpus import Corpus
from data_shards.store import Layout
from data_shards.tokenizer_files import TokenizerSettings

# Raised when the same inputs would give other bytes.
TOKENIZER_CODE_VERSION = 2
SHARDS_CODE_VERSION = 2


def content_key(inputs: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of canonical JSON."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def tokenizer_inputs(
    settings: TokenizerSettings, texts: Sequence[tuple[Corpus, float, str]], held_out_fraction: float
) -> dict[str, Any]:
    """All that a trained tokenizer's bytes depend on; ``texts``: each corpus, its weight and its digest, in order."""
    return {
        "code": TOKENIZER_CODE_VERSION,
        "settings": asdict(settings),
        "corpora": [_corpus_inputs(corpus, digest) for corpus, _, digest in texts],
        "weights": [weight for _, weight, _ in texts] if len(texts) > 1 else [1],
        "held_out_fraction": held_out_fraction,
    }


def given_tokenizer_inputs(file_sha256: str, suffix: str, lowercase: bool) -> dict[str, Any]:
    """All that the folder of a given tokenizer depends on."""
    about = {"code": TOKENIZER_CODE_VERSION, "file": file_sha256, "suffix": suffix}
    return about | ({"lowercase": lowercase} if suffix == ".txt" else {})


def shard_inputs(
    corpus: Corpus, digest: str, tokenizer_sha256: str, held_out_fraction: float, task_bytes: int, layout: Layout
) -> dict[str, Any]:
    """All that a shard folder's bytes depend on."""
    return {
        "code": SHARDS_CODE_VERSION,
        "corpus": _corpus_inputs(corpus, digest),
        "tokenizer": tokenizer_sha256,
        "held_out_fraction": held_out_fraction,
        "task_bytes": task_bytes,
        "layout": asdict(layout),
    }


def _corpus_inputs(corpus: Corpus, digest: str) -> dict[str, Any]:
    """A corpus by what it says, not by where it lies."""
    return {
        "format": corpus.format,
        "documents": corpus.documents,
        "text_column": corpus.text_column,
        "content": digest,
    }
