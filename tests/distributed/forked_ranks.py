"""Ranks of the real program, forked from one process that has imported everything: a start takes a second, not six.

    python -m tests.distributed.forked_ranks       jobs as lines of JSON on stdin, their exit codes on stdout

A job may name a step after which rank 0 is told to stop, as Slurm would, a file for what each step reads, and lines of
Python that each rank executes before the program.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import pretrain
from pipeline.batches import MicroBatches
from pipeline.distributed import LISTENER
from pipeline.engine import StepResult
from pipeline.training import Training
from tests.conftest import clean_environment
from tests.forking import import_all, run_program


@dataclass(frozen=True)
class Job:
    """One start of some ranks.

    Attributes:
        arguments: Of the program.
        world_size: Number of ranks.
        log: Takes all they say.
        batches: Takes a line for each micro-batch: step, number, digest of all it holds; None: nothing.
        stop_after: Step after which rank 0 gets SIGUSR2; None: it runs to its end.
        environment: Variables on top.
        first: What each rank executes before the program.
    """

    arguments: list[str]
    world_size: int
    log: str
    batches: str | None = None
    stop_after: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    first: str = ""


class ForkedRanks:
    """The process that forks, seen from a test; a context."""

    def __enter__(self) -> "ForkedRanks":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.forked_ranks"],
            env=clean_environment(OMP_NUM_THREADS="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def run(self, job: Job) -> list[int]:
        """Runs a job to its end; returns each rank's exit code."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def read_batches(path: Path) -> dict[tuple[int, int], str]:
    """Digest of each micro-batch by step and number; one that was made twice was the same both times."""
    found: dict[tuple[int, int], str] = {}
    for line in path.read_text().splitlines():
        step, number, digest = line.split()
        assert found.setdefault((int(step), int(number)), digest) == digest, line
    return found


def _start_all(job: Job) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ranks = []
        for rank in range(job.world_size):
            pid = os.fork()
            if pid == 0:
                os._exit(_be_rank(job, rank, listener))
            ranks.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def _be_rank(job: Job, rank: int, listener: socket.socket) -> int:
    size = str(job.world_size)
    os.environ.update(
        job.environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(listener.getsockname()[1]),
    )  # fmt: skip
    if rank == 0:
        os.environ[LISTENER] = str(listener.detach())
    else:
        listener.close()
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    if rank == 0 and job.stop_after is not None:
        _stop_after(job.stop_after)
    if job.batches is not None:
        _record_batches(job.batches)
    exec(job.first, {})
    return run_program(job.arguments, dict(os.environ))


def _stop_after(step: int) -> None:
    account = Training.account

    def stopping(self: Training, result: StepResult, seconds: float) -> None:
        account(self, result, seconds)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGUSR2)

    Training.account = stopping


def _record_batches(path: str) -> None:
    class Recorded(MicroBatches):
        def of_step(self, step: int) -> Iterator[tuple[int, Any]]:
            for number, batch in super().of_step(step):
                if batch.weight:
                    masking = batch.masking
                    digest = hashlib.sha256(str(batch.seed).encode())
                    for tensor in (batch.token_ids_BT, batch.positions_BT, batch.token_types_BT,
                                   batch.packing.pieces_BT, masking.positions_BM, masking.weights_BM,
                                   masking.generator_ids_BT):  # fmt: skip
                        digest.update(tensor.numpy().tobytes())
                    with open(path, "a") as file:
                        file.write(f"{step} {number} {digest.hexdigest()}\n")
                yield number, batch

    pretrain.MicroBatches = Recorded


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import_all()
    for given in sys.stdin:
        print(json.dumps(_start_all(Job(**json.loads(given)))), file=answers, flush=True)
