"""The tests that need a GPU or use one where there is one, run by pytest in a process of its own; their counts."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from processes import REPOSITORY, clean_environment
from section import CheckFailedError, Context, NotRunError

PATHS = (
    "tests/gpu",
    "tests/model/test_adamw.py",
    "tests/model/test_attention_triton.py",
    "tests/model/test_pointwise_triton.py",
)
"""Those in tests/model run Triton's kernels on the GPU; without one, in its interpreter."""
_WORKERS = "8"  # most of the time is Triton's compiler's
_TAIL_CHARACTERS = 4000


def run(context: Context) -> None:
    """Runs pytest on ``PATHS``.

    Raises:
        NotRunError: No GPU.
        CheckFailedError: A test failed, or none passed.
    """
    if not context.is_cuda:
        raise NotRunError("the tests in tests/gpu need a CUDA device; this report is from the CPU")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", *PATHS, f"--junitxml={report}", "-p", "no:cacheprovider", "-m", "not slurm"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", _WORKERS]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=clean_environment() | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            capture_output=True,
            text=True,
            timeout=max(1.0, context.left_s() - 5),
            check=False,
        )
        context.results["exit_code"] = done.returncode
        context.results["output_tail"] = (done.stdout + done.stderr)[-_TAIL_CHARACTERS:]
        if report.exists():
            context.results["counts"] = _counts(report)
    counts = context.results.get("counts", {})
    if done.returncode != 0 or counts.get("passed", 0) == 0:
        raise CheckFailedError(f"pytest ended with {done.returncode}, counts {counts}")


def _counts(report: Path) -> dict[str, int]:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    counts = results.get("counts", {})
    parts = [f"{counts[name]} {name}" for name in ("passed", "failures", "errors", "skipped") if name in counts]
    return [("tests on the GPU", ", ".join(parts) or "no report")]
