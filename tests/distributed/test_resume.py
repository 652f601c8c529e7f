"""Killed, stopped, moved to other processes: the run that comes back is the same run."""

import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.journal import without_volatile
from tests.conftest import REPOSITORY, TINY, Electra, clean_environment, command, make_text, read_journal

pytestmark = pytest.mark.distributed


SLOWLY, MORE_SLOWLY = "slow@phase=data,seconds=0.1", "slow@phase=data,seconds=0.4"
"""So that a run does not end before it is killed or stopped."""


def zero(stage: int) -> str:
    return f"deepspeed.config={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


class Started(subprocess.Popen):
    """The command line in the background; what it says goes to a file."""

    def __init__(self, said: Path, *arguments: object, fault: str = "", forks: bool = False):
        self.said = said
        environment = clean_environment(**({"ELECTRA_FAULT": fault} if fault else {}))
        with open(said, "w") as file:
            super().__init__(command(*arguments, forks=forks), env=environment, stdout=file, stderr=file)


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command line in the background; what still runs when the test ends is killed."""
    processes: list[Started] = []

    def run(*arguments: object, fault: str = "", forks: bool = False) -> Started:
        processes.append(Started(tmp_path / f"said_{len(processes)}", *arguments, fault=fault, forks=forks))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool], process: Started) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early:\n{process.said.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(run_dir: Path, name: str, step: int, process: Started) -> None:
    path = run_dir / "runs" / name / "pretrain" / "journal.jsonl"
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= step, process)


def same_run(one: list[dict], other: list[dict]) -> bool:
    return [without_volatile(entry) for entry in one] == [without_volatile(entry) for entry in other]


def weights(run_dir: Path, name: str, step: int) -> tuple[bytes, bytes]:
    folder = run_dir / "runs" / name / "pretrain" / "checkpoints" / f"step_{step:08d}"
    return (folder / "weights.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def test_kill_9_then_the_same_command_gives_the_same_run(shared_config: Path, electra: Electra, start: Start) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=40", "tracking.uri=auto", zero(0)]
    electra(*arguments, "run.name=whole")
    for round_number, step in enumerate((7, 18)):
        process = start(*arguments, "run.name=killed", fault=SLOWLY)
        wait_for_step(run_dir, "killed", step, process)
        process.kill()
        process.wait()
        assert read_journal(run_dir, "killed")[-1]["step"] < 40, f"round {round_number}: it was not killed in time"
    electra(*arguments, "run.name=killed")
    assert same_run(read_journal(run_dir, "whole"), read_journal(run_dir, "killed"))
    assert weights(run_dir, "whole", 40) == weights(run_dir, "killed", 40)
    assert_in_mlflow_once(run_dir / "mlflow.db", "killed", steps=40)


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


def test_kill_9_while_mlflow_creates_its_file(config_path: Path, electra: Electra, start: Start) -> None:
    run_dir = config_path.parent / "out"
    arguments = ["run", config_path, "tracking.uri=auto"]
    process = start(*arguments)
    wait_until(lambda: bool(list(run_dir.glob(".mlflow.db.*.tmp"))), process)
    children = children_of(process.pid)  # the shipper among them
    process.kill()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert not (run_dir / "mlflow.db").exists()
    electra(*arguments)
    assert_in_mlflow_once(run_dir / "mlflow.db", "tiny", steps=20)
    assert not list(run_dir.glob(".mlflow.db.*"))


@pytest.mark.parametrize(("stage", "processes", "precision"), [(1, 2, "bf16"), (2, 2, "fp32"), (3, 2, "fp32")])
def test_stopped_and_resumed_is_bitwise_the_same(
    shared_config: Path, electra: Electra, start: Start, stage: int, processes: int, precision: str
) -> None:
    run_dir, name = shared_config.parent / "out", f"stop{stage}"
    arguments = [
        "run", shared_config, "train.steps=16", "train.log_every=2", f"launch.processes={processes}", zero(stage),
        f"train.precision={precision}",
    ]  # fmt: skip
    electra(*arguments, f"run.name={name}-whole")
    process = start(*arguments, f"run.name={name}", fault=MORE_SLOWLY, forks=True)
    wait_for_step(run_dir, name, 2, process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(400) == 85
    electra(*arguments, f"run.name={name}")
    assert same_run(read_journal(run_dir, f"{name}-whole"), read_journal(run_dir, name))
    assert weights(run_dir, f"{name}-whole", 16) == weights(run_dir, name, 16)


def test_another_number_of_processes_and_stage_goes_on(shared_config: Path, electra: Electra, start: Start) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=20"]
    electra(*arguments, "run.name=steady", zero(0))
    process = start(*arguments, "run.name=moved", "launch.processes=2", zero(3), fault=MORE_SLOWLY, forks=True)
    wait_for_step(run_dir, "moved", 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) == 85
    done = electra(*arguments, "run.name=moved", "launch.processes=1", zero(1))
    assert "world_size changed from 2 to 1" in done.stderr
    for a, b in zip(read_journal(run_dir, "steady"), read_journal(run_dir, "moved"), strict=True):
        assert b["train/total_loss"] == pytest.approx(a["train/total_loss"], rel=1e-4)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=2e-3)


def test_stop_after_seconds_exits_85_with_everything_saved(shared_config: Path, electra: Electra) -> None:
    run_dir = shared_config.parent / "out"
    arguments = ["run", shared_config, "train.steps=100000", "run.name=budget", "train.log_every=50"]
    done = electra(*arguments, "train.stop_after_seconds=8", code=85)
    assert "everything is saved" in done.stderr
    steps = [int(path.name[5:]) for path in (run_dir / "runs/budget/pretrain/checkpoints").glob("step_*")]
    assert f"stopped at step {max(steps, default=0):,}" in done.stderr  # 0 where the start alone took that long


def test_processes_die_with_the_command(shared_config: Path, start: Start) -> None:
    process = start("run", shared_config, "run.name=orphan", "train.steps=100000", "launch.processes=2")
    wait_for_step(shared_config.parent / "out", "orphan", 2, process)
    children = children_of(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline, "a process outlived the command that started it"
        time.sleep(0.1)


def test_tokenize_stops_with_its_workers_and_goes_on(tmp_path: Path, electra: Electra, start: Start) -> None:
    text = tmp_path / "long.txt"
    text.write_text(make_text(3000) * 15, encoding="utf-8")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(run_dir=tmp_path / "out", corpus=text), encoding="utf-8")
    arguments = ["tokenize", config, "data.num_workers=2", "data.task_bytes=500000", "tokenizer.sample_bytes=200000"]
    process = start(*arguments)
    wait_until(lambda: bool(list(tmp_path.glob("out/shards/*/tasks/*.json"))), process)
    workers = children_of(process.pid)
    process.terminate()
    assert process.wait(400) == 85
    assert workers
    deadline = time.monotonic() + 10
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the program"
        time.sleep(0.05)
    done = len(list(tmp_path.glob("out/shards/*/tasks/*.json")))
    assert not list(tmp_path.glob("out/shards/*/MANIFEST.json"))
    assert "tokenize: resume (stopped before" in electra(*arguments).stderr
    assert len(list(tmp_path.glob("out/shards/*/tasks/*.json"))) > done


def test_two_runs_may_tokenize_one_corpus_at_once(tmp_path: Path, start: Start) -> None:
    text = tmp_path / "long.txt"
    text.write_text(make_text(3000) * 4, encoding="utf-8")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(run_dir=tmp_path / "out", corpus=text), encoding="utf-8")
    settings = ["data.num_workers=2", "data.task_bytes=100000", "tokenizer.sample_bytes=200000"]
    both = [start("tokenize", config, f"run.name={name}", *settings) for name in ("one", "other")]
    assert [process.wait(400) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("out/shards/*/MANIFEST.json"))) == 1


def test_evaluate_stops_and_goes_on(shared_config: Path, electra: Electra, start: Start, write_task) -> None:
    arguments = [shared_config, "run.name=halted", "train.steps=4", f'evaluate.tasks=["{write_task()}"]']
    electra("run", *arguments, "--until", "pretrain")
    log = shared_config.parent / "out/runs/halted/evaluate/log.txt"
    process = start("evaluate", *arguments, "evaluate.epochs=100000")
    wait_until(lambda: log.exists() and "units to do" in log.read_text(), process)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(400) == 85
    electra("evaluate", *arguments)


def test_a_signal_before_anything_has_begun_exits_85(shared_config: Path, start: Start) -> None:
    process = start("run", shared_config, "run.name=early", "train.steps=100000")
    wait_until(lambda: any(is_a_stage(child) for child in children_of(process.pid)), process)
    time.sleep(0.7)  # it is importing now
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) == 85


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def is_a_stage(pid: int) -> bool:
    try:
        return b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except (ProcessLookupError, FileNotFoundError):
        return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
