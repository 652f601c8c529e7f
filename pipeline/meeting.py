"""Processes that find each other through a store and tell each other things, before there is any group.

So that of what does not come, or hangs later, the rank and its node can be named.
"""

import json
import os
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.distributed import RENDEZVOUS, Process, ignore_stop_signals
from pipeline.errors import ConfigError, ElectraError
from pipeline.slurm_step import nodes_of_step

GROUP_LIMIT = timedelta(seconds=60)
"""Of a collective among processes that have met."""

ANSWER_S = 120.0
"""Patience with an answer."""

_JOIN_S = 300.0  # a cold node reads PyTorch over the network
_POLL_S = 0.05
_CLOCK_READINGS = 3
_LAST_WORD_S = 1.0  # for the others to read it
_LATER_S = 5.0  # others than rank 0 wait so much longer: it speaks for all


def node_name() -> str:
    """As Slurm knows this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Meeting:
    """The processes, and what they tell each other through a store before there is any group; a context.

    The store is rank 0's, which therefore leaves last. From when the end is known no signal counts: with the first
    task's exit srun ends the others, and would report that in place of the program's own code.

    Attributes:
        nodes: Of each rank.
    """

    def __init__(self, process: Process, patience_s: float = _JOIN_S):
        """Waits for all of them.

        Raises:
            ElectraError: Not all have come in time; says which.
        """
        self.process, self.nodes = process, [""] * process.world_size
        self._store = _connect(process, patience_s)
        self.nodes = self.exchange("joining", node_name(), patience_s)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            ignore_stop_signals()
            world_size = self.process.world_size
            self._store.set(f"leaving/{self.process.rank}", "")
            if self.process.rank == 0:
                self._await([f"leaving/{rank}" for rank in range(world_size)], ANSWER_S)

    def _await(self, keys: list[str], patience_s: float) -> None:
        """Until all are there, or patience is at its end; a wait of torch's own would complain in the log."""
        deadline = time.monotonic() + patience_s
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def exchange(self, topic: str, value: Any, patience_s: float = ANSWER_S) -> list[Any]:
        """Every process's value, JSON types, in rank order; rank 0 collects and passes them on.

        Raises:
            ElectraError: A process has not answered in time; on rank 0 it says which.
        """
        rank, ranks = self.process.rank, range(self.process.world_size)
        self._store.set(f"{topic}/{rank}", json.dumps(value))
        if rank == 0:
            keys = [f"{topic}/{other}" for other in ranks]
            self._await(keys, patience_s)
            silent = [other for other, key in enumerate(keys) if not self._store.check([key])]
            values = None if silent else [json.loads(text) for text in self._store.multi_get(keys)]
            self._store.set(f"{topic}/all", json.dumps(values))
            if values is None:
                ignore_stop_signals()
                time.sleep(_LAST_WORD_S)
                raise self._silence(topic, silent, patience_s)
            return values
        try:
            self._store.wait([f"{topic}/all"], timedelta(seconds=patience_s + _LATER_S))
            values = json.loads(self._store.get(f"{topic}/all"))
        except dist.DistError as error:
            raise ElectraError(
                f"rank {rank} on {node_name()}: rank 0 has not answered while {topic} ({error})"
            ) from None
        if values is None:
            ignore_stop_signals()
            raise ElectraError("")  # rank 0 says it
        return values

    def clock_offsets_s(self) -> list[float]:
        """Of each rank's node from the median of all, in seconds."""
        readings = []
        for number in range(_CLOCK_READINGS):
            self.exchange(f"setting clocks, {number}", None)  # all are released at once, within milliseconds
            times = self.exchange(f"reading clocks, {number}", time.time())
            middle = statistics.median_low(times)
            readings.append([seconds - middle for seconds in times])
        return [min(own, key=abs) for own in zip(*readings, strict=True)]  # who came late once has no other clock

    def name(self, ranks: Iterable[int]) -> str:
        """Ranks with their nodes, for people."""
        ranks_of: dict[str, list[int]] = {}
        for rank in ranks:
            ranks_of.setdefault(self.nodes[rank], []).append(rank)
        return ", ".join(
            f"{node} (rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))})" if node else f"ranks {own}"
            for node, own in ranks_of.items()
        )

    def _silence(self, topic: str, silent: list[int], patience_s: float) -> ElectraError:
        if self.nodes[0]:
            return ElectraError(f"no answer for {patience_s:.0f} s while {topic}: {self.name(silent)}; look at its log")
        there = {json.loads(self._store.get(f"{topic}/{rank}")) for rank in range(self.process.world_size)
                 if rank not in silent}  # fmt: skip
        absent = ", ".join(sorted(set(nodes_of_step()) - there))
        shown = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
        return ElectraError(
            f"{len(silent)} of {self.process.world_size} processes have not come within {patience_s:.0f} s: rank "
            f"{shown}{'; no sign of ' if absent else ''}{absent}; see their log, and whether they reach "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, or leave those nodes out with sbatch --exclude"
        )


def _connect(process: Process, patience_s: float) -> Any:
    if process.world_size == 1:
        return dist.HashStore()
    if "MASTER_PORT" not in os.environ:
        raise ConfigError(
            f"MASTER_PORT is not set for {process.world_size} processes; start them by slurm/acceptance.sh or torchrun"
        )
    address, port = os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    hosts = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=patience_s)
    try:  # multi_tenant: torch's own rendezvous will find the server of this process, and share it
        store = dist.TCPStore(address, port, None, hosts, limit, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        what = "cannot listen at" if hosts else "does not reach rank 0 at"
        raise ElectraError(
            f"rank {process.rank} on {node_name()} {what} {address}:{port} within {patience_s:.0f} s "
            f"({str(error).splitlines()[0]}); see whether rank 0 has started, and ELECTRA_MASTER_ADDR in slurm/site.env"
        ) from None
    return dist.PrefixStore(f"acceptance/{os.environ.get(RENDEZVOUS, '')}", store)


@contextmanager
def collective(process: Process, what: str) -> Iterator[None]:
    """In here a collective that fails is the cluster's fault.

    Raises:
        ElectraError: In place of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ElectraError(
            f"rank {process.rank} on {node_name()}: {what}: {str(error).strip().splitlines()[0]}; see "
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in slurm/site.env, and set NCCL_DEBUG=INFO"
        ) from None


def appears(path: Path, content: str, deadline: float) -> bool:
    """Whether a file that another node has written is seen from here, with that content, before the deadline.

    Args:
        path: Of the file.
        content: All of it.
        deadline: By ``time.monotonic``, in seconds.
    """
    while True:
        with suppress(OSError):
            os.listdir(path.parent)  # has NFS look again
            if path.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
