"""What the job scripts decide, without a Slurm: its commands and the program are stubs that obey the environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"

# Every command notes how it was called, then runs the test's shell code for it.
STUB = """\
#!/bin/bash
name=$(basename "$0")
echo "$name $*" >>"$CALLS"
code=STUB_$name
eval "${!code:-}"
"""
NO_QUICK_CHECK = {"ELECTRA_QUICK_CHECK": "0"}
NO_GPU = 'if [[ "$*" == *--check* ]]; then exit 78; fi'
QUICK_CHECK_NAMES_NO_GPU = 'if [[ "$*" == *quick* ]]; then echo "78 no GPU" >"$ELECTRA_EXIT_FILE"; exit 78; fi'
ALL_STAGES = {
    "STUB_python": "echo tokenize; echo pretrain; echo evaluate", "ELECTRA_PYTHON": "python",
    "ELECTRA_SITE_ENV": "/dev/null",
}  # fmt: skip
TIME_LIMIT = 'if [[ "$1 $2" == "show job" ]]; then echo "JobState=COMPLETING Reason=TimeLimit Dependency=(null)"; fi'
STOPS_AT_USR2 = "kill -USR2 $PPID; sleep 0.3; exit 140"  # its parent is the batch shell
SAVES_AT_TERM = "kill -TERM $PPID; sleep 0.3; exit 143"


class Login:
    """A folder to submit from, with stubs of Slurm's commands and of Python first on the path."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name in ("srun", "sbatch", "scontrol", "scancel", "python"):
            stub = folder / "bin" / name
            stub.write_text(STUB)
            stub.chmod(0o755)
        (folder / "c.yaml").touch()

    def run(self, command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        """Runs it with nothing but these variables; what the stubs noted is in ``called`` then."""
        self.calls.write_text("")
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return subprocess.run(
            command, cwd=self.folder, env={"PATH": path, "CALLS": str(self.calls)} | env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
        )  # fmt: skip

    def run_stage(self, stage: str, **env: str) -> subprocess.CompletedProcess[str]:
        """The batch shell of job 77 on n1 and n2, with ``run_stage`` in place of a whole script."""
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
               "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_END_TIME": "1", "SLURMD_NODENAME": "n1"}  # fmt: skip
        site = {"ELECTRA_PYTHON": "python", "ELECTRA_SITE_ENV": "/dev/null", "ELECTRA_RESTARTS": "0"}
        script = f'repo="{SLURM.parent}"; source "$repo/slurm/_common.sh"; run_stage {stage} c.yaml a=b'
        return self.run(["bash", "-c", script], **(job | site | env))

    def called(self, words: str) -> int:
        return sum(line.startswith(words) for line in self.calls.read_text().splitlines())


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


@pytest.mark.parametrize("code", [78, 1])
def test_check_that_fails_after_a_requeue_is_a_loss(code: int, login: Login):
    failing = {"STUB_python": NO_GPU.replace("78", str(code))}
    first = login.run_stage("pretrain", **failing)
    assert first.returncode == code and not login.called("scontrol requeue"), first.stdout

    later = login.run_stage("pretrain", SLURM_RESTART_COUNT="1", **failing)
    assert later.returncode == 1 and login.called("scontrol requeue 77") == 1, later.stdout
    assert "ended with exit code 1: the check failed on n1" in later.stdout
    assert not login.called("srun")

    last = login.run_stage("pretrain", SLURM_RESTART_COUNT="1", ELECTRA_MAX_REQUEUES="1", **failing)
    assert last.returncode == 1 and not login.called("scontrol requeue")
    assert "not requeued: already restarted 1 times" in last.stdout


@pytest.mark.parametrize("code", [64, 65, 85, 93])  # 85: the file STOP is there
def test_check_that_ends_for_good_does_so_after_a_requeue_too(code: int, login: Login):
    done = login.run_stage("pretrain", SLURM_RESTART_COUNT="1", STUB_python=NO_GPU.replace("78", str(code)))
    assert done.returncode == code and not login.called("scontrol requeue") and not login.called("srun")


def test_quick_check_without_a_gpu_after_a_requeue_is_a_loss(login: Login):
    first = login.run_stage("pretrain", STUB_srun=QUICK_CHECK_NAMES_NO_GPU)
    assert first.returncode == 78 and not login.called("scontrol requeue"), first.stdout
    later = login.run_stage("pretrain", SLURM_RESTART_COUNT="1", STUB_srun=QUICK_CHECK_NAMES_NO_GPU)
    assert later.returncode == 1 and login.called("scontrol requeue 77") == 1, later.stdout
    assert "the quick check failed (78)" in later.stdout and login.called("srun") == 1


