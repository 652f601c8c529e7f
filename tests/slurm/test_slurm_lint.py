"""What can be read off the job scripts without a Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sh"))
JOBS = [script for script in SCRIPTS if script.name not in ("_common.sh", "pipeline.sh", "chain.sh")]
SIZES = {"large": (8, 8), "base": (1, 8), "small": (1, 1)}  # nodes, GPUs per node


def by_name(script: Path) -> str:
    return script.name


def header(script: Path) -> dict[str, str]:
    """The #SBATCH lines before the first command; Slurm ignores later ones."""
    head = script.read_text().split("\nset -euo pipefail\n")[0]
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=?(.*)$", head))


def test_there_are_the_promised_scripts():
    sizes = {f"pretrain_{size}.sh" for size in SIZES}
    assert {script.name for script in JOBS} == {"tokenize.sh", "evaluate.sh", "acceptance.sh", "doctor.sh"} | sizes


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_strict_mode_and_no_pipe_that_hides_a_failure(script: Path):
    text = script.read_text()
    assert re.search(r"(?m)^set -euo pipefail$", text)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"\|\s*(tee|head|grep)\b|set -x|printenv", code)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", JOBS, ids=by_name)
def test_header_survives_a_requeue(script: Path):
    lines = header(script)
    assert script.read_text().count("#SBATCH") == len(lines)
    assert lines["output"] == "%x-%j.out"  # a folder in it would have to exist in every submit directory
    assert lines["open-mode"] == "append"
    assert lines.get("signal") == (None if script.name == "doctor.sh" else "B:USR2@300")  # it has nothing to save
    assert lines["kill-on-invalid-dep"] == "yes"
    assert ("no-requeue" if script.name in ("acceptance.sh", "doctor.sh") else "requeue") in lines
    assert "time" in lines and lines["job-name"].startswith("electra-")
    assert not lines.keys() & {"account", "partition", "qos", "chdir"}  # the site's own


@pytest.mark.parametrize("size", SIZES)
def test_one_task_per_gpu(size: str):
    lines = header(SLURM / f"pretrain_{size}.sh")
    nodes, gpus = SIZES[size]
    assert int(lines["nodes"]) == nodes
    assert int(lines["gpus-per-node"]) == int(lines["ntasks-per-node"]) == gpus


def test_job_scripts_find_the_repository_with_the_same_lines():
    blocks = {re.search(r"(?s)\nset -euo pipefail\n.*_common\.sh\"\n", script.read_text())[0] for script in JOBS}
    assert len(blocks) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM / "site.env.example"], ids=by_name)
def test_shellcheck(script: Path):
    if shutil.which("shellcheck") is None:
        required = os.environ.get("ELECTRA_REQUIRE_ALL") == "1"
        pytest.fail("shellcheck is not installed") if required else pytest.skip("shellcheck is not installed")
    command = [
        "shellcheck",
        "--shell=bash",
        "--external-sources",
        "--source-path",
        str(SLURM.parent),
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
