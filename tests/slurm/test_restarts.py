"""What becomes of a job whose ranks were lost, that was told to stop for good, or that cannot be requeued."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import ONE_RANK, TWO_NODES, Cluster, Job

pytestmark = pytest.mark.slurm


def run_stub(cluster: Cluster, checkout: Path, cwd: Path, *overrides: str, flags=TWO_NODES, **env: str) -> Job:
    return cluster.run(checkout / "slurm/pretrain_small.sh", *overrides, flags=flags, cwd=cwd, env=env)


def seen(folder: Path, process: str) -> dict:
    """What a process of the stub wrote down."""
    return json.loads((folder / f"{process}.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def lost_job(cluster: Cluster, stub_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A job whose ranks fail in its first start. It goes first: Slurm holds a requeued job back."""
    folder = tmp_path_factory.mktemp("lost")
    script, env = stub_checkout / "slurm/pretrain_small.sh", {"ELECTRA_RESTARTS": "0"}
    return cluster.submit(script, "stub.first=7", flags=ONE_RANK, cwd=folder, env=env)


def test_lost_ranks_are_started_again_in_the_same_allocation(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.lose=2")
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.log
    assert "starting it again in this allocation: 2 of at most 3" in job.log and "3 of at most 3" not in job.log
    port = int(seen(tmp_path, "pretrain-attempt0-rank0")["env"]["MASTER_PORT"])
    assert port == 10000 + (job.id + 2 * 613) % 20000  # that of the start before may still be in use
    assert "[slurm] node n2 failed first." in job.log
    assert f"scontrol update JobId={job.id} ExcNodeList=n2" in job.log and "sbatch --exclude=n2" in job.log


def test_ranks_that_always_die_end_the_job_with_1(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.lose=99", ELECTRA_RESTARTS="1", ELECTRA_MAX_REQUEUES="0")
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 0), job.log
    assert len((tmp_path / "starts-attempt0").read_text().split()) == 2
    assert "was lost; not requeued: already restarted 0 times (ELECTRA_MAX_REQUEUES=0)" in job.log


def test_the_ranks_own_judgement_names_the_node(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    says = "no sign of life for 31 s of rank 1 on far.site.org (step 7, step), rank 2 on other (step 7, step)"
    env = {"ELECTRA_RESTARTS": "0", "ELECTRA_MAX_REQUEUES": "0"}
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.exit=75", f"stub.says={says}", flags=ONE_RANK, **env)
    assert (job.exit_code, job.restarts) == (1, 0)  # never the program's 75
    assert "node far failed first" in job.log and "--exclude=far" in job.log


@pytest.mark.parametrize("stage", ["tokenize", "evaluate"])
def test_other_stages_are_not_started_again(stage: str, cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    arguments = ["configs/base.yaml", "stub.exit=7"]
    job = cluster.run(stub_checkout / f"slurm/{stage}.sh", *arguments, flags=ONE_RANK, cwd=tmp_path)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 7, 0), job.log
    assert job.log.count(f"stub {stage} rank 0") == 1


def test_85_of_ranks_that_srun_ended_at_their_start_is_no_stop(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    env = {"ELECTRA_RESTARTS": "1", "ELECTRA_MAX_REQUEUES": "0"}
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.exit=85", "stub.reason=", flags=ONE_RANK, **env)
    assert (job.exit_code, job.restarts) == (1, 0), job.log
    assert job.log.count("stub pretrain rank 0") == 2


def test_a_stop_for_good_is_not_requeued(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    reason = "stub.reason=held: /run/STOP is there"
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.exit=85", reason, flags=ONE_RANK)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 85, 0), job.log
    assert "held: /run/STOP is there" in job.log and "not requeued; submit again when the file is removed" in job.log


def test_ranks_learn_when_the_allocation_began_and_ends(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    outer = {"ELECTRA_JOB_END_TIME": "1", "ELECTRA_ALLOCATION": "7-0@1"}  # of a job that this one was submitted from
    job = run_stub(cluster, stub_checkout, tmp_path, flags=ONE_RANK, **outer)
    assert job.exit_code == 0, job.log
    env = seen(tmp_path, "pretrain-attempt0-rank0")["env"]
    found = re.fullmatch(rf"{job.id}-0@(\d+)", env["ELECTRA_ALLOCATION"])
    assert found
    assert 550 <= int(env["ELECTRA_JOB_END_TIME"]) - int(found[1]) <= 601  # --time=10

    unlimited = tmp_path / "unlimited"
    unlimited.mkdir()
    job = run_stub(cluster, stub_checkout, unlimited, flags=[*ONE_RANK, "--time=UNLIMITED"], **outer)
    assert job.exit_code == 0, job.log
    assert "ELECTRA_JOB_END_TIME" not in seen(unlimited, "pretrain-attempt0-rank0")["env"]


@pytest.mark.parametrize("fails", [False, True])
def test_nodes_are_checked_before_a_long_run(fails: bool, cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    overrides = ["run.name=x", *(["stub.fail_stage=acceptance"] if fails else [])]
    job = run_stub(cluster, stub_checkout, tmp_path, *overrides, ELECTRA_QUICK_CHECK="1")
    checks = [seen(tmp_path, path.stem) for path in tmp_path.glob("acceptance-*.json")]
    nodes = sorted(check["env"]["SLURMD_NODENAME"] for check in checks)
    assert nodes == ["n1", "n2"] or (fails and nodes)  # after one failure srun may end the other before it begins
    for check in checks:
        assert check["argv"] == ["acceptance", "--quick", f"{stub_checkout}/configs/small.yaml", *overrides]
    started = (tmp_path / "pretrain-attempt0-rank0.json").exists()
    assert (job.exit_code, job.restarts, started) == ((1, 0, False) if fails else (0, 0, True)), job.log
    refusal = re.search(r"the quick check failed \(1(37|43)?\); ELECTRA_QUICK_CHECK=0 leaves it out", job.log)
    assert bool(refusal) == fails


def submit_chain(cluster: Cluster, checkout: Path, cwd: Path, *arguments: str) -> list[Job]:
    env = cluster.env | {"ELECTRA_CHAIN_SBATCH": " ".join(ONE_RANK)}
    command = [checkout / "slurm/chain.sh", *arguments]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, *jobs = done.stdout.split()
    ended = [cluster.wait(int(job)) for job in jobs]
    assert all(f"JobName={name}" in job.record for job in ended)
    return ended


def test_generations_of_a_chain_go_on_one_after_the_other(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    script = str(stub_checkout / "slurm/pretrain_small.sh")
    jobs = submit_chain(cluster, stub_checkout, tmp_path, "2", script, "stub.exit=85")
    assert [(job.exit_code, job.restarts) for job in jobs] == [(85, 0), (85, 0)]
    ended, begun = re.search(r"EndTime=(\S+)", jobs[0].record), re.search(r"StartTime=(\S+)", jobs[1].record)
    assert ended and begun and ended[1] <= begun[1]  # ISO 8601
    assert all("the chain's next generation goes on from the checkpoint" in job.log for job in jobs)


def test_a_chain_ends_with_what_repeating_cannot_mend(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    script = str(stub_checkout / "slurm/pretrain_small.sh")
    jobs = submit_chain(cluster, stub_checkout, tmp_path, "2", script, "stub.exit=93")
    assert [(job.state, job.exit_code) for job in jobs] == [("FAILED", 93)] * 2, jobs[1].log
    assert "stub pretrain" in jobs[0].log and "stub pretrain" not in jobs[1].log
    assert "an earlier generation of this chain ended with 93: because; submit a new chain" in jobs[1].log
    assert submit_chain(cluster, stub_checkout, tmp_path, "1", script)[0].exit_code == 0


def test_what_cannot_be_a_chain_is_refused(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    env = cluster.env | {"ELECTRA_CHAIN_SBATCH": "--partition=none"}
    for arguments, code in [(["0", "x.sh"], 64), (["2"], 64), (["2", "missing.sh"], 78),
                            (["2", str(stub_checkout / "slurm/pretrain_small.sh")], 1)]:  # fmt: skip
        command = [stub_checkout / "slurm/chain.sh", *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr


def test_a_job_that_lost_its_ranks_too_often_is_requeued(cluster: Cluster, lost_job: int):
    ended = cluster.wait(lost_job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.log
    assert "pretrain was lost" not in ended.log and "was lost; requeueing" in ended.log
