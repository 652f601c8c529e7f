"""One corpus tokenized by an array of jobs on two nodes: the same bytes as one process writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm_cluster import FINISHED, Cluster, wait_until

from tests.conftest import Electra

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]


def files_of(run_dir: Path) -> dict[str, bytes]:
    roots = [run_dir / "shards", run_dir / "tokenizers"]
    return {str(p.relative_to(run_dir)): p.read_bytes() for root in roots for p in root.rglob("*") if p.is_file()}


def test_an_array_of_two_nodes_writes_what_one_process_writes(
    cluster: Cluster, electra: Electra, tiny_project: list[str], tmp_path: Path
):
    kept = [o for o in tiny_project if not o.startswith(("run.dir=", "run.name=", "data.num_workers="))]
    common = [*kept, "run.name=array", "data.task_bytes=8192"]
    alone = [f"run.dir={tmp_path / 'alone'}", "data.num_workers=1"]
    electra("tokenize", REPOSITORY / "configs/large.yaml", *common, *alone)
    job = cluster.submit(
        REPOSITORY / "slurm/tokenize.sh", "configs/large.yaml", *common, f"run.dir={tmp_path / 'array'}",
        flags=["--array=0-1", "--exclusive", "--cpus-per-task=2"], cwd=tmp_path,
    )  # fmt: skip

    def record() -> str:
        return cluster.command("scontrol", "show", "job", str(job))

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("electra-tokenize-*.out")))

    wait_until(
        lambda: len(states := re.findall(r"JobState=(\S+)", record())) == 2 and set(states) <= set(FINISHED),
        timeout_s=300,
        report=lambda: record() + logs(),
    )
    assert re.findall(r"JobState=(\S+)", record()) == ["COMPLETED"] * 2, logs()
    assert set(re.findall(r"BatchHost=(\S+)", record())) == {"n1", "n2"}
    found, expected = files_of(tmp_path / "array"), files_of(tmp_path / "alone")
    assert len([name for name in expected if "/tasks/" in name]) > 30
    assert found == expected
    assert "tokens/s" in logs()


def test_a_stopped_element_stops_and_requeues_itself_alone(cluster: Cluster, stub_checkout: Path, tmp_path: Path):
    """One element of an array has the array's own id, by which Slurm understands all of them."""
    script, flags = stub_checkout / "slurm/tokenize.sh", ["--array=0-1", "--exclusive", "--cpus-per-task=1"]
    job = cluster.submit(script, "configs/large.yaml", "stub.hold=true", flags=flags, cwd=tmp_path)

    def records() -> dict[str, str]:
        """What Slurm knows of each element, by its own job id."""
        shown = cluster.command("scontrol", "show", "job", str(job)).split("\n\n")
        return {match[1]: record for record in shown if (match := re.search(r"JobId=(\d+)", record))}

    def log(own_id: str) -> str:
        path = tmp_path / f"electra-tokenize-{own_id}.out"
        return path.read_text() if path.exists() else ""

    try:
        wait_until(lambda: len(records()) == 2 and all("[slurm] tokenize" in log(own) for own in records()), 60)
        wait_until(lambda: len(list(tmp_path.glob("tokenize-attempt0-rank0-element*.json"))) == 2, 30)
        (other,) = set(records()) - {str(job)}
        element = re.search(r"ArrayTaskId=(\d+)", records()[str(job)])
        assert element
        cluster.command("scancel", "--batch", "--signal=USR2", f"{job}_{element[1]}")
        wait_until(lambda: "Restarts=1" in records()[str(job)], 60, report=lambda: log(str(job)))
        assert "stub stopped by SIGUSR2" in log(str(job))
        assert "stub stopped" not in log(other)
        assert "JobState=RUNNING" in records()[other]
        assert "Restarts=0" in records()[other]
    finally:
        cluster.command("scancel", "--full", "--signal=KILL", str(job), check=False)
        cluster.command("scancel", str(job), check=False)
