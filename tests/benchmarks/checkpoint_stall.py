"""How long training stands still for a checkpoint: written beside the steps, and written at once.

    python tests/benchmarks/checkpoint_stall.py [--sizes small,base] [--rounds 5] [--folder DIR]

Both ways save fp32 weights and both moments of a published size, as one process on a CPU has them under any ZeRO stage.
At once, training waits for the copy, the write, the hashes, fsync and the reading again. Beside the steps it stands
still while the copy is handed over, and for what is left of it when the next update is due. What the passes in between
take longer while the copy goes on is told as well. They are products of matrices, of as many FLOPs as 512 tokens take:
on one thread, which leaves the copy a core, and on as many threads as there are cores. Seconds of a wall clock, for
waiting is what is measured; the order turns every round. The last lines are ratios, in percent, by size and threads;
exits 1 when one is over its target.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from processes import REPOSITORY
from report import describe_machine, describe_versions

sys.path.insert(0, str(REPOSITORY))  # it need not be installed

from model.config import ModelConfig
from model.electra import Electra
from model.kernels.select import select_kernels
from model.objective import ObjectiveConfig
from pipeline import checkpoint as checkpoints
from pipeline.environment import git_commit
from pipeline.pieces import Piece
from pipeline.snapshot import BackgroundCopy, BackgroundWriter, Snapshot

MOMENTS, VOCAB_SIZE, MOST_PCT = ("exp_avg", "exp_avg_sq"), 30522, 5.0
TOKENS, SIDE = 512, 1024  # of a step; of the square matrices whose products stand for it
NEWEST = checkpoints.Retention(newest=1)


class Saver:
    """Checkpoints of one model's state in a folder, beside products of matrices."""

    def __init__(self, size: str, folder: Path):
        config = ModelConfig.model_validate({"size": size})
        model = Electra(config, ObjectiveConfig(), VOCAB_SIZE, select_kernels("torch", "cpu"))
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._pieces = [
            Piece(kind, name, 0, weight.flatten().clone())
            for name, weight in weights.items()
            for kind in ("weight", *MOMENTS)
        ]
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        self._folder, self._snapshot, self._step = folder, Snapshot(shapes, MOMENTS), 0
        self._copy, self._writer = BackgroundCopy(is_beside=True), BackgroundWriter()
        self._written = 0.0
        parameters = sum(weight.numel() for weight in weights.values())
        self.bytes = 12 * parameters
        self._products = round(6 * parameters * TOKENS / (2 * SIDE**3))
        self._square = torch.rand(SIDE, SIDE)

    def at_once(self) -> float:
        """Seconds of a stand-still until the checkpoint is on disk."""
        began = time.perf_counter()
        self._snapshot.take(self._pieces)
        self._write()
        return time.perf_counter() - began

    def beside(self, alone_s: float) -> tuple[float, float, float, float]:
        """Seconds of the stand-still; those that products took longer while the copy went on; until the checkpoint is
        written; seconds of a product until then over ``alone_s``.
        """
        began = time.perf_counter()
        self._copy.begin(partial(self._snapshot.take, self._pieces))
        self._writer.begin(self._write)
        still_s, slowed_s = time.perf_counter() - began, 0.0
        products = []
        while len(products) < self._products:
            is_copying = self._copy.is_busy
            products.append(self.multiply())
            slowed_s += (products[-1] - alone_s) * is_copying
        update = time.perf_counter()
        self._copy.wait()
        still_s += time.perf_counter() - update
        while self._writer.is_busy:
            products.append(self.multiply())
        assert self._writer.wait() is None
        return still_s, slowed_s, self._written - began, statistics.median(products) / alone_s

    def multiply(self) -> float:
        """Seconds of one product."""
        began = time.perf_counter()
        self._square @ self._square
        return time.perf_counter() - began

    def _write(self) -> None:
        self._copy.wait()
        self._step += 1
        checkpoints.save(self._folder, {"step": self._step}, self._snapshot, NEWEST)
        self._written = time.perf_counter()


def measure(size: str, threads: int, rounds: int, root: str | None) -> tuple[float, float]:
    """Prints a line of the table; returns the stand-still, and that with what passes lost, in percent of at once."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        saver = Saver(size, Path(folder))
        saver.at_once()  # memory is touched for the first time
        alone_s = statistics.median(saver.multiply() for _ in range(100))
        saver.beside(alone_s)
        once, beside = [], []
        for number in range(rounds):
            for turn in ("once", "beside") if number % 2 else ("beside", "once"):
                if turn == "once":
                    once.append(saver.at_once())
                else:
                    beside.append(saver.beside(alone_s))
    still, slowed, written, product = (statistics.median(column) for column in zip(*beside, strict=True))
    print(
        f"| {size} | {threads} | {saver.bytes / 2**20:,.0f} | {statistics.median(once):.3f} | {still:.3f} | "
        f"{slowed:.3f} | {written:.3f} | {product:.2f} |"
    )
    pairs = [(100 * b[0] / o, 100 * (b[0] + b[1]) / o) for b, o in zip(beside, once, strict=True)]
    stall, loss = (statistics.median(column) for column in zip(*pairs, strict=True))
    return stall, loss


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's temporary folder")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    machine, torch_build = describe_machine("cpu"), describe_versions()["torch_build"]
    print(f"    python tests/benchmarks/checkpoint_stall.py {shlex.join(sys.argv[1:])}\n")
    print(f"{machine['processor']}, {cores} cores; torch {torch_build}; commit {git_commit()}\n")
    print(
        "| size | threads | MiB | at once, s | still, s | passes longer by, s | written after, s | product meanwhile |"
    )
    print("|---|---|---|---|---|---|---|---|")
    cases = [(size, threads) for size in options.sizes.split(",") for threads in sorted({1, cores})]
    shares = {case: measure(*case, options.rounds, options.folder) for case in cases}
    print()
    for (size, threads), (stall, loss) in shares.items():
        print(f"ratio stall_pct/{size}/{threads} {stall:.2f} target {MOST_PCT} goal none")
        print(f"ratio stall_and_slowdown_pct/{size}/{threads} {loss:.2f} target none goal none")
    return int(any(stall > MOST_PCT for stall, _ in shares.values()))


if __name__ == "__main__":
    sys.exit(main())
