"""Starts the processes of a stage on this machine and watches over them.

Under srun or torchrun nothing is started here: each task is one of the processes.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from pipeline.config import Config
from pipeline.distributed import LISTENER, STOP_SIGNALS
from pipeline.errors import ConfigError, DamagedError, DoNotRequeueError, PeerLostError, StoppedEarly, UsageError
from pipeline.log import logger

_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1

_FINAL = (0, *(e.exit_code for e in (UsageError, DamagedError, ConfigError, StoppedEarly, DoNotRequeueError)))
"""Codes after which the same processes would end the same way, or have nothing left to do."""

_STOPPED = (0, StoppedEarly.exit_code, PeerLostError.exit_code, 130, *(-number for number in STOP_SIGNALS))
"""How a process ends that is told to stop. One that has not got to its handlers yet dies by the signal itself, or
ends as click does after Ctrl-C; it had nothing to save. One that was about to start again does not."""


def num_processes(config: Config, stage: str) -> int:
    """``launch.processes`` resolved: one per GPU, or one on CPU. Tokenize starts its own workers."""
    if stage == "tokenize":
        return 1
    if config.launch.processes != "auto":
        return config.launch.processes
    if config.launch.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def threads_per_process(config: Config, processes_on_machine: int) -> int:
    """``launch.threads_per_process`` resolved: the cores that this process may use, shared out."""
    if config.launch.threads_per_process != "auto":
        return config.launch.threads_per_process
    cores = len(os.sched_getaffinity(0))
    if "SLURM_CPUS_PER_TASK" in os.environ:
        cores = int(os.environ["SLURM_CPUS_PER_TASK"])
        if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
            return cores  # srun started this process: the cores are its own
    return max(1, cores // processes_on_machine)


def launch(
    arguments: list[str],
    processes: int,
    threads: int,
    restarts: int = 0,
    reached: Callable[[], Any] = lambda: None,
) -> int:
    """Runs ``python -m pipeline ARGUMENTS`` in so many processes; returns one exit code for all.

    A signal to this process goes on to all of them. When one fails the others get
    ten seconds, then SIGKILL. All die with this process, however it dies.

    Args:
        arguments: Of the program.
        processes: How many.
        threads: Of each.
        restarts: How often in a row they are started again when one was lost and nothing was gained since.
        reached: What has been gained, to be compared.
    """
    with Children() as children:
        left, before = restarts, reached()
        while True:
            code = _launch_once(children, arguments, processes, threads)
            now = reached()
            left, gained, before = restarts if now != before else left, now != before, now
            if code in _FINAL or children.told_to_stop or not (children.lost or gained):
                return code
            if left == 0:
                if restarts:
                    logger.error("not started again: %d restarts in a row have gained nothing", restarts)
                return code
            left -= 1
            why = "a process was lost" if children.lost else "it failed after getting further"
            logger.warning("%s; all are started again from what is saved (%d more in a row)", why, left)


def _launch_once(children: "Children", arguments: list[str], processes: int, threads: int) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = os.environ | {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "OMP_NUM_THREADS": str(threads),
            "ELECTRA_LAUNCHED": "1",
        }
        # Rank 0 gets the port with its socket: a port that is only known to be free may be gone when it is used.
        first = {LISTENER: str(listener.fileno())}
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (first if rank == 0 else {})
            children.start(arguments, environment | own, [listener.fileno()] if rank == 0 else [])
        listener.close()
        return children.wait()


class Children:
    """Processes of this program that are told to stop when this one is.

    While it is entered, a signal to stop goes on to those that run, and none is started any more.

    Attributes:
        told_to_stop: Whether such a signal came.
        lost: Whether one of those waited for last died by a signal, or ended because another was gone.
    """

    def __init__(self) -> None:
        self.told_to_stop = self.lost = False
        self._signal: int = signal.SIGTERM
        self._running: list[subprocess.Popen] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        self._previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.told_to_stop, self._signal = True, number
        for child in self._running:
            if child.poll() is None:
                child.send_signal(number)

    def start(self, arguments: list[str], environment: dict[str, str], inherited: Sequence[int] = ()) -> None:
        """Starts ``python -m pipeline ARGUMENTS``, with open files that it inherits."""
        if self.told_to_stop:
            return
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env=environment,
            preexec_fn=_die_with_parent,
            pass_fds=inherited,
        )
        self._running.append(child)
        if self.told_to_stop:  # while it was being started, so that it was in no list yet
            child.send_signal(self._signal)

    def run(self, arguments: list[str], environment: dict[str, str]) -> int:
        """Starts one process and waits for it; returns its exit code."""
        self.start(arguments, environment)
        return self.wait()

    def wait(self) -> int:
        """Waits for those that run; returns one exit code for all."""
        deadline, killed = None, set()
        while None in [child.poll() for child in self._running]:  # each of them, or its death is not seen
            if deadline is None and any(child.returncode for child in self._running):
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                for rank, child in enumerate(self._running):
                    if child.poll() is None:
                        child.kill()
                        killed.add(rank)
            time.sleep(0.05)
        codes = [child.returncode for child in self._running]
        self._running = []
        by_themselves = [code for rank, code in enumerate(codes) if rank not in killed]
        self.lost = any(code < 0 or code == PeerLostError.exit_code for code in by_themselves)
        stopped = all(code in _STOPPED or rank in killed for rank, code in enumerate(codes))
        if self.told_to_stop and stopped and (any(codes) or not codes):
            return StoppedEarly.exit_code
        return _combine(codes)


def _combine(codes: list[int]) -> int:
    """The code that says most: one of ours before a death by signal, which may only be a consequence."""
    own = [code for code in codes if code > 1 and code != PeerLostError.exit_code]
    killed = [rank for rank, code in enumerate(codes) if code < 0]
    if own:
        return own[0]
    if killed:
        names = ", ".join(f"rank {rank} by signal {-codes[rank]}" for rank in killed)
        logger.error("killed: %s; the same command goes on from what is saved", names)
    return min(1, max(map(abs, codes)))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
