"""Which process this is, and what processes say to each other outside the gradients.

Control values (stop flags, counts, sums for metrics) travel over gloo on the
host, beside whatever the gradients use, so that they never wait for a GPU.
"""

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from pipeline.errors import ConfigError, PeerLostError, StoppedEarly

# Steps of ranks count from 0; Slurm's special steps (batch shell, interactive shell) have ids up here.
_FIRST_SPECIAL_STEP_ID = 0xFFFFFF00


LISTENER = "ELECTRA_LISTENER"
"""Environment variable: the file descriptor with which rank 0 owns MASTER_PORT already."""

RENDEZVOUS = "ELECTRA_RENDEZVOUS"
"""Environment variable: name of this meeting, where one store sees several in turn."""

FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""The range that slurm/_common.sh takes its ports from."""
_PORT_STRIDE = 1009

_LONGEST_RENDEZVOUS = timedelta(minutes=30)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""What asks for a checkpoint and an exit: Slurm, a user's Ctrl-C, a site's preemption."""


@dataclass(frozen=True)
class Process:
    """One of ``world_size`` processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def discover_process() -> Process | None:
    """This process's rank as set by torchrun, by ``electra`` itself or by srun; None when nobody set one."""
    environment = os.environ
    if "RANK" in environment:
        rank = int(environment["RANK"])
        return Process(rank, int(environment.get("LOCAL_RANK", rank)), int(environment.get("WORLD_SIZE", 1)))
    if int(environment.get("SLURM_STEP_ID", _FIRST_SPECIAL_STEP_ID)) < _FIRST_SPECIAL_STEP_ID:
        return Process(
            int(environment["SLURM_PROCID"]),
            int(environment.get("SLURM_LOCALID", 0)),
            int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1))),
        )
    return None


def place_in_array() -> tuple[int, int]:
    """Number of this element of a Slurm job array, from 0, and how many there are; (0, 1) outside of one."""
    count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    if count == 1:
        return 0, 1
    lowest, highest = (int(os.environ[f"SLURM_ARRAY_TASK_{end}"]) for end in ("MIN", "MAX"))
    return (int(os.environ["SLURM_ARRAY_TASK_ID"]) - lowest) * (count - 1) // (highest - lowest), count


def array_job() -> str:
    """What all elements of this Slurm job array have in common; empty outside of one."""
    return os.environ.get("SLURM_ARRAY_JOB_ID", "") if place_in_array()[1] > 1 else ""


def processes_on_this_machine(process: Process) -> int:
    """How many of the processes share this machine's cores, as the launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        if name in os.environ:
            return int(os.environ[name].split("(")[0].split(",")[0])
    return process.world_size


def resolve_device(requested: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        ConfigError: A GPU is asked for, by config or by the Slurm allocation, and none is usable.
    """
    import torch

    available = torch.cuda.is_available()
    if requested == "cpu":
        return "cpu"
    if available:
        return "cuda"
    allocated = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_JOB_GPUS")
    if requested == "cuda" or allocated:
        why = "launch.device=cuda" if requested == "cuda" else f"the job was given GPUs ({allocated})"
        raise ConfigError(
            f"{why}, but PyTorch {torch.__version__} finds no usable GPU on {socket.gethostname()}; "
            "install a CUDA build of PyTorch and check nvidia-smi, or set launch.device=cpu"
        )
    return "cpu"


