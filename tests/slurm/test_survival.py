"""Pretraining outlives what happens to jobs on a cluster, and ends with the bits of a run that nothing happened to.

pytest -m soak tests/slurm/test_survival.py        a quarter of an hour on two cores
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import FINISHED, TWO_NODES, Cluster, Job, clean_environment, proc, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.soak]
REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = REPOSITORY / "slurm/pretrain_large.sh"
STEPS = 30
SLOWLY = {"ELECTRA_FAULT": "slow@rank=0,phase=data,seconds=0.5,attempt=1"}  # time for things to happen in


class Run:
    """A run of its own name, tokenized, to be pretrained on two nodes."""

    def __init__(self, name: str, project: list[str], folder: Path):
        newer = [f"run.name={name}", f"train.steps={STEPS}", "train.checkpoint_every=10", "train.held_out_rows=16",
                 "tracking.uri=auto"]  # fmt: skip
        self.arguments = list({part.partition("=")[0]: part for part in [*project, *newer]}.values())
        self.folder = folder
        command = [sys.executable, "-m", "pipeline", "tokenize", "configs/large.yaml", *self.arguments]
        subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), check=True, capture_output=True, timeout=120)

    @property
    def steps(self) -> list[int]:
        """The steps in the journal; the last line may be half written."""
        journal = self.folder / "pretrain/journal.jsonl"
        lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
        return [json.loads(line)["step"] for line in lines]

    @property
    def checkpoint(self) -> str:
        """The digest of the last weights and moments, once the stage is done."""
        record = json.loads((self.folder / "pretrain/stage.json").read_text())
        assert record["state"] == "done" and self.steps == list(range(1, STEPS + 1))
        folder = self.folder / f"pretrain/checkpoints/step_{STEPS:08d}"
        tensors = [(folder / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer")]
        return hashlib.sha256(b"".join(tensors)).hexdigest()

    def wait_for_step(self, step: int, cluster: Cluster, job: int) -> None:
        """Until the journal has it."""
        over = lambda: cluster.fields(job)[0]["JobState"] in FINISHED  # noqa: E731
        wait_until(lambda: len(self.steps) >= step or over(), 180)
        assert not over(), cluster.wait(job).log


@pytest.fixture
def make_run(tiny_project: list[str], run_folder: Callable[[str], Path]) -> Callable[[str], Run]:
    return lambda name: Run(name, tiny_project, run_folder(name))


@pytest.fixture(scope="module")
def steady(cluster: Cluster, tiny_project, run_folder, tmp_path_factory) -> str:
    """The digest of a run that nothing happens to."""
    run = Run("steady", tiny_project, run_folder("steady"))
    job = cluster.run(PRETRAIN, *run.arguments, flags=TWO_NODES, cwd=tmp_path_factory.mktemp("steady"), timeout_s=240)
    assert (job.exit_code, job.restarts) == (0, 0), job.log
    return run.checkpoint


def submit(cluster: Cluster, run: Run, cwd: Path, *flags: str, **env: str) -> int:
    return cluster.submit(PRETRAIN, *run.arguments, flags=[*TWO_NODES, *flags], cwd=cwd, env=env)


def assert_finished(job: Job, restarts: int) -> None:
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, restarts), job.log


def test_requeued_by_hand(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("requeued")
    job = submit(cluster, run, tmp_path, **SLOWLY)
    run.wait_for_step(12, cluster, job)
    cluster.command("scontrol", "requeue", str(job))
    assert_finished(cluster.wait(job, 240), restarts=1)
    assert run.checkpoint == steady


def test_node_lost(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("node-lost")
    job = submit(cluster, run, tmp_path, **SLOWLY)
    run.wait_for_step(12, cluster, job)
    cluster.lose_node("n2")
    try:
        wait_until(lambda: cluster.fields(job)[0]["JobState"] == "PENDING", 60)
    finally:
        cluster.bring_back_node("n2")
    assert_finished(cluster.wait(job, 240), restarts=1)
    assert run.checkpoint == steady


def test_preempted_by_a_more_urgent_job(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("preempted")
    job = submit(cluster, run, tmp_path, **SLOWLY)
    run.wait_for_step(12, cluster, job)
    (tmp_path / "urgent.sh").write_text("#!/bin/bash\nsleep 3\n")
    urgent = cluster.run(
        tmp_path / "urgent.sh", flags=[*TWO_NODES, "--partition=urgent", "--exclusive"], cwd=tmp_path, timeout_s=90
    )
    assert urgent.exit_code == 0
    assert_finished(cluster.wait(job, 240), restarts=1)
    assert run.checkpoint == steady


def test_cancelled_then_submitted_again(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("cancelled")
    job = submit(cluster, run, tmp_path, **SLOWLY)
    run.wait_for_step(5, cluster, job)
    cluster.command("scancel", str(job))
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    wait_until(lambda: "everything is saved" in (tmp_path / f"electra-large-{job}.out").read_text(), 20)
    assert_finished(cluster.wait(submit(cluster, run, tmp_path), 240), restarts=0)
    assert run.checkpoint == steady


def test_time_limit_of_which_slurm_does_not_warn(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("limited")
    run.arguments.append("train.stop_before_limit_seconds=75")
    fault = "slow@rank=0,phase=data,seconds=3,attempt=1"  # 30 steps take longer than the job has
    job = submit(cluster, run, tmp_path, "--time=2", "--signal=B:URG@1", ELECTRA_FAULT=fault)
    ended = cluster.wait(job, 300)
    assert "less than 75 s before the job's time limit" in ended.log, ended.log
    assert_finished(ended, restarts=1)
    assert run.checkpoint == steady


def test_stop_file_holds_a_run_until_it_is_removed(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("held")
    job = submit(cluster, run, tmp_path, **SLOWLY)
    run.wait_for_step(5, cluster, job)
    (run.folder / "STOP").touch()
    stopped = cluster.wait(job)
    assert (stopped.state, stopped.exit_code, stopped.restarts) == ("FAILED", 85, 0), stopped.log
    assert "everything is saved" in stopped.log and "not requeued; submit again when" in stopped.log
    refused = cluster.wait(submit(cluster, run, tmp_path))
    assert refused.exit_code == 85 and "STOP is there: remove it to go on" in refused.log
    (run.folder / "STOP").unlink()
    assert_finished(cluster.wait(submit(cluster, run, tmp_path), 240), restarts=0)
    assert run.checkpoint == steady


def test_rank_that_always_dies_ends_the_job_for_good(cluster: Cluster, make_run, tmp_path: Path):
    run = make_run("dying")
    env = {"ELECTRA_FAULT": "kill@step=2,rank=1", "ELECTRA_RESTARTS": "1"}
    ended = cluster.wait(submit(cluster, run, tmp_path, **env), 400)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 93, 3), ended.log
    assert "was requeued 3 times in a row and is still at step 0" in ended.log
    assert ended.log.count("starting it again in this allocation") == 3  # once in each of the first three starts
    mark = f"run.name={run.folder.name}".encode()
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and mark in proc(int(pid), "cmdline")]


def test_chain_of_generations_trains_to_the_end(cluster: Cluster, make_run, steady: str, tmp_path: Path):
    run = make_run("chain")
    env = cluster.env | {"ELECTRA_CHAIN_SBATCH": " ".join(TWO_NODES), "ELECTRA_FAULT": "kill@step=15,rank=1,attempt=1"}
    command = [REPOSITORY / "slurm/chain.sh", "3", PRETRAIN, *run.arguments]
    submitted = subprocess.run(
        command, env=env | {"ELECTRA_RESTARTS": "0"}, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    jobs = [cluster.wait(int(job), 240) for job in submitted.stdout.split()[1:]]
    assert [(job.exit_code, job.restarts) for job in jobs] == [(1, 0), (0, 0), (0, 0)], jobs[0].log
    assert "up to date" in jobs[2].log
    assert run.checkpoint == steady
