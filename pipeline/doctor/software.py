"""Versions against what the project asks for; kernels and what compiles them."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import Config
from pipeline.doctor.checks import CallError, Check, call, failure, ok, warning
from pipeline.environment import git_commit

_OPTIONAL = {
    "transformers": "parity tests and benchmarks",
    "triton": "fused kernels on a GPU",
    "nvidia-ml-py": "GPUs in MLflow's system metrics",
}
_SHOWN = ("torch", "deepspeed", "mlflow", "datasets", "sentencepiece", "numpy", *_OPTIONAL)
_DISTRIBUTION = "electra-pretraining"
_IMPORT_S = 240.0  # of DeepSpeed, from a cold file system of a cluster


def check_versions() -> Iterator[Check]:
    """Python, this program, and every package that it names, against the floors of pyproject.toml."""
    from packaging.requirements import Requirement  # whatever installs DeepSpeed brings it along
    from packaging.specifiers import SpecifierSet

    python, listed = requirements()
    here = platform.python_version()
    if SpecifierSet(python).contains(here, prereleases=True):
        yield ok("python", here, difference="failure")
    else:
        yield failure("python", f"{here}, {sys.executable}", f"use Python {python}")
    yield ok("electra", __version__, difference="failure")
    yield ok("commit", git_commit() or "unknown", difference="warning")
    needed = [Requirement(text) for text in listed]
    others, problems = 0, []
    for requirement in sorted(needed, key=lambda requirement: requirement.name):
        check = check_package(requirement)
        if requirement.name in _SHOWN:
            yield check
        elif check.state != "ok":
            problems.append(f"{requirement.name} {check.value}")
        else:
            others += 1
    if problems:
        yield failure("other packages", "; ".join(problems), "pip install -c constraints.txt -e .")
    else:
        yield ok("other packages", f"{others} are as new as they have to be")


def requirements() -> tuple[str, list[str]]:
    """What Python and which packages the project asks for, those of its ``gpu`` extra and transformers included."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        optional = [*extras["gpu"], *(text for text in extras["dev"] if text.startswith("transformers"))]
        return project["requires-python"], [*project["dependencies"], *optional]
    listed = metadata.requires(_DISTRIBUTION) or []
    wanted = [text for text in listed if "extra ==" not in text or "gpu" in text or text.startswith("transformers")]
    return metadata.metadata(_DISTRIBUTION)["Requires-Python"], [text.partition(";")[0] for text in wanted]


def check_package(requirement: Any) -> Check:
    """The installed version of a package; ``requirement`` is packaging's."""
    name, asked = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in _OPTIONAL:
            return ok(name, f"not installed; only {_OPTIONAL[name]} use it", difference="failure")
        return failure(name, "not installed", asked)
    if not requirement.specifier.contains(found, prereleases=True):
        judged = warning if name in _OPTIONAL else failure
        return judged(name, f"{found}, where {requirement.specifier} is needed", asked)
    if name == "torch":
        try:
            found = _torch_build()
        except Exception as error:  # whatever a broken installation brings about
            remedy = "install it again for this Python and driver (pytorch.org/get-started)"
            return failure(name, f"{found} cannot be imported: {error}", remedy)
    return ok(name, found, difference="failure")


def _torch_build() -> str:
    import torch

    if torch.version.hip:
        return f"{torch.__version__}, ROCm {torch.version.hip}"
    return f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs")


def check_deepspeed() -> Iterator[Check]:
    """Whether it can be imported: a child tries, since it may end the process, or look for a compiler."""
    try:
        call(sys.executable, "-c", "import deepspeed", limit_s=_IMPORT_S)
    except CallError as error:
        remedy = "install it again for this torch: pip install --no-cache-dir deepspeed"
        yield failure("deepspeed imports", str(error), remedy)
        return
    yield ok("deepspeed imports", "yes")
    yield ok("deepspeed operators", "none is used: neither nvcc, CUDA_HOME nor ninja is needed")


def check_kernels(found: dict[str, Any], config: Config | None) -> Iterator[Check]:
    """Apex, the table of kernels, and what Triton and torch's compiler need to build theirs.

    Args:
        found: As ``kernel_table`` returns it.
        config: The run, if there is one.
    """
    yield _check_apex()
    for kernel in found["kernels"]:
        taken = f"  <- auto ({kernel['ground']})" if kernel["auto"] else ""
        yield ok(f"{kernel['operation']} by {kernel['backend']}", kernel["state"] + taken)
    for problem in found["warnings"]:
        yield warning("kernels", problem, "mend the installation it names; training is slower until then")
    if not found["warnings"]:
        yield ok("kernels", "none that auto wanted is broken")
    is_gpu = found["device"] == "cuda"
    compiles = config is not None and config.kernels.compile_layers
    if is_gpu or compiles:
        yield from check_compiler(is_needed=compiles or importlib.util.find_spec("triton") is not None)
    else:
        yield ok("compiler", "not needed: Triton compiles for GPUs only, and kernels.compile_layers is off")


def kernel_table() -> dict[str, Any]:
    """Device, devices by name, torch, kernels and warnings of what is broken, as JSON types."""
    import torch

    from model.kernels.select import select_kernels, table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = select_kernels("auto", device, dtype=torch.bfloat16)
    kernels = []
    for operation, backend, state in table(device):
        is_taken = chosen.names[operation] == backend
        ground = chosen.reasons[operation] if is_taken else None
        kernels.append({"operation": operation, "backend": backend, "state": state, "auto": is_taken, "ground": ground})
    return {
        "torch": torch.__version__,
        "device": device,
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "kernels": kernels,
        "warnings": list(chosen.warnings),
    }


def _check_apex() -> Check:
    from model.kernels.apex import find_apex

    if importlib.util.find_spec("apex") is None:
        return ok("apex", "not installed; optional", difference="failure")
    module, place_or_reason = find_apex()
    if module is None:
        problem, _, remedy = place_or_reason.partition("; ")
        return warning("apex", problem, remedy)
    return ok("apex", f"NVIDIA's, in {place_or_reason}", difference="failure")


def check_compiler(is_needed: bool) -> Iterator[Check]:
    """The C compiler and Python's headers, with which Triton builds its launchers, and a place to keep them.

    Where they are looked for: triton/runtime/build.py (CC, then clang, gcc), triton/knobs.py (TRITON_CACHE_DIR, else
    TRITON_HOME or HOME).
    """
    if not is_needed:
        yield ok("compiler", "not needed without Triton")
        return
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        named = f"CC={compiler} is not there" if compiler else "no cc, gcc or clang in PATH"
        yield failure("compiler", named, "load the site's compiler module in slurm/site.env, or set CC")
    else:
        yield ok("compiler", compiler)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.exists():
        yield ok("Python.h", str(header))
    else:
        yield failure("Python.h", f"{header} is missing, Triton compiles against it",
                      "install python3-dev, or use a Python of conda or uv")  # fmt: skip
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    yield check_cache("Triton's cache", cache, "TRITON_CACHE_DIR")


def check_cache(name: str, folder: Path, variable: str) -> Check:
    """Whether a folder for caches can be written to; it, or what is above it, is tried and left as it was."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))  # shows an exhausted quota
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = f"set {variable} to a folder that can be written to and has room"
        return warning(name, f"{folder}: {error.strerror}", remedy)
    return ok(name, str(folder))
