"""The text that rows of the paper's example builder keep, as plain text: what packed rows of the same text come to.

    python tests/benchmarks/paper_text.py TOKENIZER corpora/*.txt --sequence-length 32 --out paper_text

The builder drops what of its collected lines is longer than a row (data_shards/paper.py). Each segment of its rows
becomes a line of a file of the same name under OUT; documents stay apart. TOKENIZER is a folder under
``<run.dir>/tokenizers``; OUT/tokenizer is its copy, for the same ids.
"""

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_shards.paper import ExampleBuilder
from data_shards.store import Layout
from data_shards.tokenizer import Tokenizer

_BLANK_LINES = re.compile(r"\n\s*\n")


def kept_lines(document: str, tokenizer: Tokenizer, builder: ExampleBuilder) -> Iterator[str]:
    """The segments of a document's rows, decoded."""
    for row in builder.rows_of(tokenizer.encode_texts(document.split("\n"))):
        ids = np.frombuffer(row, tokenizer.dtype)
        ends = np.flatnonzero(ids == tokenizer.special.sep)
        for segment in np.split(ids, ends)[:-1]:  # the last is [SEP] and padding
            if line := tokenizer.decode(segment[1:]):  # after [CLS] or the [SEP] before
                yield line


def main() -> None:
    """Writes a file for each that is read, and says how much of it is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = Tokenizer(arguments.tokenizer)
    layout = Layout("paper", arguments.sequence_length, arguments.seed)
    shutil.copytree(tokenizer.folder, arguments.out / "tokenizer")
    for number, path in enumerate(arguments.files):
        builder = ExampleBuilder(layout, tokenizer.special, tokenizer.dtype, number)
        text = path.read_text(encoding="utf-8", errors="replace")
        documents = ("\n".join(kept_lines(it, tokenizer, builder)) for it in _BLANK_LINES.split(text.strip()))
        kept = "\n\n".join(filter(None, documents)) + "\n"
        (arguments.out / path.name).write_text(kept, encoding="utf-8")
        print(f"{path.name}: {len(kept) / len(text):.0%} kept", flush=True)


if __name__ == "__main__":
    main()
