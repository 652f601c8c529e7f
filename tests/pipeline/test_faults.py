"""Faults on purpose: understood, struck where they are due, announced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import checkpoint as checkpoints
from pipeline.errors import ConfigError
from pipeline.faults import Fault, Faults, parse_faults
from tests.conftest import Electra, read_journal


def test_what_a_fault_says() -> None:
    assert parse_faults("kill@step=37,rank=1,phase=save") == [Fault("kill", "save", (37, 37), 1)]
    assert parse_faults(" nan@step=5-8 ; slow@rank=1,phase=data,seconds=0.5,attempt=2;") == [
        Fault("nan", "step", (5, 8)), Fault("slow", "data", None, 1, 2, 0.5),
    ]  # fmt: skip
    assert parse_faults("full; memory") == [Fault("full", "write"), Fault("memory", "step")]
    assert parse_faults("") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [("burn@step=1", "'burn' is none of kill"), ("kill@stop=1", "'stop=1' is not one of step=N"),
     ("kill@step=x", "'step=x'"), ("kill@phase=night", "phase=start|data|exchange"), ("kill@step", "'step'"),
     ("nan@phase=data", "nan strikes in phase=step only"), ("flip@phase=save", "flip strikes in phase=step only")],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_faults(text)
    assert named in str(refused.value)


def test_it_holds_for_its_step_rank_phase_and_attempt_alone() -> None:
    fault = Fault("nan", "step", (5, 8), rank=1, attempt=2)
    assert fault.holds("step", 5, 1, 2) and fault.holds("step", 8, 1, 2)
    others = [("data", 5, 1, 2), ("step", 4, 1, 2), ("step", 9, 1, 2), ("step", 5, 0, 2), ("step", 5, 1, 1)]
    assert not any(fault.holds(*other) for other in others)  # type: ignore[arg-type]
    assert Fault("kill", "data").holds("data", 1, 7, 9)


def test_nan_is_told_slow_sleeps_and_full_raises(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults(0, 1, "nan@step=3; slow@step=4,seconds=0.05; full@step=5")
    assert "this run will be damaged on purpose" in caplog.text
    assert [faults.strike("step", step) for step in (2, 3)] == [set(), {"nan"}]
    began = time.monotonic()
    assert faults.strike("step", 4) == {"slow"}
    assert time.monotonic() - began >= 0.05
    with pytest.raises(OSError, match="No space left on device"):
        faults.strike("write", 5)


def test_nothing_is_said_or_done_unless_it_is_set(caplog: pytest.LogCaptureFixture) -> None:
    assert not Faults(0, 1, "").strike("step", 1)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_kill_and_hang(kind: str) -> None:
    code = "from pipeline.faults import Faults; Faults(1, 1).strike('save', 7); print('went on')"
    environment = os.environ | {"ELECTRA_FAULT": f"{kind}@step=7,phase=save"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    if kind == "hang":
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert process.stdout is not None and process.stdout.read() == ""


@pytest.mark.parametrize("recipe", ["fixed", "released"])
def test_a_checkpoint_that_a_bad_step_puts_off_is_made_after_the_next_good_one(
    shared_config: Path, electra: Electra, recipe: str
) -> None:
    name = f"put-off-{recipe}"
    arguments = [
        "run",
        shared_config,
        f"run.name={name}",
        f"recipe={recipe}",
        "train.steps=8",
        "train.checkpoint_every=4",
    ]
    said = electra(*arguments, "train.keep_checkpoints=9", ELECTRA_FAULT="nan@step=4").stderr
    assert "step 4: NaN or inf in the gradients" in said
    folder = shared_config.parent / "out/runs" / name / "pretrain/checkpoints"
    assert checkpoints.list_steps(folder) == [5, 8]
    losses = [entry.get("train/total_loss") for entry in read_journal(shared_config.parent / "out", name)]
    assert [number for number, loss in enumerate(losses, 1) if loss is None] == [4]  # 0.0 would be the lowest of all


def test_lack_of_memory_on_a_rank_ends_the_run_and_says_what_to_set(shared_config: Path, electra: Electra) -> None:
    """With a code that is not requeued, whatever the other rank says of being left alone."""
    arguments = ["run", shared_config, "run.name=exhausted", "launch.processes=2", "launch.restarts=1"]
    said = electra(*arguments, code=78, ELECTRA_FAULT="memory@step=3,rank=1").stderr
    assert "rank 1 on" in said and "is out of memory (tried to allocate" in said and "train.micro_batch_size" in said
    assert "started again" not in said
