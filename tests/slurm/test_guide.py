"""The guide's commands as they stand, from a checkout to compared runs, on a real two-node Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster

from tests.pages import copy_checkout, run_page, write_electra

pytestmark = pytest.mark.slurm


@pytest.mark.usefixtures("limited_job", "hanging_job")  # on the other cluster; test_job_scripts.py, the next, has them
@pytest.mark.timeout(900)
def test_a_newcomer_gets_from_a_checkout_to_compared_runs(cluster_without_gpus: Cluster, tmp_path: Path) -> None:
    cluster = cluster_without_gpus
    checkout = copy_checkout(tmp_path / "electra")
    config = checkout / "configs/rehearsal.yaml"
    text = config.read_text()
    assert "device: auto" in text
    config.write_text(text.replace("device: auto", "device: cpu"))  # what the guide tells users without GPUs to do
    guide = checkout / "slurm/GUIDE.md"
    text = guide.read_text()
    assert "gpus=1\n" in text
    guide.write_text(text.replace("gpus=1\n", "gpus=0\n"))
    electra = write_electra(tmp_path / "bin", checkout, sys.executable)
    env = cluster.env | {"PATH": f"{electra}{os.pathsep}{cluster.env['PATH']}", "ELECTRA_REPO": str(checkout)}
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    try:
        run_page(guide, checkout, outputs, env, timeout_s=800)
    except AssertionError as error:
        logs = [path.read_text(errors="replace")[-3000:] for path in sorted(checkout.glob("electra-*.out"))]
        raise AssertionError("\n==\n".join([str(error), *logs])) from None

    runs = checkout / "runs/runs"
    journal = (runs / "rehearsal/pretrain/journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in journal] == list(range(10, 101, 10))
    logs = "".join(path.read_text(errors="replace") for path in checkout.glob("electra-small-*.out"))
    assert logs.count("starting it again in this allocation") == 1
    for name in ("rehearsal", "rehearsal-slow"):
        assert "authorship" in json.loads((runs / name / "evaluate/results.json").read_text())["tasks"]
    assert "optimizer.lr" in (checkout / "comparison/compare.html").read_text()
    assert {path.name for path in (checkout / "exported").iterdir()} == {"discriminator", "generator"}
