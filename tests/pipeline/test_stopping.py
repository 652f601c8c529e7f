"""What asks a process to stop: a signal, a clock, the job's time limit, a file."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import stopping
from pipeline.distributed import STOP_SIGNALS
from pipeline.stopping import JOB_END, StopRequest


@pytest.fixture(autouse=True)
def _handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_the_reason(number: signal.Signals) -> None:
    stop = StopRequest()
    assert stop.reason() is None
    os.kill(os.getpid(), number)
    assert stop.reason() == number.name
    assert not stop.is_held


def test_time_in_this_attempt_is_a_reason() -> None:
    assert StopRequest(after_seconds=100).reason() is None
    stop = StopRequest(after_seconds=0.05)
    time.sleep(0.06)
    assert stop.reason() == "train.stop_after_seconds=0.05"


def test_the_jobs_time_limit_is_a_reason_a_while_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_END, f"{time.time() + 100:.0f}")
    assert StopRequest(before_limit_seconds=90).reason() is None
    assert StopRequest(before_limit_seconds=110).reason() == "less than 110 s before the job's time limit"
    assert StopRequest().reason() is None  # whose business it is not
    monkeypatch.delenv(JOB_END)
    assert StopRequest(before_limit_seconds=110).reason() is None


def test_a_file_is_a_reason_that_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "STOP"
    stop = StopRequest(file=file)
    assert stop.reason() is None
    file.touch()
    assert stop.reason() is None  # storage is not asked at every step
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_LOOKS", 0.0)
    other = StopRequest(file=tmp_path / "nothing")
    assert other.reason() is None and not other.is_held
    asked = StopRequest(file=file)
    assert asked.reason() == f"{file} is there: remove it to go on"
    file.unlink()
    assert asked.reason() and asked.is_held  # all stop at one step, whatever happens to the file meanwhile


def test_a_file_system_that_does_not_answer_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "exists", fail)
    assert StopRequest(file=tmp_path / "STOP").reason() is None
