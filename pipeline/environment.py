"""What a run ran on: versions, commit, host, Slurm job. Recorded with every stage; nothing secret."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.redaction import redact_arguments

_PACKAGES = (
    "torch", "deepspeed", "mlflow", "transformers", "datasets", "sentencepiece", "tokenizers", "numpy", "triton",
    "megatron-core",
)  # fmt: skip
_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions of what matters, the command, the commit, the machine and the Slurm job."""
    return {
        "electra": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "git": git_commit(),
        "command": shlex.join(["electra", *redact_arguments(sys.argv[1:])]),
        "working_folder": os.getcwd(),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
    }


def git_commit() -> str | None:
    """Commit of the checkout this runs from, with ``-dirty`` when it was edited; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
