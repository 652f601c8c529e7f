"""What the job scripts do on a real two-node Slurm. The program is a stub; a job takes a second."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import ONE_RANK, TWO_NODES, Cluster, Job, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("limited_job", "hanging_job")]  # from the first test on


def submit_stub(cluster: Cluster, checkout: Path, cwd: Path, *overrides: str, flags=ONE_RANK, env=None) -> int:
    return cluster.submit(checkout / "slurm/pretrain_small.sh", *overrides, flags=flags, cwd=cwd, env=env)


def run_stub(cluster: Cluster, checkout: Path, cwd: Path, *overrides: str, flags=ONE_RANK, env=None) -> Job:
    return cluster.wait(submit_stub(cluster, checkout, cwd, *overrides, flags=flags, env=env))


def seen(folder: Path, process: str) -> dict:
    """What a process of the stub wrote down."""
    return json.loads((folder / f"{process}.json").read_text())


def test_two_ranks_get_their_surroundings(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    # A folder "pipeline" in the submit directory is not the program, and an outer launcher's variables are
    # not this job's.
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__main__.py").write_text("raise SystemExit('the wrong program')")
    outer = {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
        "SLURM_STEP_ID": "0",
    }
    overrides = ["train.steps=6", 'data.corpora=[{"name": "a b", "path": "c.txt"}]']
    job = run_stub(cluster, stub_checkout, tmp_path, *overrides, flags=TWO_NODES, env=outer)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log

    ranks = [seen(tmp_path, f"pretrain-attempt0-rank{rank}") for rank in (0, 1)]
    environments = [rank["env"] for rank in ranks]
    assert [env["SLURM_PROCID"] for env in environments] == ["0", "1"]
    assert [env["SLURMD_NODENAME"] for env in environments] == ["n1", "n2"]
    assert {env["MASTER_ADDR"] for env in environments} == {"127.0.0.1"}  # n1's NodeAddr: "n1" itself has no address
    assert {env["MASTER_PORT"] for env in environments} == {str(10000 + job.id % 20000)}
    assert {env["SRUN_CPUS_PER_TASK"] for env in environments} == {"1"}
    assert not any("RANK" in env or "WORLD_SIZE" in env for env in environments)
    for rank in ranks:
        assert rank["argv"] == ["pretrain", f"{stub_checkout}/configs/small.yaml", *overrides]
        assert rank["cwd"] == str(tmp_path)
        assert rank["code"] == f"{stub_checkout}/pipeline/__main__.py"
        assert str(tmp_path) not in rank["python_path"]

    check = seen(tmp_path, "check")
    assert check["argv"] == [*ranks[0]["argv"], "--check"]
    assert "SLURM_STEP_ID" not in check["env"]  # a batch shell is no rank
    assert re.search(rf"\[slurm\] 20\S+ job={job.id} restart=0 nodes=n\[1-2\] tasks=2 commit=\w+", job.log)


@pytest.mark.parametrize(
    "place", ["repository", "elsewhere", "link to script", "link to checkout", "stdin", "variable"]
)
def test_finds_the_repository(place: str, cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    script, cwd, env = stub_checkout / "slurm/pretrain_small.sh", tmp_path, {}
    output = f"--output={tmp_path}/job.out"
    if place == "repository":
        script, cwd = Path("slurm/pretrain_small.sh"), stub_checkout
    elif place == "link to script":
        (tmp_path / "train me.sh").symlink_to(script)
        script = Path("train me.sh")
    elif place == "link to checkout":
        (tmp_path / "link").symlink_to(stub_checkout)
        script = Path("link/slurm/pretrain_small.sh")
    elif place == "variable":
        script, env = tmp_path / "my copy.sh", {"ELECTRA_REPO": str(stub_checkout)}
        script.write_bytes((stub_checkout / "slurm/pretrain_small.sh").read_bytes())
    if place == "stdin":
        cwd = stub_checkout
        with (stub_checkout / script).open() as text:
            answer = cluster.command("sbatch", "--parsable", *ONE_RANK, output, stdin=text, cwd=cwd)
        job = cluster.wait(int(answer))
    else:
        job = cluster.run(script, "configs/base.yaml", "a=b c", flags=[*ONE_RANK, output], cwd=cwd, env=env)
    assert job.exit_code == 0, job.log
    process = seen(cwd, "pretrain-attempt0-rank0")
    assert process["code"] == f"{stub_checkout}/pipeline/__main__.py"
    for left in cwd.glob("*.json"):
        left.unlink()


def test_says_in_one_sentence_that_there_is_no_repository(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    script = tmp_path / "copy.sh"
    script.write_bytes((stub_checkout / "slurm/pretrain_small.sh").read_bytes())
    job = cluster.run(script, flags=ONE_RANK, cwd=tmp_path)
    assert job.exit_code == 78
    assert job.log.count("\n") == 1 and "export ELECTRA_REPO=" in job.log


def test_config_of_the_submit_directory_comes_first(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.yaml").touch()
    job = run_stub(cluster, stub_checkout, tmp_path, "configs/base.yaml", "run.name=x")
    assert job.exit_code == 0, job.log
    assert seen(tmp_path, "pretrain-attempt0-rank0")["argv"] == [
        "pretrain",
        "configs/base.yaml",
        "run.name=x",
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "exit_code", "message"),
    [
        ("pretrain_small.sh", ["stub.check=78"], 78, "stub: the check refuses"),
        ("pretrain_small.sh", ["stub.check=65"], 65, "stub: the check refuses"),
        ("pretrain_small.sh", ["configs/typo.yaml"], 78, "configs/typo.yaml: no such file"),
        ("evaluate.sh", [], 64, "CONFIG is missing"),
    ],
)
def test_refuses_before_any_step(script, arguments, exit_code, message, cluster, stub_checkout, tmp_path):
    job = cluster.run(stub_checkout / "slurm" / script, *arguments, flags=ONE_RANK, cwd=tmp_path)
    assert (job.state, job.exit_code) == ("FAILED", exit_code)
    assert [line for line in job.log.splitlines() if message in line] == job.log.splitlines()[-1:]
    assert job.run_time_s <= 90
    assert not list(tmp_path.glob("*rank*"))


def test_exit_codes_come_through_without_a_requeue(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    jobs = {}
    for code in (64, 65, 78, 93):
        folder = tmp_path / str(code)
        folder.mkdir()
        overrides = [f"stub.exit={code}", "stub.straggle=20"]
        jobs[code] = submit_stub(cluster, stub_checkout, folder, *overrides, flags=TWO_NODES)
    for code, submitted in jobs.items():
        job = cluster.wait(submitted)
        assert (job.state, job.exit_code, job.restarts) == ("FAILED", code, 0), job.log
        assert f"ended with exit code {code}: because" in job.log  # srun itself says 143, of the ranks it ended
        assert "Terminated" in job.log and not list((tmp_path / str(code)).glob(".electra-exit*"))


def test_two_nodes_stop_at_the_signal_and_go_on_after_a_requeue(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = submit_stub(cluster, stub_checkout, tmp_path, "stub.hold=true", flags=TWO_NODES)
    wait_until(lambda: len(list(tmp_path.glob("pretrain-attempt0-rank?.json"))) == 2, 90)
    cluster.command("scancel", "--batch", "--signal=USR2", str(job))  # what --signal=B:USR2@300 makes Slurm send
    ended = cluster.wait(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.log
    assert ended.log.count("stub stopped by SIGUSR2") == 2  # and not SIGTERM from kill-on-bad-exit
    first, second = (seen(tmp_path, f"pretrain-attempt{attempt}-rank0")["env"] for attempt in (0, 1))
    assert first["MASTER_PORT"] != second["MASTER_PORT"]
    assert "restart=0" in ended.log and "restart=1" in ended.log  # appended, not truncated


def test_requeues_are_bounded(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = run_stub(cluster, stub_checkout, tmp_path, "stub.exit=85", env={"ELECTRA_MAX_REQUEUES": "0"})
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 85, 0)
    assert "not requeued" in job.log


def test_scancel_lets_the_step_save_and_does_not_requeue(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = submit_stub(cluster, stub_checkout, tmp_path, "stub.hold=true", flags=TWO_NODES)
    wait_until(lambda: len(list(tmp_path.glob("pretrain-attempt0-rank?.json"))) == 2, 90)
    cluster.command("scancel", str(job))
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    log = tmp_path / f"electra-small-{job}.out"
    wait_until(lambda: "pretrain ended with exit code" in log.read_text(), 60)
    assert "stub stopped by SIGTERM" in log.read_text()


def test_site_settings_reach_the_ranks_without_the_submit_environment(cluster, stub_checkout, tmp_path):
    site = stub_checkout / "slurm/site.env"
    site.write_text(
        f'ELECTRA_PYTHON=(env FROM_SITE="x y" "{cluster.env["ELECTRA_PYTHON"]}")\nexport OTHER=$UNSET_HERE.\n'
    )
    try:
        job = run_stub(cluster, stub_checkout, tmp_path, flags=[*TWO_NODES, "--export=SLURM_CONF"])
    finally:
        site.unlink()
    assert job.exit_code == 0, job.log
    environment = seen(tmp_path, "pretrain-attempt0-rank1")["env"]
    assert (environment["FROM_SITE"], environment["OTHER"]) == ("x y", ".")


@pytest.mark.parametrize("fails", [False, True])
def test_each_node_stages_shards_once_before_the_ranks_start(fails, cluster, stub_checkout, tmp_path):
    local = str(tmp_path / "local disk")
    overrides = ["run.name=x", *(["stub.fail_stage=shards"] if fails else [])]
    flags = [*TWO_NODES, "--ntasks-per-node=2"]
    job = run_stub(cluster, stub_checkout, tmp_path, *overrides, flags=flags, env={"ELECTRA_STAGE_DIR": local})
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    config = f"{stub_checkout}/configs/small.yaml"
    copiers = [seen(tmp_path, path.stem) for path in tmp_path.glob("shards-*.json")]
    assert sorted(copier["env"]["SLURMD_NODENAME"] for copier in copiers) == ["n1", "n2"]
    for copier in copiers:
        assert copier["argv"] == ["shards", "stage", config, *overrides, "--to", local]
    ranks = [seen(tmp_path, f"pretrain-attempt0-rank{rank}") for rank in range(4)]
    assert all(rank["argv"] == ["pretrain", config, *overrides, f"data.local_dir={local}"] for rank in ranks)
    assert seen(tmp_path, "check")["argv"] == ["pretrain", config, *overrides, "--check"]
    assert ("WARNING: staging failed (1); nodes without copies read from shared storage" in job.log) == fails


def test_stop_signal_while_staging_requeues(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    job = submit_stub(cluster, stub_checkout, tmp_path, "stub.hold=true", env={"ELECTRA_STAGE_DIR": "/local"})
    wait_until(lambda: (tmp_path / "shards-attempt0-rank0.json").exists(), 90)
    cluster.command("scancel", "--batch", "--signal=USR2", str(job))
    ended = cluster.wait(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.log
    assert not (tmp_path / "pretrain-attempt0-rank0.json").exists()


@pytest.mark.parametrize(("given", "workers"), [([], "3"), (["data.num_workers=2"], "2")])
def test_tokenize_uses_the_cpus_of_the_task(given, workers, cluster, stub_checkout, tmp_path):
    arguments = ["configs/base.yaml", *given]
    job = cluster.run(stub_checkout / "slurm/tokenize.sh", *arguments, flags=["--cpus-per-task=3"], cwd=tmp_path)
    assert job.exit_code == 0, job.log
    argv = seen(tmp_path, "tokenize-attempt0-rank0")["argv"]
    assert [word for word in argv if word.startswith("data.num_workers")] == [f"data.num_workers={workers}"]


def test_pipeline_runs_three_jobs_in_order(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    jobs = cluster.submit_pipeline(stub_checkout, "configs/base.yaml", "run.name=x", cwd=tmp_path)
    assert [cluster.wait(job).state for job in jobs] == ["COMPLETED"] * 3
    written = [tmp_path / f"{stage}-attempt0-rank0.json" for stage in ("tokenize", "pretrain", "evaluate")]
    assert sorted(written, key=os.path.getmtime) == written
    assert cluster.fields(jobs[1])[0]["JobName"] == "electra-base"  # chosen by the name of CONFIG


def test_failed_tokenize_cancels_the_rest(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    jobs = cluster.submit_pipeline(stub_checkout, "configs/base.yaml", "stub.fail_stage=tokenize", cwd=tmp_path)
    assert [cluster.wait(job).state for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert not list(tmp_path.glob("pretrain-*"))


def test_refused_submission_leaves_nothing_in_the_queue(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    env = cluster.env | {"ELECTRA_TOKENIZE_SBATCH": "--hold", "ELECTRA_PRETRAIN_SBATCH": "--partition=none"}
    command = [stub_checkout / "slurm/pipeline.sh", "configs/base.yaml"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "nothing was left in the queue" in done.stderr
    assert cluster.command("squeue", "-h", "--name=electra-tokenize").strip() == ""


def test_slurm_itself_signals_before_the_time_limit(cluster: Cluster, limited_job: int):
    job = cluster.wait(limited_job)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert "stub stopped by SIGUSR2" in job.log and "restart 1 of at most 100" in job.log


def test_job_that_hangs_until_its_time_limit_is_requeued(cluster: Cluster, hanging_job: int):
    job = cluster.wait(hanging_job)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert "DUE TO TIME LIMIT" in job.log and "reached its time limit; requeueing" in job.log
