"""What a user asks of a cluster before trusting it, on a real two-node Slurm with CPU ranks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from slurm_cluster import TWO_NODES, Cluster, Job

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]
TINY = [
    "model.size=tiny",
    "model.hidden_layers=2",
    "model.hidden_size=64",
    "model.attention_heads=2",
    "model.feed_forward_size=128",
    "model.embedding_size=64",
    "data.sequence_length=64",
    "tokenizer.vocab_size=512",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "launch.device=cpu",
    "launch.threads_per_process=1",
]

# One step of two ranks as the job scripts start it, without their check and their log.
QUICK = """\
#!/bin/bash
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) PYTHONPATH={repository}
srun --kill-on-bad-exit=1 --wait=60 --unbuffered {python} acceptance --quick {repository}/configs/small.yaml "$@"
"""

# In place of `python -m pipeline`: rank 1, which is on n2, is made an odd one.
ODD = """\
#!/bin/bash
if [ "$SLURM_PROCID" = 1 ]; then {odd}; fi
{usual}
exec {python} -m pipeline "$@"
"""


def run_quick(cluster: Cluster, folder: Path, odd: str = ":", usual: str = ":") -> Job:
    """Two ranks on two nodes; ``odd`` is shell code that rank 1 runs first, ``usual`` what all run then."""
    python = folder / "python"
    python.write_text(ODD.format(odd=odd, usual=usual, python=sys.executable))
    python.chmod(0o755)
    script = folder / "quick.sh"
    script.write_text(QUICK.format(repository=REPOSITORY, python=python))
    return cluster.run(script, "run.dir=runs", *TINY, flags=[*TWO_NODES, "--output=%j.out"], cwd=folder)


def states(log: str) -> dict[str, str]:
    return {name: state for state, name in re.findall(r"(?m)^(OK|WARNING|FAILED) +(\w[\w.-]*(?: \w+)*)  ", log)}


def test_quick_part_passes_on_two_nodes_within_a_minute(cluster: Cluster, tmp_path: Path):
    job = run_quick(cluster, tmp_path)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    found = states(job.log)
    assert list(found) == [
        "processes", "device", "versions", "run.dir", "clocks", "free space", "product", "speed", "all-reduce",
    ]  # fmt: skip
    assert {name for name, state in found.items() if state != "OK"} <= {"speed"}  # both nodes share two cores
    assert "2 on 2 nodes (n1, n2)" in job.log and job.run_time_s <= 240
    assert not list((tmp_path / "runs/acceptance").iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("odd", "check", "words"),
    [
        ("mkdir -p other && cd other", "run.dir", r"n2 \(rank 1\): rank 0's file is not to be seen"),
        (
            f'exec {sys.executable} -c \'import pipeline; pipeline.__version__ = "9.9"; '
            'from pipeline import cli; cli.main()\' "$@"',
            "versions",
            r"electra (0\S+, but 9\.9|9\.9, but 0\S+) on n\d \(rank \d\)",
        ),
    ],
    ids=["a folder of its own", "another version"],
)
def test_quick_part_names_the_odd_node(odd: str, check: str, words: str, cluster: Cluster, tmp_path: Path):
    job = run_quick(cluster, tmp_path, odd)
    assert (job.state, job.exit_code) == ("FAILED", 1), job.log
    assert [name for name, state in states(job.log).items() if state == "FAILED"] == [check], job.log
    assert re.search(rf"(?m)^FAILED +{check} .*{words}", job.log), job.log
    assert "Traceback" not in job.log and job.run_time_s <= 240


def test_quick_part_names_who_does_not_come(cluster: Cluster, tmp_path: Path):
    impatient = (
        f"exec {sys.executable} -c 'from pipeline.meeting import Meeting; Meeting.__init__.__defaults__ = (3.0,); "
        'from pipeline import cli; cli.main()\' "$@"'
    )
    job = run_quick(cluster, tmp_path, odd="sleep 300", usual=impatient)
    assert job.state == "FAILED" and job.exit_code in (1, 137, 143), job.log  # srun ends the one that sleeps
    assert re.search(r"1 of 2 processes have not come within 3 s: rank 1; no sign of n2;", job.log), job.log
    assert "Traceback" not in job.log and job.run_time_s <= 240


@pytest.mark.soak
def test_whole_acceptance_passes_on_two_nodes(cluster: Cluster, tmp_path: Path):
    job = cluster.run(
        REPOSITORY / "slurm/acceptance.sh", "run.dir=runs", *TINY, flags=TWO_NODES, cwd=tmp_path, timeout_s=540
    )
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    report = json.loads((tmp_path / "runs/acceptance/report.json").read_text())
    assert report["passed"] and report["missing"] == []
    checks = {check["name"]: check for part in report["parts"].values() for check in part["checks"]}
    resume, parity = checks["resume"]["numbers"], checks["ZeRO parity"]["numbers"]
    assert resume["resumed"] == resume["unbroken"] and 0 < resume["resumed_from"] < resume["killed_at"]
    assert len(parity["losses"]) == 4 and max(parity["relative"].values()) < 1e-4
    assert checks["bandwidth"]["numbers"]["bytes_per_s"] > 0 and len(checks["steps"]["numbers"]["mfu_pct"]) == 2
    assert checks["processes"]["numbers"]["nodes"] == ["n1", "n2"]
    page = (tmp_path / "runs/acceptance/report.md").read_text()
    assert page.startswith("# Acceptance: PASSED") and "2 on n1, n2" in page
    assert re.search(r"(?m)^PASSED: \d+ checks", job.log)
