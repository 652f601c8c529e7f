"""What a report says about the machine, and its short table."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.environment import describe_environment


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, memory and GPU; nothing that names a host or a user."""
    import torch

    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "torch_threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
        }
    return machine


def describe_versions() -> dict[str, Any]:
    """Versions of Python, PyTorch's parts and the packages that a run records."""
    import torch

    environment = describe_environment()
    return environment["packages"] | {
        "python": environment["python"],
        "torch_build": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def markdown(report: dict[str, Any]) -> str:
    """The table that is printed at the end and committed."""
    machine, versions = report["machine"] or {}, report["versions"] or {}
    hardware = machine.get("gpu", {}).get("name") or machine.get("processor", "machine unknown")
    lines = [
        f"{hardware}, torch {versions.get('torch_build', '?')}, commit {report['git_commit'] or 'unknown'}"
        + (", tiny shapes: not a measurement" if report["tiny"] else ""),
        "",
        "| section | what | value |",
        "|---|---|---|",
    ]
    for name, section in report["sections"].items():
        lines += [f"| {name} | {what} | {value} |" for what, value in section["summary"]]
        if section["status"] != "ok":
            reason = section["reason"].splitlines()[0] if section["reason"] else ""
            lines.append(f"| {name} | **{section['status']}** | {reason[:200]} |")
    return "\n".join(lines)
