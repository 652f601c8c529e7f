"""Where the seconds of a run's allocations went: every one belongs to exactly one class.

    <run>/pretrain/goodput/attempt_0003.json    one for each start of the stage, by its first process

The first process keeps its file up to date at every step, by one write into the page cache, which survives a
``kill -9``. What lies between the end of an attempt and the start of the next one in the same allocation was lost
to the failure. Time between allocations belongs to the queue, and is not counted.

    python -m pipeline.goodput CODE CONFIG [key=value ...]      a job script's last word: the ranks ended with CODE
"""

import errno
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pipeline.log import logger

Class = Literal[
    "startup", "restore", "productive", "replayed", "data", "checkpoint", "evaluation", "overhead", "drain", "down"
]
"""startup: until the first step, imports included. restore: finding, verifying and reading a checkpoint. productive:
passes and updates. replayed: steps that an earlier attempt had made. data: waiting for rows. checkpoint: copying the
state or waiting for that, and for the write before. evaluation: held-out rows. overhead: exchanges and the journal.
drain: from being told to stop to the end. down: from a failure to the next start, or to the allocation's end."""

CLASSES: tuple[Class, ...] = get_args(Class)
_ALLOCATION = "ELECTRA_ALLOCATION"
_FILE_BYTES = 2048
_ENDED_WELL = (0, 85)  # done, or stopped with everything saved


@dataclass
class Attempt:
    """One start of the stage.

    Attributes:
        number: Counts the stage's starts.
        allocation: Id of the Slurm job's start, or of the command; attempts of one share it.
        began_unix_s: Where its first second begins: at the allocation's begin, or at the end of the attempt before.
        seen_unix_s: Until when it is known to have lived.
        first_step: Where it went on.
        step: How far it came.
        lineage: Of the stage's attempts; those of another one made other steps.
        seconds: By class.
    """

    number: int
    allocation: str
    began_unix_s: float
    seen_unix_s: float
    first_step: int = 0
    step: int = 0
    lineage: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))


class Ledger:
    """Keeps one attempt's account; on other ranks than the first it writes nothing."""

    def __init__(self, folder: Path | None, number: int, lineage: str = ""):
        """``folder`` is the stage's; None: nothing is written. All time since the allocation's begin is start-up."""
        earlier = read_attempts(folder) if folder else []
        self._highest_step = max((attempt.step for attempt in earlier if attempt.lineage == lineage), default=0)
        allocation, _, allocated = os.environ.get(_ALLOCATION, "").partition("@")
        now, process_began = time.time(), time.time() - _seconds_since_exec()
        before = [attempt for attempt in earlier if allocation and attempt.allocation == allocation]
        # No later than this process began, whatever was done to the clock since.
        began = min(before[-1].seen_unix_s if before else float(allocated or process_began), process_began)
        number = max([number, *(attempt.number + 1 for attempt in earlier)])  # other inputs count from 1 again
        self._attempt = Attempt(number, allocation or f"{os.getpid()}-{now:.0f}", began, now, lineage=lineage)
        self._attempt.seconds["down"] = max(0.0, process_began - began) if before else 0.0
        self._attempt.seconds["startup"] = now - began - self._attempt.seconds["down"]
        self._last, self._class = time.monotonic(), "startup"
        self._file, self._fails = -1, False
        if folder:
            path = folder / "goodput" / f"attempt_{number:04d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def enter(self, what: Class) -> None:
        """The time since the last call belonged to the class that was entered then; from now on it is another's."""
        now = time.monotonic()
        self._attempt.seconds[self._class] += now - self._last
        self._attempt.seen_unix_s += now - self._last
        self._last, self._class = now, what

    def enter_step(self, what: Class, step: int) -> None:
        """``enter`` for a part of a step, which counts as replayed if an earlier attempt has made that step."""
        self.enter("replayed" if step <= self._highest_step else what)

    def reached(self, step: int, is_first: bool = False) -> None:
        """A step is behind us; what is known so far survives a kill."""
        self._attempt.step = step
        if is_first:
            self._attempt.first_step = step
        self.write()

    def write(self) -> None:
        """Brings the file up to date."""
        self.enter(self._class)  # type: ignore[arg-type]
        if self._file < 0:
            return
        try:
            _write(self._file, self._attempt)
        except OSError as error:
            if not self._fails:
                logger.warning("goodput/attempt_%04d.json: %s; tried again at each step", self._attempt.number, error)
            self._fails = True
        else:
            self._fails = False

    @property
    def startup_s(self) -> float:
        """Seconds until the first step, restoring included."""
        return self._attempt.seconds["startup"] + self._attempt.seconds["restore"]

    @property
    def productive_pct(self) -> float:
        """Share of this attempt's seconds in passes and updates that count."""
        return 100 * self._attempt.seconds["productive"] / max(1e-9, sum(self._attempt.seconds.values()))