def init_process_group(process: Process, device: str, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Joins the processes: NCCL for gradients on GPU, gloo on CPU; MASTER_ADDR and MASTER_PORT say where."""
    import torch
    import torch.distributed as dist

    if process.world_size > 1 and "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"MASTER_PORT is not set for {process.world_size} processes; "
            "start them with `electra`, torchrun or the scripts in slurm/"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.update(RANK=str(process.rank), LOCAL_RANK=str(process.local_rank), WORLD_SIZE=str(process.world_size))
    if device == "cuda":
        visible = torch.cuda.device_count()
        if 1 < visible <= process.local_rank:
            raise ConfigError(
                f"process {process.local_rank} of this machine finds {visible} GPUs; start one process per GPU"
            )
        index = process.local_rank if visible > 1 else 0  # Slurm may show each task its own GPU only
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the device
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_meet(process, timeout),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
    )


def _meet(process: Process, timeout: timedelta) -> Any:
    """The store through which the processes find each other; one process needs no port for that."""
    import torch.distributed as dist

    timeout = min(timeout, _LONGEST_RENDEZVOUS)
    if process.world_size == 1:
        return dist.HashStore()
    if LISTENER in os.environ:
        store: Any = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            process.world_size,
            is_master=True,
            timeout=timeout,
            master_listen_fd=int(os.environ.pop(LISTENER)),
        )
    else:
        store = next(dist.rendezvous("env://", process.rank, process.world_size, timeout=timeout))[0]
    # torchrun's store outlives the processes: the keys of the variant before would still be in it.
    return dist.PrefixStore(f"electra/{os.environ.get(RENDEZVOUS, '')}", store)


def own_port(number: int) -> dict[str, str]:
    """MASTER_PORT for one of several meetings of the same ranks, far from those of neighbouring jobs.

    At the port of the meeting before, whose rank 0 may still be leaving, a fast rank would wait for nobody. The first
    one, 0, has the port that was given; torchrun's store serves all of them at its own.
    """
    if not number or "MASTER_PORT" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return {}
    place = int(os.environ["MASTER_PORT"]) - FIRST_PORT + number * _PORT_STRIDE
    return {"MASTER_PORT": str(FIRST_PORT + place % NUM_PORTS)}


def exit_when_told_to_stop() -> None:
    """While a process is still importing, nothing is there to save: it may exit at once, to be started again."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(StoppedEarly.exit_code))


def ignore_stop_signals() -> None:
    """From here on the process ends by itself; a signal would only change its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_together(patience_s: float) -> None:
    """Waits until every process is ready to exit: Slurm ends the others after the first one's exit."""
    import torch.distributed as dist

    ignore_stop_signals()
    if not dist.is_initialized():
        return

    def wait() -> None:
        with suppress(RuntimeError):  # a process that is gone cannot be waited for
            dist.monitored_barrier(Control.host_group, timedelta(seconds=patience_s))

    # Only rank 0's barrier keeps to the time that it is given; that of the others is the group's, which may be days.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(patience_s + 1)
    if not waiting.is_alive():
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Ends this process with that code, also where it has left a collective behind that nobody will finish.

    gloo's threads may still hold tensors; at the interpreter's end that aborts the process now and then, in place of
    its exit code (PyTorch's pull request 179291 tells how), and to destroy the group is to wait for those gone.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_peer(error: RuntimeError, process: Process, step: int) -> PeerLostError | None:
    """What an error of a collective means when another process has gone; None for any other error."""
    import torch.distributed as dist

    text = (str(error).strip() or repr(error)).splitlines()[0]
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    host = socket.gethostname()
    return PeerLostError(f"rank {process.rank} on {host}: another process is gone, noticed in step {step:,} ({text})")


class Control:
    """What processes agree on, over gloo."""

    host_group: Any = None
    """The gloo group beside NCCL; None means the default group, which is gloo on CPU."""

    def __init__(self, device: str, timeout: timedelta = timedelta(minutes=30)):
        """Call after ``init_process_group``."""
        import torch.distributed as dist

        self._dist = dist
        group: Any = dist.new_group(backend="gloo", timeout=timeout) if device == "cuda" else None
        self._group = Control.host_group = group
        self.world_size = dist.get_world_size()
        self.is_first = dist.get_rank() == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the processes, the same bits on each."""
        import torch

        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensor(self, values: Any) -> Any:
        """Sum of a float64 CPU tensor over the processes, in rank order: the same bits on each, every time."""
        import torch

        if self.world_size == 1:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        self._dist.all_gather(gathered, values, group=self._group)
        return torch.stack(gathered).sum(0)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, any picklable object, on every process."""
        box = [value]
        if self.world_size > 1:
            self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, any picklable object, in rank order on every process."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self._dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Waits for every process."""
        self.sum([0.0])
