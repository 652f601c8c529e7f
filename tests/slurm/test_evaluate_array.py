"""A matrix of tasks and seeds by an array of jobs on two nodes: each unit once, the scores of one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from slurm_cluster import FINISHED, Cluster, wait_until

from tests.conftest import Electra

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = 3


def write_tasks(folder: Path) -> list[str]:
    """Three tasks that take seconds."""
    paths = []
    for task in ("one", "two", "three"):
        for split, count in (("train", 64), ("dev", 16)):
            rows = [{"text": f"{'ab'[n % 2]} {task} {n}", "label": "xy"[n % 2]} for n in range(count)]
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = folder / f"{task}.yaml"
        path.write_text(
            f"name: {task}\nkind: classification\ntrain: {task}_train.jsonl\ndev: {task}_dev.jsonl\ntext: [text]\n"
        )
        paths.append(str(path))
    return paths


def test_two_nodes_share_a_matrix(
    cluster: Cluster, electra: Electra, tiny_project: list[str], run_folder, tmp_path: Path
):
    kept = [override for override in tiny_project if not override.startswith("run.name=")]
    config = str(REPOSITORY / "configs/large.yaml")
    electra("run", config, *kept, "run.name=to_score", "--until", "pretrain")
    exported = tmp_path / "exported"
    electra("export", run_folder("to_score"), exported)
    recipe = [
        f"evaluate.tasks={json.dumps(write_tasks(tmp_path))}", f"evaluate.seeds={SEEDS}", "evaluate.epochs=12",
        f"evaluate.checkpoint={exported}", "evaluate.max_length=32",
    ]  # fmt: skip
    electra("evaluate", config, *kept, *recipe, "run.name=alone")
    wait_until(lambda: "2 idle" in cluster.command("sinfo", "-h", "-o", "%D %t"), timeout_s=60)
    job = cluster.submit(
        REPOSITORY / "slurm/evaluate.sh", config, *kept, *recipe, "run.name=array",
        flags=["--array=0-1", "--exclusive", "--gpus-per-node=0", "--cpus-per-task=1"], cwd=tmp_path,
    )  # fmt: skip

    def record() -> str:
        return cluster.command("scontrol", "show", "job", str(job))

    def logs() -> list[str]:
        return [path.read_text() for path in sorted(tmp_path.glob("electra-evaluate-*.out"))]

    wait_until(
        lambda: len(states := re.findall(r"JobState=(\S+)", record())) == 2 and set(states) <= set(FINISHED),
        timeout_s=400,
        report=lambda: record() + "\n".join(logs()),
    )
    assert re.findall(r"JobState=(\S+)", record()) == ["COMPLETED"] * 2, "\n".join(logs())
    assert set(re.findall(r"BatchHost=(\S+)", record())) == {"n1", "n2"}
    said = [re.findall(r"(\w+, seed \d): accuracy", log) for log in logs()]
    every = sorted(f"{task}, seed {seed}" for task in ("one", "two", "three") for seed in range(1, SEEDS + 1))
    assert sorted(said[0] + said[1]) == every
    assert all(said), "one of the nodes did nothing"
    alone, array = (json.loads((run_folder(name) / "evaluate/results.json").read_text()) for name in ("alone", "array"))
    assert array["tasks"] == alone["tasks"]
    assert json.loads((run_folder("array") / "evaluate/stage.json").read_text())["state"] == "done"
