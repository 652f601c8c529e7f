"""`srun electra tune`, as a user types it: the tasks find each other, and the link between them is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from slurm_cluster import TWO_NODES, Cluster
from test_doctor import CONFIG, REPOSITORY

from pipeline.measured import read_measurements

pytestmark = pytest.mark.slurm

# Nothing is set for a rendezvous; what another step has left there does not count.
SCRIPT = """\
#!/bin/bash
export PYTHONPATH={repository} MASTER_ADDR=192.0.2.1 MASTER_PORT=1
srun --unbuffered {python} -m pipeline tune tiny.yaml --seconds 1
"""


def test_tasks_on_two_nodes_are_measured_at_once(cluster: Cluster, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    script = tmp_path / "tune.sh"
    script.write_text(SCRIPT.format(repository=REPOSITORY, python=sys.executable))
    job = cluster.run(script, flags=[*TWO_NODES, "--output=%j.out", "--error=%j.err"], cwd=tmp_path)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    (path,) = (tmp_path / "runs/measured").glob("*.json")
    (found,) = read_measurements(path)
    assert found.link and (found.link.processes, found.link.processes_per_machine) == (2, 1)
    assert job.log.splitlines()[-1].startswith("train.micro_batch_size=")
