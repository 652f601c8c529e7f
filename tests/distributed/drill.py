"""The real command in the background, its processes found by a mark in their environment, to be killed in tests."""

import hashlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import OPTIMIZER, WEIGHTS, step_folder
from pipeline.journal import read_entries, without_volatile
from tests.conftest import REPOSITORY, Electra, clean_environment, command

_MARK = "ELECTRA_DRILL"
_POLL_S = 0.005


def zero(stage: int) -> str:
    """The override that chooses a ZeRO stage."""
    return f"deepspeed.config={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


class Drill:
    """One command line, started as often as it takes; a context that leaves no process behind.

    Attributes:
        folder: Of the run's pretrain stage.
        log: Everything the processes said.
        arguments: Of the command.
        fault: The value of ``ELECTRA_FAULT``.
    """

    def __init__(self, config: Path, name: str, *overrides: object, fault: str = "", forks: bool = False):
        """``run.dir`` is ``out`` beside the config.

        With ``forks`` the command forks its ranks: it starts slowly itself, and each time its ranks start takes a
        second in place of eight.
        """
        self.folder = config.parent / "out" / "runs" / name / "pretrain"
        self.log = config.parent / f"{name}.log"
        self.arguments, self.fault = ["run", str(config), f"run.name={name}", *map(str, overrides)], fault
        self._command = command(*self.arguments, forks=forks)
        self._mark = uuid.uuid4().hex
        self._environment = clean_environment(**{_MARK: self._mark, "ELECTRA_FAULT": fault})
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Drill":
        return self.start()

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            kill(pid)
        if self._process:
            self._process.wait()

    def start(self) -> "Drill":
        """Starts the command."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        return self

    @property
    def command_pid(self) -> int:
        """Process id of the command itself."""
        assert self._process
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        assert self._process
        return self._process.poll()

    def wait(self, timeout_s: float = 400) -> int:
        """Waits for its end; returns the exit code."""
        assert self._process
        return self._process.wait(timeout_s)

    @property
    def said(self) -> str:
        """What the processes have said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that lives."""
        found = {}
        for pid in _children(self.command_pid):
            rank = _rank(pid)
            if rank is not None and _lives(pid):
                found[rank] = pid
        return found

    def processes(self) -> list[int]:
        """All living processes that came from this command, whoever is their parent now."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if _variables(pid).get(_MARK) == self._mark and _lives(pid)]

    def left_over(self, patience_s: float = 10) -> list[int]:
        """What still lives so long after the command's end; a helper that sees its pipe closed needs a moment."""
        deadline = time.monotonic() + patience_s
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return pids

    @property
    def attempt(self) -> tuple[int, int]:
        """Number of the newest attempt that has begun training and its step; (0, 0) before the first."""
        for path in sorted(self.folder.glob("goodput/attempt_*.json"), reverse=True):
            try:
                account = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # it is starting
                continue
            return account["number"], account["step"]
        return 0, 0

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any(self.folder.glob("checkpoints/.tmp-*"))

    def until(self, condition: Callable[[], Any], timeout_s: float = 400) -> bool:
        """Waits for a condition; False when the command has ended before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.code is not None:
                return False
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(_POLL_S)
        return True

    def until_step(self, step: int, after_attempt: int = 0) -> bool:
        """Waits until an attempt after ``after_attempt`` has made a step; False when the command has ended before."""
        return self.until(lambda: self.attempt[0] > after_attempt and self.attempt[1] >= step)

    def journal(self) -> list[dict[str, Any]]:
        """Entries that two equal runs have in common."""
        return [without_volatile(entry) for entry in read_entries(self.folder / "journal.jsonl")]

    def digest(self, step: int) -> str:
        """SHA-256 over the bytes of weights and moments of a checkpoint."""
        folder = step_folder(self.folder / "checkpoints", step)
        return hashlib.sha256((folder / WEIGHTS).read_bytes() + (folder / OPTIMIZER).read_bytes()).hexdigest()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("checkpoints/step_????????"))


def run(drill: Drill, code: int = 0, timeout_s: float = 400) -> Drill:
    """Runs a command to its end, which has the exit code that is expected and leaves no process."""
    with drill:
        assert drill.wait(timeout_s) == code, drill.said[-3000:]
        assert not drill.left_over()
    assert "Traceback" not in drill.said, drill.said[-3000:]
    return drill


def run_forked(electra: Electra, drill: Drill, code: int = 0) -> Drill:
    """The same in a fork of what has imported everything: for runs whose processes nobody looks for from outside."""
    done = electra(*drill.arguments, code=code, ELECTRA_FAULT=drill.fault)
    drill.log.write_text(done.stdout + done.stderr, encoding="utf-8")
    assert "Traceback" not in drill.said, drill.said[-3000:]
    return drill


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Sends a signal; whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _rank(pid: int) -> int | None:
    """By its environment, or by its name where it was forked."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None
    rank = name.removeprefix("rank ") if name.startswith("rank ") else _variables(pid).get("RANK", "")
    return int(rank) if rank.isdigit() else None


def _variables(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
