"""How long training stands still for a checkpoint: written beside the steps, and written at once.

    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoint_stall.py [--sizes small,base] [--rounds 5] [--folder DIR]

Both ways copy fp32 weights and both moments of a published size, whole. At once, training waits for the copy, the
write, the hashes, fsync and the reading again. Beside the steps it stands still while the tensors are handed over, and
again where the copy is not ready when the next update is due. Between them lie a forward and a backward pass, here
products of matrices on one thread, of as many FLOPs as 1,024 tokens take, far fewer than a real step has. Seconds of a
wall clock, for waiting is what is measured; the order turns every round. The last lines are ratios, in percent; exits 1
when one is over its target.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from processes import REPOSITORY
from report import describe_machine, describe_versions
from torch import Tensor

sys.path.insert(0, str(REPOSITORY))  # it need not be installed

from model.config import ModelConfig
from model.electra import Electra
from model.kernels.select import select_kernels
from model.objective import ObjectiveConfig
from pipeline import checkpoint as checkpoints
from pipeline.environment import git_commit
from pipeline.snapshot import BackgroundWriter, Snapshot

MOMENTS, VOCAB_SIZE, MOST_PCT = ("exp_avg", "exp_avg_sq"), 30522, 5.0
TOKENS, SIDE = 1024, 1024  # of a step; of the square matrices whose products stand for it
NEWEST = checkpoints.Retention(newest=1)


class Saver:
    """Checkpoints of one model's state in a folder."""

    def __init__(self, size: str, folder: Path):
        config = ModelConfig.model_validate({"size": size})
        model = Electra(config, ObjectiveConfig(), VOCAB_SIZE, select_kernels("torch", "cpu"))
        self._state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        shapes = {name: list(tensor.shape) for name, tensor in self._state.items()}
        self._folder, self._snapshot, self._writer = folder, Snapshot(shapes, MOMENTS), BackgroundWriter()
        parameters = sum(tensor.numel() for tensor in self._state.values())
        self.bytes = 12 * parameters
        self._products = round(6 * parameters * TOKENS / (2 * SIDE**3))
        self._step = 0

    def at_once(self) -> float:
        """Seconds of a stand-still until the checkpoint is on disk."""
        began = time.perf_counter()
        self._snapshot.take(self._tensors())
        self._write()
        return time.perf_counter() - began

    def beside(self, work: Callable[[], None]) -> tuple[float, float, float]:
        """Seconds of the stand-still; of a piece of work while the checkpoint is written; until it is."""
        began = time.perf_counter()
        self._snapshot.take(self._tensors())
        self._writer.begin(self._write)
        handed_over = time.perf_counter()
        pieces = [seconds_of(work) for _ in range(self._products)]
        waited_s = seconds_of(self._snapshot.wait)
        while self._writer.is_busy:
            pieces.append(seconds_of(work))
        written = time.perf_counter()
        assert self._writer.wait() is None
        return handed_over - began + waited_s, statistics.median(pieces), written - handed_over

    def _write(self) -> None:
        self._step += 1
        checkpoints.save(self._folder, {"step": self._step}, self._snapshot, NEWEST)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, tensor in self._state.items():
            for kind in ("weight", *MOMENTS):
                yield kind, name, tensor


def seconds_of(work: Callable[[], None]) -> float:
    """Of a wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(size: str, rounds: int, root: str | None) -> float:
    """Prints a line of the table; returns the stall beside the steps in percent of that at once."""
    square = torch.rand(SIDE, SIDE)

    def work() -> None:
        square @ square

    with tempfile.TemporaryDirectory(dir=root) as folder:
        saver = Saver(size, Path(folder))
        saver.at_once(), saver.beside(work)  # memory is touched for the first time
        alone = statistics.median(seconds_of(work) for _ in range(30))
        once, beside = [], []
        for number in range(rounds):
            for turn in ("once", "beside") if number % 2 else ("beside", "once"):
                if turn == "once":
                    once.append(saver.at_once())
                else:
                    beside.append(saver.beside(work))
    stall, slowed, written = (statistics.median(column) for column in zip(*beside, strict=True))
    share = 100 * statistics.median(b[0] / o for b, o in zip(beside, once, strict=True))
    print(
        f"| {size} | {saver.bytes / 2**20:,.0f} | {statistics.median(once):.3f} | {stall:.3f} | {written:.3f} | "
        f"{slowed / alone:.2f} |"
    )
    return share


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, torch_build = describe_machine("cpu"), describe_versions()["torch_build"]
    print(f"    python tests/benchmarks/checkpoint_stall.py {shlex.join(sys.argv[1:])}\n")
    print(f"{machine['processor']}, 1 thread; torch {torch_build}; commit {git_commit()}\n")
    print("| size | MiB | at once, s | stall beside the steps, s | written after, s | a step meanwhile takes |")
    print("|---|---|---|---|---|---|")
    shares = {size: measure(size, options.rounds, options.folder) for size in options.sizes.split(",")}
    print()
    for size, share in shares.items():
        print(f"ratio stall_pct/{size} {share:.2f} target {MOST_PCT} goal none")
    return int(any(share > MOST_PCT for share in shares.values()))


if __name__ == "__main__":
    sys.exit(main())