def test_stop_signal_during_the_check_requeues(login: Login):
    done = login.run_stage("pretrain", STUB_python='if [[ "$*" == *--check* ]]; then kill -USR2 $PPID; exit 140; fi')
    assert done.returncode == 85 and login.called("scontrol requeue 77") == 1, done.stdout
    assert not login.called("srun")


@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "evaluate"])
def test_term_at_the_time_limit_requeues_before_slurm_kills(stage: str, login: Login):
    hangs = 'kill -TERM $PPID; for i in {1..100}; do if grep -q "^scontrol requeue" "$CALLS"; then exit 137; fi; '
    hangs += "sleep 0.05; done"
    done = login.run_stage(stage, STUB_srun=hangs, STUB_scontrol=TIME_LIMIT, **NO_QUICK_CHECK)
    assert done.returncode == 85 and login.called("scontrol requeue 77") == 1, done.stdout
    assert "reached its time limit; requeueing" in done.stdout


def test_term_of_a_user_never_requeues(login: Login):
    """Whatever the clock says: the limit of job 77, as it was when the job began, is long over."""
    done = login.run_stage("pretrain", STUB_srun=f"kill -USR2 $PPID; sleep 0.1; {SAVES_AT_TERM}", **NO_QUICK_CHECK)
    assert done.returncode == 85 and not login.called("scontrol requeue"), done.stdout
    assert "told to end by scancel or a preemption: it does not requeue itself" in done.stdout


@pytest.mark.parametrize("limit", ["", TIME_LIMIT])
def test_term_while_the_account_is_closed(limit: str, login: Login):
    """Slurm kills half a minute after TERM: the requeue does not wait until slow storage has the account."""
    slow = 'if [[ "$2" == pipeline.goodput ]]; then kill -TERM $(ps -o ppid= $PPID); for i in {1..LIMIT}; do '
    slow += 'if grep -q "^scontrol requeue" "$CALLS"; then break; fi; sleep 0.1; done; echo closed >>$CALLS; fi'
    slow = slow.replace("LIMIT", "100" if limit else "10")
    done = login.run_stage("pretrain", STUB_python=slow, STUB_srun="exit 7", STUB_scontrol=limit,
                           **NO_QUICK_CHECK)  # fmt: skip
    assert done.returncode == 1 and login.called("scontrol requeue 77") == (1 if limit else 0), done.stdout
    calls = login.calls.read_text()
    assert calls.find("scontrol requeue") < calls.index("closed"), calls


def test_acceptance_is_never_requeued(login: Login):
    for code, limit in ((STOPS_AT_USR2, ""), (SAVES_AT_TERM, TIME_LIMIT)):
        done = login.run_stage("acceptance", STUB_srun=code, STUB_scontrol=limit)
        assert done.returncode == 85 and not login.called("scontrol requeue"), done.stdout
        assert done.stdout.count("acceptance is never requeued") == 1


def test_ranks_that_end_together_to_start_again_have_no_failed_node(login: Login):
    together = "electra: after step 8 the weights differ; the same command goes on from the last checkpoint.\n"
    srun = "srun: error: n2: task 1: Exited with exit code 1\n"
    script = f'source "{SLURM}/_common.sh"; log=log; name_lost_node'
    for said, is_named in ((together + srun, False), (srun, True)):
        (login.folder / "log").write_text(said)
        done = login.run(["bash", "-c", script], SLURM_JOB_ID="77")
        assert ("node n2 failed first" in done.stdout) == is_named, done.stdout


