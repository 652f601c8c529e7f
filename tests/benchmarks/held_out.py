"""Networks of several runs on the same held-out rows, with the same masks and against the same generators.

    python tests/benchmarks/held_out.py RUN RUN… --shards FOLDER --sequence-length 32 --generators RUN… --out FILE

A run's own held-out scores are of its own rows, and its discriminator's AUC of what its own generator writes there,
which is harder to tell the better that generator is. Here each discriminator also reads what the generators of
``--generators`` write. RUN is a run's folder, FOLDER one of shards made with the same tokenizer.

All rows are masked as the first run masks, and all networks compute in fp32. An AUC is over all tokens, as the paper's
objective; its own generator's also over the selected ones alone, which is all that ELECTRA 15 % learns. Standard errors
take tokens as independent; those of a row are not quite.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.loader import held_out_rows
from data_shards.store import read_manifest
from model.batch import GlobalCounts, MicroBatch
from model.electra import Corrupted, Electra
from model.kernels.select import select_kernels
from model.statistics import Statistics
from pipeline.batches import to_micro_batch
from pipeline.checkpoint import WEIGHTS
from pipeline.config import Config
from pipeline.export import find_source
from pipeline.held_out import SEED, auc_with_standard_error, slice_rows
from pipeline.unigram import token_shares

_ROWS_AT_ONCE = 64
_HEADINGS = ("loss on [MASK], nats", "AUC on its own generator's", "of the selected tokens")


@dataclass(frozen=True)
class Trained:
    """A run's networks."""

    name: str
    config: Config
    tokenizer_sha256: str
    model: Electra


class Detected:
    """A discriminator's logits and their labels, micro-batch after micro-batch."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._selected: list[Tensor] = []

    def add(self, logits_BT: Tensor, labels_BT: Tensor, batch: MicroBatch) -> None:
        """One micro-batch's, of the tokens that count."""
        counts_BT = batch.token_weights_BT > 0
        self._logits.append(logits_BT[counts_BT])
        self._labels.append(labels_BT[counts_BT])
        self._selected.append(batch.masking.times_selected_BT[counts_BT] > 0)

    def cells(self) -> list[str]:
        """AUC with its standard error, over all tokens and over the selected ones."""
        if not self._logits:
            return ["–", "–"]
        logits_N, labels_N, selected_N = (torch.cat(it) for it in (self._logits, self._labels, self._selected))
        pairs = ((logits_N, labels_N), (logits_N[selected_N], labels_N[selected_N]))
        return ["{:.3f} ± {:.3f}".format(*auc_with_standard_error(*pair)) for pair in pairs]


def load(folder: Path) -> Trained:
    """The networks of a run's newest checkpoint."""
    source = find_source(folder.resolve())
    read = source.checkpoint.tensors(WEIGHTS)
    model = Electra(source.config.model, source.config.objective, source.tokenizer.vocab_size, select_kernels("torch"))
    model.load_state_dict({name: read(name) for name in source.checkpoint.shapes(WEIGHTS)})
    return Trained(folder.name, source.config, source.tokenizer.digest, model.eval())


def micro_batches(shards: Path, config: Config, vocab_size: int, length: int, max_rows: int) -> list[MicroBatch]:
    """Held-out rows of a folder, masked as ``config`` says."""
    keyed = held_out_rows([shards], [1.0], length, max_rows, SEED)
    if keyed is None:
        raise SystemExit(f"{shards}: nothing is held out; name another folder")
    config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": length})})
    batches = []
    for first in range(0, len(keyed.keys), _ROWS_AT_ONCE):
        last = first + _ROWS_AT_ONCE
        some = replace(keyed, rows=slice_rows(keyed.rows, first, last), keys=keyed.keys[first:last])
        batches.append(to_micro_batch(some, config, vocab_size, "cpu", SEED + first, 1.0))
    return batches


def unigram_loss(shards: Path, vocab_size: int, batches: Iterable[MicroBatch]) -> float:
    """Loss in nats, where originals are hidden, of guessing by the training tokens' frequencies, at least 1e-6."""
    shares = token_shares([shards], [1.0], vocab_size, list(read_manifest(shards).special.all))
    nll_V = torch.from_numpy(-np.log(np.maximum(shares, 1e-6)))
    hidden = []
    for masking, token_ids_BT in ((batch.masking, batch.token_ids_BT) for batch in batches):
        original_BM = token_ids_BT.gather(1, masking.positions_BM)
        is_hidden_BM = masking.generator_ids_BT.gather(1, masking.positions_BM) != original_BM
        hidden.append(original_BM[is_hidden_BM & (masking.weights_BM > 0)])
    return float(nll_V[torch.cat(hidden)].mean())


@torch.no_grad()
def row_of(run: Trained, batches: list[MicroBatch], corruptions: list[list[Corrupted]]) -> list[str]:
    """A line of the table: loss, AUC on its own samples, AUC on those of each common generator."""
    total, own = Statistics.zeros(), Detected()
    for batch in batches:
        _, sums, logits_BT, labels_BT = run.model(batch, GlobalCounts(1, 1))
        total = total + Statistics(sums)
        if logits_BT is not None and labels_BT is not None:
            own.add(logits_BT, labels_BT, batch)
    cells = [f"{total.metrics(1, 1, 1)['train/mask_token_loss']:.3f}", *own.cells()]
    for corrupted in corruptions:
        found = Detected()
        for batch, rows in zip(batches, corrupted, strict=True):
            if run.model.discriminator_head is not None:
                found.add(run.model.discriminate(rows.token_ids_BT, batch), rows.is_replaced_BT, batch)
        cells += found.cells()[:1]
    return [run.name, *cells]


@torch.no_grad()
def corrupt(run: Trained, batches: Iterable[MicroBatch]) -> list[Corrupted]:
    """What a run's generator makes of the rows."""
    return [run.model.corrupt(run.model.generate(batch), batch) for batch in batches]


def _refuse_senseless(runs: list[Trained], generators: list[Trained], shards: Path) -> None:
    wanted = read_manifest(shards).tokenizer_sha256
    for run in (*runs, *generators):
        if run.tokenizer_sha256 != wanted:
            raise SystemExit(f"{run.name}: trained with another tokenizer than {shards} was written with; leave it out")
    for run in generators:
        if run.model.generator_head is None:
            raise SystemExit(f"--generators {run.name}: it trained none; leave it out")


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--generators", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    runs, generators = ([load(folder) for folder in folders] for folders in (arguments.runs, arguments.generators))
    _refuse_senseless(runs, generators, arguments.shards)
    vocab_size = runs[0].model.embeddings.token_table().shape[0]
    batches = micro_batches(arguments.shards, runs[0].config, vocab_size, arguments.sequence_length, arguments.rows)
    corruptions = [corrupt(run, batches) for run in generators]
    headings = ["run", *_HEADINGS]
    for run in generators:
        headings.append(f"on {run.name}'s")
    table = [headings, ["---"] * len(headings)]
    table += [row_of(run, batches, corruptions) for run in runs]
    rows = sum(len(batch.token_ids_BT) for batch in batches)
    lines = [
        f"{rows:,} held-out rows of {arguments.sequence_length} tokens; the training text's frequencies alone have a "
        f"loss of {unigram_loss(arguments.shards, vocab_size, batches):.3f} nats there.\n",
        *("| " + " | ".join(line) + " |" for line in table),
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
