"""The account of the seconds: each in one class, none twice, whatever a kill cuts off."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline import goodput
from pipeline.goodput import (
    CLASSES,
    Attempt,
    Ledger,
    begin_allocation,
    begin_part,
    describe,
    end_allocation,
    read_attempts,
    total_seconds,
)


class Clock:
    """Both of the program's clocks, and the age of the process, moved by hand."""

    def __init__(self) -> None:
        self.now_s, self.process_began_s = 1000.0, 1000.0

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s - 700

    def age(self) -> float:
        return self.now_s - self.process_began_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def new_process(self) -> None:
        self.process_began_s = self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    monkeypatch.setattr(goodput, "_seconds_since_exec", clock.age)
    monkeypatch.delenv("ELECTRA_ALLOCATION", raising=False)
    return clock


def begin(clock: Clock, monkeypatch: pytest.MonkeyPatch, startup_s: float = 0.0) -> None:
    """A command begins, and takes so long until its first process is started."""
    monkeypatch.delenv("ELECTRA_ALLOCATION", raising=False)
    clock.new_process()
    for name, value in begin_allocation().items():
        monkeypatch.setenv(name, value)
    clock.advance(startup_s)
    clock.new_process()


def make_steps(ledger: Ledger, clock: Clock, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ledger.enter_step("data", step)
        clock.advance(1)
        ledger.enter_step("productive", step)
        clock.advance(4)
        ledger.reached(step)
        ledger.enter("overhead")
        clock.advance(0.5)


def test_every_second_of_an_attempt_is_in_one_class(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch, startup_s=2)
    clock.advance(3)  # imports
    ledger = Ledger(tmp_path, 1)
    clock.advance(1)
    ledger.enter("restore")
    clock.advance(5)
    ledger.enter("startup")
    clock.advance(7)
    ledger.reached(0, is_first=True)
    assert ledger.startup_s == 18
    make_steps(ledger, clock, 1, 3)
    ledger.enter("checkpoint")
    clock.advance(6)
    ledger.enter("evaluation")
    clock.advance(8)
    ledger.enter("drain")
    clock.advance(9)
    ledger.write()
    (attempt,) = read_attempts(tmp_path)
    assert attempt.seconds == dict.fromkeys(CLASSES, 0.0) | {
        "startup": 13, "restore": 5, "data": 3, "productive": 12, "overhead": 1.5, "checkpoint": 6, "evaluation": 8,
        "drain": 9,
    }  # fmt: skip
    assert sum(attempt.seconds.values()) == attempt.seen_unix_s - attempt.began_unix_s == clock.now_s - 1000
    assert (attempt.number, attempt.first_step, attempt.step) == (1, 0, 3)
    assert ledger.productive_pct == pytest.approx(100 * 12 / 57.5)
    text = describe([attempt])
    assert text.startswith("20.9 % of 58 s in 1 attempts productive; startup 13 s, drain 9 s")
    assert "down" not in text
    assert describe([]) == "nothing yet"


def test_a_kill_costs_what_passed_until_the_next_start_and_the_steps_made_again(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch)
    first = Ledger(tmp_path, 1)
    first.reached(0, is_first=True)
    make_steps(first, clock, 1, 4)
    clock.advance(9.5)  # of the step in which it is killed, and of noticing that; nobody writes them down
    clock.new_process()
    clock.advance(3)
    second = Ledger(tmp_path, 2)
    second.reached(2, is_first=True)
    make_steps(second, clock, 3, 6)
    end_allocation(tmp_path)
    one, other = read_attempts(tmp_path)
    assert one.seconds["productive"] == 16
    assert other.seconds["down"] == 0.5 + 9.5  # the half second after the last step was not written down either
    assert other.seconds["startup"] == 3
    assert other.seconds["replayed"] == 2 * (1 + 4)  # steps 3 and 4
    assert other.seconds["productive"] == 2 * 4 and other.seconds["data"] == 2 * 1
    assert (other.first_step, other.step) == (2, 6)
    assert sum(total_seconds([one, other]).values()) == clock.now_s - 1000


def test_an_attempt_that_dies_before_its_first_line_is_in_the_next_ones_down(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch)
    Ledger(tmp_path, 1).reached(0, is_first=True)
    clock.advance(10)
    Ledger(tmp_path, 2)
    clock.advance(20)
    clock.new_process()
    clock.advance(5)
    Ledger(tmp_path, 3).write()
    attempts = read_attempts(tmp_path)
    assert [attempt.number for attempt in attempts] == [1, 3]
    assert attempts[1].seconds["down"] == 30 and attempts[1].seconds["startup"] == 5
    assert sum(total_seconds(attempts).values()) == 35


def test_time_between_allocations_belongs_to_the_queue(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch)
    first = Ledger(tmp_path, 1)
    make_steps(first, clock, 1, 2)
    clock.advance(0.25)
    end_allocation(tmp_path)
    clock.advance(86400)
    begin(clock, monkeypatch, startup_s=1)
    second = Ledger(tmp_path, 2)
    make_steps(second, clock, 1, 1)
    end_allocation(tmp_path)
    one, other = read_attempts(tmp_path)
    assert one.seconds["drain"] == 0.5 + 0.25
    assert other.seconds["down"] == 0 and other.seconds["startup"] == 1
    assert other.seconds["replayed"] == 5
    assert one.allocation != other.allocation


def test_a_command_that_ends_before_it_keeps_an_account_leaves_earlier_ones_alone(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch)
    make_steps(Ledger(tmp_path, 1), clock, 1, 2)
    end_allocation(tmp_path)
    before = read_attempts(tmp_path)
    clock.advance(86400)
    begin(clock, monkeypatch)
    end_allocation(tmp_path)
    assert read_attempts(tmp_path) == before


@pytest.mark.parametrize(("code", "what"), [(0, "drain"), (85, "drain"), (1, "down"), (93, "down")])
def test_what_passed_until_a_job_script_ends_belongs_to_the_last_of_its_runs(
    code: int, what: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's variants, in turn; and one run alone, whose name the job's is."""
    for job, parts in (("4711-0", ("a", "b")), ("4711-1", (None,))):
        folders = [tmp_path / f"{job}-{part}" for part in parts]
        for part, folder in zip(parts, folders, strict=True):
            clock.new_process()
            monkeypatch.setenv("ELECTRA_ALLOCATION", f"{job}@{clock.now_s}")
            if part:
                monkeypatch.setenv("ELECTRA_ALLOCATION", begin_part(part)["ELECTRA_ALLOCATION"])
            Ledger(folder, 1).write()
            clock.advance(3)
        clock.advance(1800)  # a hang
        monkeypatch.setenv("ELECTRA_ALLOCATION", f"{job}@1000")
        end_allocation(*folders, code=code)
        *others, last = [attempt for folder in folders for attempt in read_attempts(folder)]
        assert last.seconds == dict.fromkeys(CLASSES, 0.0) | {what: 1803}
        assert last.seen_unix_s == clock.now_s and all(sum(other.seconds.values()) == 0 for other in others)


def test_a_job_script_closes_the_account_of_its_run(tmp_path: Path) -> None:
    config = Path(__file__).resolve().parents[2] / "configs/small.yaml"
    folder = tmp_path / "runs/x/pretrain"
    attempt = Attempt(1, "4711-0", began_unix_s=time.time() - 10, seen_unix_s=time.time() - 10)
    (folder / "goodput").mkdir(parents=True)
    (folder / "goodput/attempt_0001.json").write_text(json.dumps(asdict(attempt)))
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.goodput", "1", str(config), f"run.dir={tmp_path}"]
    env = os.environ | {"ELECTRA_ALLOCATION": "4711-0@1000"}
    done = subprocess.run([*command, "run.name=x"], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert read_attempts(folder)[0].seconds["down"] >= 10
    assert "| torch" not in done.stderr  # a second, or a minute on a cold node
    refused = subprocess.run([*command, "run.name=x", "no.such=1"], env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "unknown key no" in refused.stderr and "Traceback" not in refused.stderr


def test_an_allocation_begins_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.advance(12.5)
    (value,) = begin_allocation().values()
    assert value.endswith("@1000.000")
    monkeypatch.setenv("ELECTRA_ALLOCATION", "4711.0@900.5")  # as a Slurm script does
    assert begin_allocation() == {}


def test_begin_of_the_slurm_job_is_begin_of_the_account(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELECTRA_ALLOCATION", "4711.0@900.5")
    clock.advance(10)
    Ledger(tmp_path, 1).write()
    (attempt,) = read_attempts(tmp_path)
    assert attempt.allocation == "4711.0"
    assert attempt.seconds["startup"] == 109.5


def test_other_ranks_write_nothing(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(None, 1)
    ledger.reached(3)
    clock.advance(2)
    ledger.enter("productive")
    assert not list(tmp_path.iterdir()) and ledger.startup_s == 2


def test_a_file_that_a_crash_has_damaged_is_named_and_left_out(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(clock, monkeypatch)
    make_steps(Ledger(tmp_path, 1), clock, 1, 1)
    make_steps(Ledger(tmp_path, 2), clock, 2, 2)
    path = tmp_path / "goodput" / "attempt_0001.json"
    path.write_text(path.read_text()[:100])
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [2]
    assert "attempt_0001.json: unreadable" in caplog.text and "missing in the account" in caplog.text


def test_a_full_disk_ends_neither_the_run_nor_the_account(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(clock, monkeypatch)
    ledger = Ledger(tmp_path, 1)
    make_steps(ledger, clock, 1, 2)
    before, pwrite = read_attempts(tmp_path), os.pwrite
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", lambda file, text, offset: pwrite(file, text[:0], offset))
        make_steps(ledger, clock, 3, 4)
        end_allocation(tmp_path)
    assert read_attempts(tmp_path) == before
    assert caplog.text.count("attempt_0001.json: [Errno 28] No space left on device; tried again at each step") == 1
    assert "goodput: the account lacks the last seconds ([Errno 28] No space left on device)" in caplog.text
    make_steps(ledger, clock, 5, 5)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.step, attempt.seconds["productive"]) == (5, 5 * 4)


def test_the_file_is_whole_after_every_write(tmp_path: Path, clock: Clock) -> None:
    """Also when a text gets shorter: what was longer before leaves nothing behind."""
    ledger = Ledger(tmp_path, 1)
    path = tmp_path / "goodput" / "attempt_0001.json"
    for seconds in (1 / 3, 1.0, 1e9 / 7, 1.0):
        clock.advance(seconds)
        ledger.reached(1)
        assert len(path.read_bytes()) == 2048
        assert json.loads(path.read_text())["step"] == 1


def test_a_clock_that_is_set_back_takes_nothing_away(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(clock, monkeypatch)
    Ledger(tmp_path, 1).write()
    clock.now_s -= 300
    clock.new_process()
    ledger = Ledger(tmp_path, 2)
    clock.advance(5)
    ledger.write()
    assert min(total_seconds(read_attempts(tmp_path)).values()) >= 0
    assert read_attempts(tmp_path)[1].seconds["startup"] == 5


def test_no_start_takes_the_file_of_another(tmp_path: Path, clock: Clock) -> None:
    for number, lineage in ((1, "a"), (2, "a"), (1, "b")):  # other inputs: attempts count from 1 again
        Ledger(tmp_path, number, lineage).write()
    assert [(attempt.number, attempt.lineage) for attempt in read_attempts(tmp_path)] == [(1, "a"), (2, "a"), (3, "b")]
