"""The text that rows of the paper's example builder keep, as plain text: what packed rows of the same text come to.

    python tests/benchmarks/paper_text.py TOKENIZER corpora/*.txt --sequence-length 32 \\
        --held-out-fraction 0.005 --out paper_text

The builder drops what of its collected lines is longer than a row (data_shards/paper.py). Each segment of rows as it
would make them becomes a line of a file of the same name under OUT, without characters that the tokenizer does not
know; documents stay apart, and those that the original holds out are left out. TOKENIZER is a folder under
``<run.dir>/tokenizers``, and OUT/tokenizer its copy.
"""

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_shards.paper import ExampleBuilder
from data_shards.sampling import is_held_out
from data_shards.store import Layout
from data_shards.tokenizer import Tokenizer

_BLANK_LINES = re.compile(r"\n\s*\n")


def kept_lines(document: str, tokenizer: Tokenizer, builder: ExampleBuilder) -> Iterator[str]:
    """The segments of a document's rows, decoded."""
    for row in builder.rows_of(tokenizer.encode_texts(document.split("\n"))):
        ids = np.frombuffer(row, tokenizer.dtype)
        ends = np.flatnonzero(ids == tokenizer.special.sep)
        for segment in np.split(ids, ends)[:-1]:  # the last is [SEP] and padding
            known = segment[1:][segment[1:] != tokenizer.special.unk]  # after [CLS] or the [SEP] before
            if line := tokenizer.decode(known):
                yield line


def kept_text(text: str, tokenizer: Tokenizer, builder: ExampleBuilder, held_out_fraction: float) -> str:
    """What the rows of a file's training documents keep."""
    documents = (document.strip() for document in _BLANK_LINES.split(text))
    documents = (document for document in documents if not is_held_out(document.encode(), held_out_fraction))
    kept = ("\n".join(kept_lines(document, tokenizer, builder)) for document in documents)
    return "\n\n".join(filter(None, kept)) + "\n"


def main() -> None:
    """Writes a file for each that is read, and says how much of it is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--held-out-fraction", type=float, required=True, help="data.held_out_fraction")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = Tokenizer(arguments.tokenizer)
    layout = Layout("paper", arguments.sequence_length, arguments.seed)
    shutil.copytree(tokenizer.folder, arguments.out / "tokenizer")
    for number, path in enumerate(arguments.files):
        builder = ExampleBuilder(layout, tokenizer.special, tokenizer.dtype, number)
        text = path.read_text(encoding="utf-8")
        kept = kept_text(text, tokenizer, builder, arguments.held_out_fraction)
        (arguments.out / path.name).write_text(kept, encoding="utf-8")
        print(f"{path.name}: {len(kept):,} of {len(text):,} characters kept", flush=True)


if __name__ == "__main__":
    main()
