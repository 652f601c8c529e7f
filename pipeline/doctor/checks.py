"""What a check says, and asking in such a way that nothing hangs and nothing fails without a word."""

import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.errors import FORESEEN

State = Literal["ok", "warning", "failure"]
SEVERITY: tuple[State, ...] = get_args(State)
"""States, the worst last."""

LIMIT_S = 30.0
"""Longest that a check may take: a file system that does not answer would hold it for ever."""

_OF_SILENCE = "see whether what it asks (a file system, a server, a driver) answers on that node, or leave the node out"
_OF_ERROR = "mend what it names; `electra doctor --debug` shows where it came from"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Check:
    """One thing that was asked on one node.

    Attributes:
        name: What.
        state: ``warning`` fails nothing.
        value: What was found, with units.
        remedy: What to do about it; empty where nothing is to be done.
        difference: State of a node whose value is not the others'; ``ok``: it may be another.
    """

    name: str
    state: State
    value: str
    remedy: str = ""
    difference: State = "ok"


def ok(name: str, value: str, difference: State = "ok") -> Check:
    """Nothing is wrong."""
    return Check(name, "ok", value, difference=difference)


def warning(name: str, value: str, remedy: str) -> Check:
    """Something may go wrong."""
    return Check(name, "warning", value, remedy)


def failure(name: str, value: str, remedy: str) -> Check:
    """A run would fail, or be wrong."""
    return Check(name, "failure", value, remedy)


def ask(
    name: str, question: Callable[..., Iterable[Check]], *arguments: Any, limit_s: float = LIMIT_S, debug: bool = False
) -> list[Check]:
    """What a question yields; a failure in its name if it raises, or does not end in time.

    It runs in a thread, which is left behind if it does not end: nobody can end a call that the kernel holds.
    """
    found: list[Check] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for check in question(*arguments):
                found.append(check)
        except (Exception, SystemExit) as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    answers = found.copy()
    if thread.is_alive():
        answers.append(failure(name, f"no answer within {limit_s:.0f} s", _OF_SILENCE))
    for error in errors:
        if debug:
            raise error
        answers.append(of_error(name, error))
    return answers


def of_error(name: str, error: BaseException) -> Check:
    """The failure that an error makes: its first line; a foreseen one says itself what to do."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, FORESEEN):
        problem, semicolon, remedy = " ".join(lines).rpartition("; ")
        return failure(name, problem, remedy) if semicolon else failure(name, remedy, "")
    if isinstance(error, OSError) and error.strerror:
        lines = [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    return failure(name, lines[0], _OF_ERROR)


class CallError(Exception):
    """A program has not done what it was asked for; the message says why."""


def call(*command: str, limit_s: float = 10.0, **options: Any) -> str:
    """Standard output of a program.

    Raises:
        CallError: It is absent, fails, or does not end in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, **options)
    except subprocess.TimeoutExpired:
        raise CallError(f"{command[0]} has not answered within {limit_s:.0f} s") from None
    except OSError as error:
        raise CallError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = said[-1].removeprefix(f"{command[0]}: ") if said else f"exit code {done.returncode}"
        raise CallError(f"{command[0]}: {reason}")
    return done.stdout


def size(num_bytes: float) -> str:
    """Bytes for people, in two digits or three: nodes that differ by less say the same."""
    unit = 0
    while num_bytes >= 1000 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.{0 if num_bytes >= 10 or not unit else 1}f} {_UNITS[unit]}"
