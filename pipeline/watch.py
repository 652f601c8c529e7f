"""Whether all processes live and get on, told by heartbeats through the store by which they found each other.

    every rank, in a thread ──"node n2, step 37, phase save, mark 412"──▶ store, with rank 0 ──▶ rank 0 judges
                                                                                               all ranks end

Two things end a stage: a process that gives no sign of life for ``launch.peer_timeout_seconds`` (killed, stopped, its
machine gone), and none getting on for ``launch.hang_timeout_seconds`` although all live. A collective that waits for
the lost one would wait for its own time limit, half an hour and more.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.distributed import Process
from pipeline.errors import PeerLostError
from pipeline.log import logger

_LONGEST_INTERVAL_S = 5.0
_BEATS_IN_TIMEOUT = 6
_VERDICT = "verdict"
_DUMP_S = 10.0  # most that stacks may take to write


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        node: Host name.
        number: Counts the beats.
        marks: Counts the phases entered; the same on all ranks that are equally far.
        step: Of the training.
        phase: What the process is at.
    """

    node: str
    number: int
    marks: int
    step: int
    phase: str


class Watch:
    """A process's own beats, and on rank 0 the judgement of all; a context, in which it is active."""

    def __init__(
        self,
        process: Process,
        store: Any,
        peer_timeout_s: float,
        hang_timeout_s: float,
        stacks: Path,
        end: Callable[[str], None] | None = None,
    ):
        """Makes the first beat.

        Args:
            process: This one.
            store: A ``torch.distributed`` store that nobody else uses from here; None for a process alone.
            peer_timeout_s: Longest silence.
            hang_timeout_s: Longest stand-still.
            stacks: Folder for stack dumps.
            end: What ends this process with a reason; by default at once, with its stacks dumped.
        """
        self._process, self._store, self._stacks = process, store, stacks
        self._peer_timeout_s, self._hang_timeout_s = peer_timeout_s, hang_timeout_s
        self._end = end or self._dump_and_exit
        self._beat = Beat(socket.gethostname(), 0, 0, 0, "start")
        self._over, self._verdict = threading.Event(), ""
        now = time.monotonic()
        self._first, self._answered_at = self._beat, now  # rank 0's newest beat, and when it came
        self._judged_at = now
        self._seen: dict[int, tuple[Beat, float, float]] = {}  # beat, when its number rose, when its marks rose
        if store is not None:
            store.set(self._key(process.rank), json.dumps(asdict(self._beat)))
            store.wait([self._key(rank) for rank in range(process.world_size)])
            self._first = Beat(**json.loads(store.get(self._key(0))))

    def mark(self, phase: str, step: int) -> None:
        """The training thread enters a phase; all ranks enter the same ones in the same order."""
        old = self._beat
        self._beat = Beat(old.node, old.number, old.marks + 1, step, phase)

    def __enter__(self) -> "Watch":
        for work in (self._exchange, self._guard):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    @property
    def _interval_s(self) -> float:
        return min(_LONGEST_INTERVAL_S, self._peer_timeout_s / _BEATS_IN_TIMEOUT)

    def _exchange(self) -> None:
        """Beats, and hears rank 0's verdict; every call may wait for ever."""
        number = 0
        while not self._over.wait(self._interval_s):
            number += 1
            beat = asdict(self._beat) | {"number": number}
            try:
                beats = self._pass_on(beat)
                if self._process.rank == 0:
                    self._verdict = self._verdict or self._judge(beats)
                    if self._verdict and self._store is not None:
                        self._store.set(_VERDICT, self._verdict)
            except RuntimeError as error:  # of the store: its process has ended
                reason = (str(error) or repr(error)).splitlines()[0]
                self._verdict = self._verdict or f"{_name(0, self._first)} cannot be reached any more ({reason})"

    def _pass_on(self, beat: dict[str, Any]) -> dict[int, Beat]:
        """Beats; returns everybody's on rank 0, and elsewhere takes over the verdict."""
        if self._store is None:
            self._hear(Beat(**beat))
            return {0: self._first}
        self._store.set(self._key(self._process.rank), json.dumps(beat))
        if self._process.rank != 0:
            self._hear(Beat(**json.loads(self._store.get(self._key(0)))))
            if self._store.check([_VERDICT]):
                self._verdict = self._store.get(_VERDICT).decode()
            return {}
        ranks = range(self._process.world_size)
        found = self._store.multi_get([self._key(rank) for rank in ranks])
        beats = {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}
        self._hear(beats[0])
        return beats

    def _hear(self, first: Beat) -> None:
        """Rank 0 has answered if its beat is a new one: torchrun's store answers also when rank 0 does not."""
        if first.number != self._first.number:
            self._first, self._answered_at = first, time.monotonic()

    def _judge(self, beats: dict[int, Beat]) -> str:
        """What is wrong, or nothing."""
        now = time.monotonic()
        gap_s, self._judged_at = now - self._judged_at, now
        if gap_s > self._peer_timeout_s / 2:  # this process was suspended, and the others may have been
            self._seen = {
                rank: (beat, lived + gap_s, moved + gap_s) for rank, (beat, lived, moved) in self._seen.items()
            }
        for rank, beat in beats.items():
            before, lived_at, moved_at = self._seen.get(rank, (beat, now, now))
            lived_at = now if beat.number != before.number else lived_at
            moved_at = now if beat.marks != before.marks else moved_at
            self._seen[rank] = beat, lived_at, moved_at
        silent = {rank: now - lived_at for rank, (_, lived_at, _) in self._seen.items()}
        lost = [rank for rank, age_s in silent.items() if age_s > self._peer_timeout_s]
        if lost:
            return f"no sign of life for {max(silent.values()):.0f} s of {self._describe(lost)}"
        still_s = min(now - moved_at for _, _, moved_at in self._seen.values())
        if still_s > self._hang_timeout_s:
            least = min(beat.marks for beat, _, _ in self._seen.values())
            behind = [rank for rank, (beat, _, _) in self._seen.items() if beat.marks == least]
            return f"nobody got on for {still_s:.0f} s; behind are {self._describe(behind)}"
        return ""

    def _describe(self, ranks: list[int]) -> str:
        shown = [_name(rank, self._seen[rank][0]) for rank in ranks[:4]]
        return ", ".join(shown) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    def _guard(self) -> None:
        """Ends the process; touches nothing that may hang."""
        waited_at = time.monotonic()
        while not self._over.wait(self._interval_s):
            now = time.monotonic()
            if now - waited_at > self._interval_s + self._peer_timeout_s / 2:  # all of us were suspended
                self._answered_at = now
            waited_at = now
            silence_s = now - self._answered_at
            if not self._verdict and silence_s > self._peer_timeout_s:
                self._verdict = (
                    f"no answer for {silence_s:.0f} s from {_name(0, self._first)}, by which the others are heard of"
                )
            if self._verdict:
                self._end(self._verdict)
                return

    def _dump_and_exit(self, verdict: str) -> None:
        """Ends the process in seconds, whether or not the file system takes the dump."""
        exits = threading.Timer(_DUMP_S, os._exit, (PeerLostError.exit_code,))
        exits.daemon = True
        exits.start()
        try:
            sys.stderr.write(f"rank {self._process.rank} ends: {verdict}\n")  # whole, among other ranks' lines
            sys.stderr.flush()
            self._stacks.mkdir(parents=True, exist_ok=True)
            path = self._stacks / f"rank_{self._process.rank:05d}.txt"
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{verdict}\n{self._beat}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            logger.error("%s; the stacks of rank %d are in %s", verdict, self._process.rank, path)
        finally:
            os._exit(PeerLostError.exit_code)

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} on {beat.node} (step {beat.step:,}, {beat.phase})"


def own_store(process: Process, attempt: str, timeout_s: float) -> Any:
    """A connection to the rendezvous's store for a watch's use alone; None for a process alone.

    Args:
        process: This one.
        attempt: A name that no earlier meeting at this store had; torchrun's store outlives its processes.
        timeout_s: Longest wait for a key.
    """
    if process.world_size == 1:
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return dist.PrefixStore(f"electra/watch/{attempt}", store)