def begin_allocation(other_s: float = 0.0) -> dict[str, str]:
    """Environment for the processes of this command, unless a Slurm script has begun the allocation already.

    ``other_s``: seconds that the command has spent on other stages.
    """
    if _ALLOCATION in os.environ:
        return {}
    return {_ALLOCATION: f"{os.getpid()}-{time.time():.0f}@{time.time() - _seconds_since_exec() + other_s:.3f}"}


def begin_part(name: str) -> dict[str, str]:
    """Environment for one of several runs in turn in an allocation: what was before it is the others' account."""
    allocation = allocation_id()
    return {_ALLOCATION: f"{allocation}-{name}@{time.time():.3f}"} if allocation else {}


def allocation_id() -> str:
    """Of the Slurm job's start or the command that this process belongs to; empty when nothing has begun one."""
    return os.environ.get(_ALLOCATION, "").partition("@")[0]


def end_allocation(*folders: Path, code: int = 0) -> None:
    """The processes have ended: what has passed since the last sign of them went into ending, or into a failure.

    Args:
        folders: Of the stage; several, where the allocation made several runs in turn.
        code: Exit code of the processes.
    """
    name = os.environ[_ALLOCATION].partition("@")[0]
    folder = folders[0]
    try:
        attempts = [(attempt, folder) for folder in folders for attempt in read_attempts(folder)]
        own = [pair for pair in attempts if pair[0].allocation == name or pair[0].allocation.startswith(f"{name}-")]
        if own:  # else none got so far as to keep an account
            (last, folder), now = max(own, key=lambda pair: pair[0].seen_unix_s), time.time()
            last.seconds["drain" if code in _ENDED_WELL else "down"] += max(0.0, now - last.seen_unix_s)
            last.seen_unix_s = max(now, last.seen_unix_s)
            with open(folder / "goodput" / f"attempt_{last.number:04d}.json", "r+b") as file:
                _write(file.fileno(), last)
    except OSError as error:  # changes nothing about how the run has ended
        logger.warning("%s: the account lacks the last seconds (%s)", folder / "goodput", error)


def _write(file: int, attempt: Attempt) -> None:
    """In place: a file keeps its room on a disk that is full by now."""
    text = json.dumps(asdict(attempt)).ljust(_FILE_BYTES).encode()
    if os.pwrite(file, text, 0) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts of a stage, in order; one whose file was never written is left out."""
    found = []
    for path in sorted(folder.glob("goodput/attempt_*.json")):
        text = path.read_text(encoding="utf-8").strip()
        try:
            found += [Attempt(**json.loads(text))] if text else []
        except (ValueError, TypeError) as error:  # what a crash of the machine left of it
            logger.warning("%s: unreadable (%s); its seconds are missing in the account", path, error)
    return found


def total_seconds(attempts: list[Attempt]) -> dict[str, float]:
    """Seconds of each class over all attempts."""
    return {name: sum(attempt.seconds.get(name, 0.0) for attempt in attempts) for name in CLASSES}


def describe(attempts: list[Attempt]) -> str:
    """One line: the productive share, and what else took a thousandth or more."""
    total = total_seconds(attempts)
    whole = sum(total.values())
    if not whole:
        return "nothing yet"
    others = sorted((item for item in total.items() if item[0] != "productive"), key=lambda item: -item[1])
    shown = [f"{name} {seconds:,.0f} s" for name, seconds in others if seconds >= whole / 1000]
    return (
        f"{100 * total['productive'] / whole:.1f} % of {whole:,.0f} s in {len(attempts)} attempts productive; "
        + ", ".join(shown)
    )


def _seconds_since_exec() -> float:
    """Age of this process; where the system does not tell, 0."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _main(code: str, config: str, *overrides: str) -> None:
    from pipeline.config_file import load_configs
    from pipeline.errors import ElectraError
    from pipeline.stages import stage_folder

    try:
        runs = load_configs(config, overrides)
    except ElectraError as error:  # CONFIG was changed since
        sys.exit(str(error))
    end_allocation(*(stage_folder(run, "pretrain") for run in runs), code=int(code))


if __name__ == "__main__":
    _main(*sys.argv[1:])