@pytest.mark.parametrize(("stage", "most"), [("tokenize", 20), ("pretrain", 100), ("evaluate", 20)])
def test_requeues_have_a_bound_in_every_stage(stage: str, most: int, login: Login):
    env = {"STUB_srun": STOPS_AT_USR2} | NO_QUICK_CHECK
    login.run_stage(stage, SLURM_RESTART_COUNT=str(most - 1), **env)
    assert login.called("scontrol requeue 77") == 1
    done = login.run_stage(stage, SLURM_RESTART_COUNT=str(most), **env)
    assert not login.called("scontrol requeue") and f"already restarted {most} times" in done.stdout


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (93, 93), (7, 1)])
def test_account_is_closed_before_the_requeue_and_changes_no_exit_code(code: int, ended: int, login: Login):
    srun = f'echo "{code} because" >"$ELECTRA_EXIT_FILE"; exit {code}'
    python = 'if [[ "$2" == pipeline.goodput ]]; then exit 9; fi'
    done = login.run_stage("pretrain", STUB_srun=srun, STUB_python=python, **NO_QUICK_CHECK)
    assert done.returncode == ended, done.stdout
    calls = login.calls.read_text()
    assert login.called(f"python -m pipeline.goodput {code} c.yaml a=b") == 1, calls
    assert code != 7 or calls.index("pipeline.goodput") < calls.index("scontrol requeue")
    assert "the last seconds of this allocation are missing in the run's account" in done.stdout


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("script", ["chain.sh", "pipeline.sh"])
def test_jobs_before_a_refused_one_are_cancelled(script: str, cancels: bool, login: Login):
    """Multi-cluster Slurm answers "id;cluster"; a plain scancel then fails."""
    sbatch = 'if (($(grep -c ^sbatch "$CALLS") == 2)); then exit 1; fi; echo "4711;far"'
    arguments = ["3", f"{SLURM}/pretrain_small.sh"] if script == "chain.sh" else ["c.yaml"]
    env = {"STUB_sbatch": sbatch, "STUB_scancel": f"exit {0 if cancels else 1}"} | ALL_STAGES
    done = login.run([f"{SLURM}/{script}", *arguments], **env)
    assert done.returncode == 1 and login.called("sbatch") == 2
    assert login.called("scancel 4711") == 1
    assert ("nothing was left in the queue" if cancels else "4711 could not be cancelled") in done.stdout


def test_pipeline_submits_the_stages_that_the_program_names(login: Login):
    command, sbatch = [f"{SLURM}/pipeline.sh", "c.yaml", "a=b"], {"STUB_sbatch": "echo 4711"}
    whole = login.run(command, **ALL_STAGES, **sbatch)
    assert whole.returncode == 0 and login.called("sbatch") == 3, whole.stdout
    assert login.called("python -m pipeline config") == 1
    two = login.run(command, **ALL_STAGES | {"STUB_python": "echo tokenize; echo pretrain"}, **sbatch)
    assert two.returncode == 0 and login.called("sbatch") == 2, two.stdout
    assert "evaluate is not submitted: evaluate.tasks is empty" in two.stdout
    wrong = login.run(command, **ALL_STAGES | {"STUB_python": "echo no such key; exit 78"}, **sbatch)
    assert wrong.returncode == 78 and not login.called("sbatch"), wrong.stdout


def test_pipeline_does_not_ask_a_python_that_only_srun_can_start(login: Login):
    site = login.folder / "site.env"
    site.write_text("ELECTRA_SRUN_FLAGS=(--container-image=x)\nexport SEEN=yes\n")
    env = ALL_STAGES | {"ELECTRA_SITE_ENV": str(site), "STUB_sbatch": 'echo "4711${SEEN:-}"'}
    done = login.run([f"{SLURM}/pipeline.sh", "c.yaml"], **env)
    assert done.returncode == 0 and login.called("sbatch") == 3 and not login.called("python"), done.stdout
    assert "tokenize 4711\n" in done.stdout  # the site's settings are the jobs' business


@pytest.mark.parametrize("env", [{"STUB_python": "exit 1"}, {"ELECTRA_PYTHON": "/nowhere/python"}])
def test_pipeline_submits_all_where_the_program_does_not_run(login: Login, env: dict[str, str]):
    done = login.run([f"{SLURM}/pipeline.sh", "c.yaml"], **ALL_STAGES | {"STUB_sbatch": "echo 4711"} | env)
    assert done.returncode == 0 and login.called("sbatch") == 3, done.stdout
    assert "the program does not run here (1): all stages are submitted" in done.stdout


def test_generations_know_their_chain_without_the_submit_environment(login: Login):
    """As with SBATCH_EXPORT=NONE: of what chain.sh sets, Slurm passes on the job's name alone."""
    login.run([f"{SLURM}/chain.sh", "2", f"{SLURM}/pretrain_small.sh"], STUB_sbatch="echo 4711")
    (name,) = {word.partition("=")[2] for word in login.calls.read_text().split() if word.startswith("--job-name=")}
    env = {"SLURM_JOB_NAME": name} | NO_QUICK_CHECK
    first = login.run_stage("pretrain", STUB_srun='echo "93 because" >"$ELECTRA_EXIT_FILE"; exit 93', **env)
    assert first.returncode == 93 and (login.folder / f".{name}").exists(), first.stdout
    second = login.run_stage("pretrain", **env)
    assert second.returncode == 93 and "an earlier generation of this chain ended with 93: because" in second.stdout
    assert not login.called("srun")
