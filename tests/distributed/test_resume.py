"""Killed, stopped, moved to other processes: the run that comes back is the same run."""

import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.journal import without_volatile
from tests.conftest import REPOSITORY, Electra, clean_environment, command, read_journal

pytestmark = pytest.mark.distributed


def zero(stage: int) -> str:
    return f"deepspeed.config={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for_step(run_dir: Path, name: str, step: int, process: subprocess.Popen) -> None:
    path = run_dir / "runs" / name / "pretrain" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same_run(one: list[dict], other: list[dict]) -> bool:
    return [without_volatile(entry) for entry in one] == [without_volatile(entry) for entry in other]


def weights(run_dir: Path, name: str, step: int) -> tuple[bytes, bytes]:
    folder = run_dir / "runs" / name / "pretrain" / "checkpoints" / f"step_{step:08d}"
    return (folder / "weights.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def test_kill_9_then_the_same_command_gives_the_same_run(shared_config: Path, electra: Electra) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=60", "tracking.uri=auto", zero(0)]
    electra(*arguments, "run.name=whole")
    for round_number, step in enumerate((7, 33)):
        process = start(*arguments, "run.name=killed")
        wait_for_step(run_dir, "killed", step, process)
        process.kill()
        process.wait()
        assert read_journal(run_dir, "killed")[-1]["step"] < 60, f"round {round_number}: it was not killed in time"
    electra(*arguments, "run.name=killed")
    assert same_run(read_journal(run_dir, "whole"), read_journal(run_dir, "killed"))
    assert weights(run_dir, "whole", 60) == weights(run_dir, "killed", 60)
    assert_in_mlflow_once(run_dir / "mlflow.db", "killed", steps=60)


def assert_in_mlflow_once(database: Path, name: str, steps: int) -> None:
    with sqlite3.connect(database) as connection:
        runs = connection.execute(
            "select r.run_uuid, r.status from runs r where r.name = ? and r.lifecycle_stage = 'active'",
            (f"{name} pretrain",),
        ).fetchall()
        assert len(runs) == 1
        assert runs[0][1] == "FINISHED"
        rows = connection.execute("select key, step from metrics where run_uuid = ?", (runs[0][0],)).fetchall()
    counts = Counter(rows)
    assert set(counts.values()) == {1}
    assert {step for key, step in counts if key == "train/total_loss"} == set(range(1, steps + 1))


@pytest.mark.parametrize(("stage", "processes", "precision"), [(1, 2, "bf16"), (2, 2, "fp32"), (3, 2, "fp32")])
def test_stopped_and_resumed_is_bitwise_the_same(
    shared_config: Path, electra: Electra, stage: int, processes: int, precision: str
) -> None:
    run_dir, name = shared_config.parent / "out", f"stop{stage}"
    arguments = [
        "run", shared_config, "train.steps=16", "train.log_every=2", f"launch.processes={processes}", zero(stage),
        f"train.precision={precision}",
    ]  # fmt: skip
    electra(*arguments, f"run.name={name}-whole")
    process = start(*arguments, f"run.name={name}")
    wait_for_step(run_dir, name, 2, process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(120) == 85
    electra(*arguments, f"run.name={name}")
    assert same_run(read_journal(run_dir, f"{name}-whole"), read_journal(run_dir, name))
    assert weights(run_dir, f"{name}-whole", 16) == weights(run_dir, name, 16)


def test_another_number_of_processes_and_stage_goes_on(shared_config: Path, electra: Electra) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=14"]
    electra(*arguments, "run.name=steady", zero(0))
    process = start(*arguments, "run.name=moved", "launch.processes=2", zero(3))
    wait_for_step(run_dir, "moved", 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 85
    done = electra(*arguments, "run.name=moved", "launch.processes=1", zero(1))
    assert "world_size changed from 2 to 1" in done.stderr
    for a, b in zip(read_journal(run_dir, "steady"), read_journal(run_dir, "moved"), strict=True):
        assert b["train/total_loss"] == pytest.approx(a["train/total_loss"], rel=1e-4)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-3)


def test_stop_after_seconds_exits_85_with_everything_saved(shared_config: Path, electra: Electra) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=100000", "run.name=budget", "train.log_every=50"]
    done = electra(*arguments, "train.stop_after_seconds=8", code=85)
    assert "everything is saved" in done.stderr
    steps = [int(path.name[5:]) for path in (run_dir / "runs/budget/pretrain/checkpoints").glob("step_*")]
    assert f"stopped at step {max(steps):,}" in done.stderr


def test_processes_die_with_the_command(shared_config: Path) -> None:
    process = start("run", shared_config, "run.name=orphan", "train.steps=100000", "launch.processes=2")
    wait_for_step(shared_config.parent / "out", "orphan", 2, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_is_running(int(child)) for child in children):
        assert time.monotonic() < deadline, "a process outlived the command that started it"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
