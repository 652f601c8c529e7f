"""Which documents are held out, and which ones the tokenizer is trained on."""

import hashlib
from collections.abc import Iterator

import numpy as np

from data_shards.corpus import Corpus, Task, plan_tasks
from data_shards.documents import Counts, read_documents, refuse_other_encoding
from data_shards.order import derive_key, permute

_SLICE_BYTES = 1 << 20
_MOST_DAMAGED = 0.5
"""Of the documents of a sample, which may be few; of all of a corpus it is known when they have been read."""
_EXPANSION = 4
"""Text of a compressed or tabular file by its size on disk, at most; only the spread of the sample depends on it."""


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether a document, in UTF-8, is held out: by its text alone, so that copies go the same way."""
    if fraction <= 0:
        return False
    digest = hashlib.sha256(b"held_out")
    digest.update(document)
    return int.from_bytes(digest.digest()[:8], "little") / 2**64 < fraction


def sample_paragraphs(
    corpora: list[Corpus], weights: list[float], sample_bytes: int, seed: int, held_out_fraction: float
) -> Iterator[str]:
    """Lines of training documents, about ``sample_bytes`` in all, shared among the corpora by weight.

    Reads slices of a MiB in a keyed order until a corpus has given its share, so neither time nor memory
    grows with the corpora. Of a file that can only be read from its beginning, its share is the beginning.

    Raises:
        DamagedDataError: As ``read_documents``; also where more than half of what was read of a corpus is not UTF-8.
    """
    for number, (corpus, weight) in enumerate(zip(corpora, weights, strict=True)):
        left_bytes = int(sample_bytes * weight / sum(weights))
        slices = plan_tasks(corpus, _SLICE_BYTES)
        order = permute(np.arange(len(slices)), len(slices), derive_key(seed, 5, number))
        sizes = [max(_SLICE_BYTES, task.input_bytes) * _EXPANSION for task in slices]
        share, counts = left_bytes / sum(sizes), Counts()
        for index in order.tolist():
            if left_bytes <= 0:
                break
            most = min(left_bytes, max(_SLICE_BYTES * _EXPANSION, int(sizes[index] * share)))
            left_bytes -= most
            for line in _training_lines(corpus, slices[index], held_out_fraction, counts):
                most -= len(line.encode())
                yield line
                if most <= 0:
                    break
            left_bytes += most
        refuse_other_encoding(counts, _MOST_DAMAGED, "the tokenizer's sample")


def _training_lines(corpus: Corpus, task: Task, held_out_fraction: float, counts: Counts) -> Iterator[str]:
    for document in read_documents(corpus, task, counts):
        if not is_held_out(document.encode(), held_out_fraction):
            yield from filter(None, document.splitlines())
