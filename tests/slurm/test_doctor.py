"""`electra doctor` on all nodes of an allocation, on a real two-node Slurm: one report, and the odd node named."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, Job

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]
NO_GPUS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10")

CONFIG = """
run: {name: tiny, dir: runs}
launch: {device: cpu, threads_per_process: 1}
data:
  corpora: [{name: made_up, path: corpus.txt}]
  sequence_length: 32
tokenizer: {vocab_size: 300}
model: {size: tiny, hidden_layers: 2, hidden_size: 32, attention_heads: 2, feed_forward_size: 64, embedding_size: 24}
train: {steps: 20, global_batch_size: 8, precision: fp32}
optimizer: {lr: 5e-4}
tracking: {uri: none}
"""

# A user's own line, with nothing set for a rendezvous; python is a wrapper that makes the task on n2 an odd one.
SCRIPT = """\
#!/bin/bash
export PYTHONPATH={repository} RANK=0 WORLD_SIZE=1
srun --unbuffered {python} doctor "$@"
"""
WRAPPER = """\
#!/bin/bash -e
if [ "$SLURMD_NODENAME" = n2 ]; then {odd}; fi
exec {python} -m pipeline "$@"
"""
OTHER_VERSION = (
    f'exec {sys.executable} -c \'import pipeline; pipeline.__version__ = "9.9"; '
    'from pipeline import cli; cli.main()\' "$@"'
)


def run_doctor(cluster: Cluster, folder: Path, *arguments: str, odd: str = ":", flags=NO_GPUS) -> Job:
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "corpus.txt").write_text("some text\n")
    python = folder / "python"
    python.write_text(WRAPPER.format(odd=odd, python=sys.executable))
    python.chmod(0o755)
    script = folder / "doctor.sh"
    script.write_text(SCRIPT.format(repository=REPOSITORY, python=python))
    return cluster.run(script, *arguments, flags=[*flags, "--output=%j.out"], cwd=folder, timeout_s=240)


def of_state(log: str, state: str) -> dict[str, str]:
    """What is said of each check of that state; names are 32 characters wide."""
    return {name.strip(): rest for name, rest in re.findall(rf"(?m)^{state.upper():8} (.{{32}}) (.*)$", log)}


def test_two_nodes_make_one_report(cluster: Cluster, tmp_path: Path):
    job = run_doctor(cluster, tmp_path, "tiny.yaml")
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    good = of_state(job.log, "ok")
    assert good["processes"] == "2 on 2 nodes: n1, n2 (2 nodes)"
    for name in ("python", "torch", "run.dir", "writing", "shared folder", "clocks", "corpus made_up", "slurm"):
        assert good[name].endswith(" (2 nodes)"), job.log
    assert re.fullmatch(r"n1: \d+: 2 nodes, 2 tasks, no GPUs in all; this step has 2 tasks", good["job"]), job.log
    assert "launcher" in of_state(job.log, "warning")  # the script left a RANK, which did not mislead it
    assert job.log.count("nodes examined:") == 1
    assert not list(tmp_path.glob(".electra-doctor*")) and not (tmp_path / "runs").exists()


def test_folder_of_its_own_is_named_with_its_node(cluster: Cluster, tmp_path: Path):
    """With two tasks on each node, of which the first examines it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "tiny.yaml").write_text(CONFIG)
    (other / "corpus.txt").write_text("some text\n")
    flags = ("--nodes=2", "--ntasks-per-node=2", *NO_GPUS[2:])
    job = run_doctor(cluster, tmp_path, "tiny.yaml", odd=f"cd {other}", flags=flags)
    assert (job.state, job.exit_code) == ("FAILED", 78), job.log
    assert list(of_state(job.log, "failure")) == ["shared folder"], job.log
    assert "n2: " in of_state(job.log, "failure")["shared folder"]
    assert of_state(job.log, "ok")["processes"] == "4 on 2 nodes: n1, n2 (2 nodes)"
    assert "what n1 writes there is not seen from this node; set run.dir to storage that all nodes mount" in job.log
    assert "electra: doctor: shared folder" in job.log and "Traceback" not in job.log
    assert job.log.index("nodes examined:") < job.log.index("srun: error:"), "the others end after the report"


def test_other_version_and_gpus_without_torch_are_named(cluster: Cluster, tmp_path: Path):
    """GPUs that Slurm gives and a torch for CPUs does not see fail on both nodes, the version on one of them."""
    flags = (*NO_GPUS, "--gpus-per-node=1", "--error=%j.err")
    job = run_doctor(cluster, tmp_path, "--json", odd=OTHER_VERSION, flags=flags)
    assert (job.state, job.exit_code) == ("FAILED", 78), job.log
    report = json.loads(job.log)
    failed = {(check["name"], check["node"]): check for check in report["checks"] if check["state"] == "failure"}
    (odd,) = (check for (name, _), check in failed.items() if name == "electra")
    assert re.fullmatch(r"9\.9, and 0\S+ on the others|0\S+, and 9\.9 on the others", odd["value"])
    assert {("gpus", "n1"), ("gpus", "n2")} < failed.keys()
    assert "is a build for CPUs" in failed["gpus", "n1"]["value"] and report["exit_code"] == 78


def test_job_script_looks_at_each_node_with_the_sites_settings(cluster: Cluster, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "corpus.txt").write_text("some text\n")
    (tmp_path / "site.env").write_text(f"ELECTRA_PYTHON=({sys.executable})\nexport GLOO_SOCKET_IFNAME=ib9\n")
    flags = ["--ntasks-per-node=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", "--output=%j.out"]
    env = {"ELECTRA_SITE_ENV": str(tmp_path / "site.env")}
    script = REPOSITORY / "slurm/doctor.sh"
    job = cluster.run(script, "tiny.yaml", flags=flags, env=env, cwd=tmp_path, timeout_s=240)
    assert (job.state, job.exit_code) == ("FAILED", 78), job.log
    assert list(of_state(job.log, "failure")) == ["GLOO_SOCKET_IFNAME"], job.log
    assert of_state(job.log, "ok")["processes"] == "2 on 2 nodes: n1, n2 (2 nodes)"
    assert not list(tmp_path.glob(".electra-exit*"))
