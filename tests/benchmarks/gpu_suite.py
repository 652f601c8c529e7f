"""Everything that a machine with one GPU is asked for, in one command and one report.

    python tests/benchmarks/gpu_suite.py --out report.json

Each section runs in a process of its own, so that neither an exception, nor a broken CUDA context,
nor a section that hangs keeps the others from their numbers. The exit code is 1 when one failed.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from apex_build import PACKAGES
from processes import REPOSITORY, clean_environment
from section import Context, NotRunError, SectionTimeoutError

FORMAT_VERSION = 1
_GRACE_S = 15.0  # between a section's own timeout and its death
_LEAST_S = 10.0  # a section is not begun with less


@dataclass(frozen=True)
class Section:
    """A module with ``run(context)`` and ``summarize(results)``.

    Attributes:
        limit_s: Most seconds of its process.
        environment: Variables that must be there before PyTorch starts.
        on_cpu: More of them there.
    """

    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    on_cpu: dict[str, str] = field(default_factory=dict)


SECTIONS = {
    "ceilings": Section(60),
    "apex_build": Section(200),
    "kernels": Section(170, on_cpu={"TRITON_INTERPRET": "1"}),
    "large_step": Section(230),
    "step_profile": Section(60),
    "gpu_tests": Section(110),
    "determinism": Section(150, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
}
"""In the order in which they run, the most important numbers first: the last ones get what is left."""


def main() -> int:
    """Runs the suite, or one of its sections when it is the process of that section."""
    arguments = _parse()
    sys.path.insert(0, str(REPOSITORY))  # it need not be installed
    if arguments.section:
        run_section(arguments)
        return 0
    report = run_suite(arguments)
    from report import markdown  # the repository's own modules: importable from here on

    print(markdown(report))
    for error in report["errors"]:
        print(f"{error['section']}: {error['message']}", file=sys.stderr)
    return 1 if report["errors"] else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON report to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU: tests the suite, not the machine")
    parser.add_argument("--only", type=_section_names, default=tuple(SECTIONS), help="sections, divided by commas")
    parser.add_argument("--seed", type=int, help="of the random inputs; another one each time unless given")
    parser.add_argument("--budget-s", type=float, default=520, help="seconds for all sections together")
    parser.add_argument("--git-commit", help="where the checkout has no .git")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _section_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SECTIONS)}")
    return names


def run_suite(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen sections; the report is on disk after each of them."""
    from pipeline.environment import git_commit

    begin = time.monotonic()
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "command": ["python", "tests/benchmarks/gpu_suite.py", *sys.argv[1:]],
        "git_commit": arguments.git_commit or git_commit(),
        "started_unix_s": time.time(),
        "device": arguments.device,
        "tiny": arguments.tiny,
        "machine": None,
        "versions": None,
        "sections": {},
        "errors": [],
    }
    packages = tempfile.TemporaryDirectory()  # of what a section builds for the others
    for name, section in SECTIONS.items():
        limit_s = section.limit_s * (5 if arguments.tiny else 1)  # tiny is for any machine, and measures nothing
        left_s = arguments.budget_s - (time.monotonic() - begin)
        if name not in arguments.only:
            outcome = _outcome("not_run", "not chosen with --only")
        elif left_s < _LEAST_S:
            outcome = _outcome("failed", f"not begun: the budget of {arguments.budget_s:g} s is spent")
        else:
            print(f"{name} …", file=sys.stderr, flush=True)
            outcome = _run_process(name, section, min(limit_s, left_s), arguments, packages.name)
        for key in ("machine", "versions"):
            report[key] = report[key] or outcome.pop(key, None)
            outcome.pop(key, None)
        report["sections"][name] = outcome
        if outcome["status"] == "failed":
            report["errors"].append({"section": name, "message": outcome["reason"]})
        report["wall_s"] = time.monotonic() - begin
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    packages.cleanup()
    return report


def _outcome(status: str, reason: str | None) -> dict[str, Any]:
    return {"status": status, "reason": reason, "traceback": None, "wall_s": 0.0, "results": {}, "summary": []}


def _environment(section: Section, device: str, packages: str) -> dict[str, str]:
    environment = clean_environment() | {PACKAGES: packages}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], packages])
    environment.pop("TRITON_INTERPRET", None)  # would take the kernels from the GPU
    return environment | section.environment | (section.on_cpu if device == "cpu" else {})


def _run_process(
    name: str, section: Section, limit_s: float, arguments: argparse.Namespace, packages: str
) -> dict[str, Any]:
    """A section in its process; whatever happens to it, an outcome."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--section", name, "--out", str(out)]
        command += ["--device", arguments.device, "--limit-s", str(limit_s), *(["--tiny"] if arguments.tiny else [])]
        command += [] if arguments.seed is None else ["--seed", str(arguments.seed)]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=_environment(section, arguments.device, packages), stdout=sys.stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s + _GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_session(process)
        if out.exists():
            outcome = json.loads(out.read_text(encoding="utf-8"))
        elif code is None:
            outcome = _outcome("failed", f"hung: killed {_GRACE_S:g} s after its limit of {limit_s:.0f} s")
        else:
            outcome = _outcome("failed", f"its process ended with {code} and left no results")
    return outcome | {"wall_s": time.monotonic() - begin}


def _kill_session(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_section(arguments: argparse.Namespace) -> None:
    """The process of one section: writes its outcome, also when it fails or its time is up."""
    seed = int.from_bytes(os.urandom(3)) if arguments.seed is None else arguments.seed
    context = Context(arguments.device, arguments.tiny, seed, deadline=time.monotonic() + arguments.limit_s)
    context.results["seed"] = seed
    outcome = _outcome("ok", None)
    module = None
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, arguments.limit_s)
    try:
        outcome |= _about_machine(arguments.device)
        module = importlib.import_module(arguments.section)
        module.run(context)
    except NotRunError as error:
        outcome |= {"status": "not_run", "reason": str(error)}
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        outcome |= {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome["results"] = context.results
    outcome["summary"] = _summarize(module, context.results) if outcome["status"] != "not_run" else []
    arguments.out.write_text(json.dumps(outcome), encoding="utf-8")


def _about_machine(device: str) -> dict[str, Any]:
    import torch
    from report import describe_machine, describe_versions

    if device == "cpu":
        torch.set_num_threads(1)  # threads that spin while they wait would count as work
    elif not torch.cuda.is_available():
        raise RuntimeError("--device cuda, but PyTorch finds no usable GPU here")
    return {"machine": describe_machine(device), "versions": describe_versions()}


def _summarize(module: Any, results: dict[str, Any]) -> list[tuple[str, str]]:
    """The section's lines, as far as its results go."""
    try:
        return module.summarize(results) if module else []
    except KeyError:
        return []


def _on_alarm(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SectionTimeoutError("the section's share of the time budget is spent")


if __name__ == "__main__":
    sys.exit(main())
