"""The tests that need a GPU, run by pytest in a process of their own; their counts."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from processes import REPOSITORY, clean_environment
from section import CheckFailedError, Context, NotRunError

_TAIL_CHARACTERS = 4000


def run(context: Context) -> None:
    """Runs ``pytest -m gpu tests/gpu``.

    Raises:
        NotRunError: No GPU.
        CheckFailedError: A test failed, or none passed.
    """
    if not context.is_cuda:
        raise NotRunError("the tests in tests/gpu need a CUDA device; this report is from the CPU")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
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
    return [("tests in tests/gpu", ", ".join(parts) or "no report")]
