"""Faults on purpose, for tests and for users' drills.

    ELECTRA_FAULT="kill@step=37,rank=1,phase=save"
    ELECTRA_FAULT="nan@step=5-8,rank=0; slow@rank=1,phase=data,seconds=0.5"

Off unless the variable is set; announced when it is. A condition that is left out holds always, but for the phase,
which is the one that the kind belongs to. Steps count as in the log: step 37 is the one that makes the 37th update.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipeline.errors import ConfigError
from pipeline.log import logger

VARIABLE = "ELECTRA_FAULT"

Kind = Literal["kill", "hang", "slow", "nan", "flip", "full", "memory"]
Phase = Literal["start", "data", "exchange", "step", "log", "held_out", "save", "write", "publish", "stop"]
"""Parts of a training. start: before the first step. data: making a step's rows. exchange: its denominators. step: its
passes and update. log: its line in the journal. held_out: scoring. save: before the state is copied for a checkpoint.
write, publish: in the background, when half of its bytes are on disk, and before the rename that makes it one. stop:
all that follows being told to."""

_OWN_PHASE: dict[Kind, Phase] = {
    "kill": "step",
    "hang": "step",
    "slow": "step",
    "nan": "step",
    "flip": "step",
    "full": "write",
    "memory": "step",
}
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: kill (SIGKILL), hang (sleeps for ever), slow (sleeps), nan (in the losses), flip (a bit of a weight),
            full (no space left), memory (the device's is exhausted).
        phase: Where in a step.
        steps: First and last step; None: any.
        rank: None: any.
        attempt: How often the stage was started, from 1; None: any.
        seconds: How long ``slow`` sleeps.
    """

    kind: Kind
    phase: Phase
    steps: tuple[int, int] | None = None
    rank: int | None = None
    attempt: int | None = None
    seconds: float = 1.0

    def holds(self, phase: Phase, step: int, rank: int, attempt: int) -> bool:
        """Whether it strikes here."""
        return (
            phase == self.phase
            and (self.steps is None or self.steps[0] <= step <= self.steps[1])
            and self.rank in (None, rank)
            and self.attempt in (None, attempt)
        )


def parse_faults(text: str) -> list[Fault]:
    """The faults of ``ELECTRA_FAULT``.

    Raises:
        ConfigError: One cannot be understood.
    """
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    kind, _, conditions = text.partition("@")
    if kind not in get_args(Kind):
        raise ConfigError(f"{VARIABLE}={text!r}: {kind!r} is none of {', '.join(get_args(Kind))}")
    fault = Fault(kind, _OWN_PHASE[kind])  # type: ignore[arg-type,index]
    for condition in filter(None, conditions.split(",")):
        key, _, value = condition.strip().partition("=")
        try:
            fault = replace(fault, **_parse_condition(key, value))
        except (ValueError, KeyError):
            raise ConfigError(
                f"{VARIABLE}: {condition.strip()!r} is not one of step=N, step=N-M, rank=N, attempt=N, seconds=X, "
                f"phase={'|'.join(get_args(Phase))}"
            ) from None
    if kind in ("nan", "flip") and fault.phase != "step":
        raise ConfigError(f"{VARIABLE}={text!r}: {kind} strikes in phase=step only")
    return fault


def _parse_condition(key: str, value: str) -> dict:
    if key == "step":
        first, _, last = value.partition("-")
        return {"steps": (int(first), int(last or first))}
    if key == "phase":
        return {"phase": {phase: phase for phase in get_args(Phase)}[value]}
    return {key: {"rank": int, "attempt": int, "seconds": float}[key](value)}


class Faults:
    """The faults that this process was asked to commit."""

    def __init__(self, rank: int, attempt: int, text: str | None = None):
        """``text`` by default from the environment."""
        self._rank, self._attempt = rank, attempt
        self._faults = parse_faults(os.environ.get(VARIABLE, "") if text is None else text)
        if self._faults and rank == 0:
            logger.warning("%s=%s: this run will be damaged on purpose", VARIABLE, os.environ.get(VARIABLE, text))

    def strike(self, phase: Phase, step: int) -> set[Kind]:
        """Commits what is due here; returns the kinds of what was due.

        Raises:
            OSError: ``full``.
            torch.OutOfMemoryError: ``memory``.
        """
        struck: set[Kind] = set()
        for fault in self._faults:
            if fault.holds(phase, step, self._rank, self._attempt):
                logger.warning("%s: %s in phase %s of step %d", VARIABLE, fault.kind, phase, step)
                struck.add(fault.kind)
                _commit(fault)
        return struck


def _commit(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({VARIABLE})")
    if fault.kind == "memory":
        import torch

        raise torch.OutOfMemoryError(f"tried to allocate more than there is ({VARIABLE})")
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    while fault.kind == "hang":
        time.sleep(_HOUR_S)
