"""The users' journeys with the real program on a real two-node Slurm: a tiny model on CPUs.

A start of the program costs seconds of imports, so the tests share one set of shards and one long run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from slurm_cluster import FINISHED, ONE_RANK, TWO_NODES, Cluster, Job, wait_until

from pipeline.goodput import read_attempts, total_seconds
from tests.conftest import Electra

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]
RunFolder = Callable[[str], Path]
STEPS = 40  # with what slows it down long enough to be stopped in the middle
PRETRAIN = REPOSITORY / "slurm/pretrain_large.sh"


def journal_steps(run: Path) -> list[int]:
    """The steps in a run's journal, in its order. The last line may be half written while the run goes on."""
    journal = run / "pretrain/journal.jsonl"
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [json.loads(line)["step"] for line in lines]


def replaced(overrides: list[str], *newer: str) -> list[str]:
    """The overrides with newer values, each key once."""
    return list({override.partition("=")[0]: override for override in [*overrides, *newer]}.values())


@pytest.fixture(scope="module")
def long_run_arguments(tiny_project: list[str]) -> list[str]:
    return replaced(tiny_project, f"train.steps={STEPS}", "train.checkpoint_every=1000", "tracking.uri=auto")


@pytest.fixture(scope="module")
def long_run(cluster: Cluster, long_run_arguments: list[str], run_folder: RunFolder, tmp_path_factory) -> Job:
    """A run on two nodes that gets the time limit's signal in the middle and requeues itself to go on."""
    cwd = tmp_path_factory.mktemp("submit")
    slowly = {"ELECTRA_FAULT": "slow@phase=data,seconds=0.3,attempt=1"}  # it does not end before it is told to stop
    job = cluster.submit(PRETRAIN, *long_run_arguments, flags=TWO_NODES, cwd=cwd, env=slowly)
    run = run_folder("tiny")
    wait_until(
        lambda: len(journal_steps(run)) >= 2 or cluster.fields(job)[0]["JobState"] in FINISHED,
        timeout_s=180,  # the first start on a machine may compile a DeepSpeed extension
        report=lambda: Path(cwd, f"electra-large-{job}.out").read_text(),
    )
    cluster.command("scancel", "--batch", "--signal=USR2", str(job), check=False)
    return cluster.wait(job, timeout_s=300)


def test_two_nodes_train_to_the_end_across_a_time_limit(long_run: Job, run_folder: RunFolder):
    assert (long_run.state, long_run.exit_code, long_run.restarts) == ("COMPLETED", 0, 1), long_run.log
    assert journal_steps(run_folder("tiny")) == list(range(1, STEPS + 1))
    assert "tasks=2" in long_run.log
    assert re.search(r"(?m)\b(processes|world[ _]size)\W+2$", long_run.log), long_run.log


def test_every_second_of_both_allocations_is_in_the_account(long_run: Job, run_folder: RunFolder):
    moments = re.findall(r"\[slurm\] (\S+) (?:job=|pretrain ended)", long_run.log)
    begun_0, ended_0, begun_1, ended_1 = (datetime.fromisoformat(moment).timestamp() for moment in moments)
    attempts = read_attempts(run_folder("tiny") / "pretrain")
    first, second = (total_seconds([a for a in attempts if a.allocation == f"{long_run.id}-{n}"]) for n in (0, 1))
    # Whole seconds, and of two calls: one may be lost between them.
    assert ended_0 - begun_0 - 1 <= sum(first.values()) <= begun_1 - begun_0  # then it was in the queue
    assert ended_1 - begun_1 - 1 <= sum(second.values())
    assert long_run.run_time_s - 15 <= sum(second.values()) <= long_run.run_time_s + 1  # with Slurm's own start and end


def test_finished_run_is_up_to_date(cluster: Cluster, long_run: Job, long_run_arguments, run_folder, tmp_path: Path):
    assert long_run.exit_code == 0, long_run.log
    journal = run_folder("tiny") / "pretrain/journal.jsonl"
    before = journal.read_bytes()
    job = cluster.run(PRETRAIN, *long_run_arguments, flags=ONE_RANK, cwd=tmp_path)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert re.search(r"(?i)up[ -]to[ -]date", job.log), job.log
    assert journal.read_bytes() == before


def test_two_nodes_train_from_staged_copies_and_outlive_a_rank(
    cluster: Cluster, electra: Electra, tiny_project: list[str], run_folder, tmp_path: Path
):
    local, overrides = tmp_path / "local", replaced(tiny_project, "run.name=staged")
    electra("tokenize", REPOSITORY / "configs/large.yaml", *overrides)
    env = {"ELECTRA_STAGE_DIR": str(local), "ELECTRA_FAULT": "kill@step=5,rank=1,attempt=1", "ELECTRA_QUICK_CHECK": "1"}
    job = cluster.run(PRETRAIN, *overrides, flags=TWO_NODES, cwd=tmp_path, env=env)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    (copy,) = (path.parent for path in local.glob("*/MANIFEST.json"))
    assert f"rows are read from {copy}" in job.log and "in its place" not in job.log
    assert (
        job.log.count(f"{copy}: copied") == job.log.count(f"{copy}: is there, nothing to do") == 1
    )  # both "nodes" share a disk
    assert journal_steps(run_folder("staged")) == [1, 2, 3, 4, 5, 6]
    assert job.restarts == 0 and job.log.count("starting it again in this allocation") == 1, job.log
    assert "node n2 failed first" in job.log


def test_pipeline_ends_with_scores(cluster, tiny_project, evaluate_overrides, run_folder, tmp_path: Path):
    overrides = replaced(tiny_project, *evaluate_overrides, "run.name=chain")
    jobs = cluster.submit_pipeline(REPOSITORY, "configs/large.yaml", *overrides, cwd=tmp_path)
    jobs = [cluster.wait(job) for job in jobs]
    assert [job.state for job in jobs] == ["COMPLETED"] * 3, "\n".join(job.log for job in jobs)
    assert journal_steps(run_folder("chain")) == [1, 2, 3, 4, 5, 6]
    results = json.loads((run_folder("chain") / "evaluate/results.json").read_text())
    assert results["tasks"], results


@pytest.mark.parametrize(
    ("override", "exit_codes", "names"),
    [
        ("run.dir=empty", {65, 78}, r"shards|tokenize"),
        ("launch.device=cuda", {78}, r"(?i)gpu|cuda"),
        ("train.stepz=5", {78}, r"train\.steps"),
    ],
)
def test_what_cannot_work_is_refused_in_seconds(
    override, exit_codes, names, cluster, tiny_project, real_checkout_with_space, tmp_path: Path
):
    script = real_checkout_with_space / "slurm/pretrain_large.sh"
    job = cluster.run(script, *replaced(tiny_project, override), flags=TWO_NODES, cwd=tmp_path)
    assert job.state == "FAILED" and job.exit_code in exit_codes, job.log
    message = [line for line in job.log.splitlines() if not line.startswith("[slurm]")]
    assert re.search(names, "\n".join(message)) and len(message) <= 5, job.log
    assert "srun" not in job.log and "Traceback" not in job.log
    assert job.run_time_s <= 240
