"""The GPUs of a node: what the driver says, what torch sees, and what was given to the job."""

import csv
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.doctor.checks import CallError, Check, call, failure, ok, size, warning

_FIELDS = (
    "index", "name", "memory.total", "memory.used", "driver_version", "compute_mode", "mig.mode.current",
    "ecc.mode.current", "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
_MOST_USED_BYTES = 4 << 30  # by others than this program's ranks, which begin at the same time
_NOT_SAID = re.compile(r"\[.*\]|.*N/A.*|.*Not Supported.*|ERR!|Unknown Error")  # of a GPU, by nvidia-smi
_LOST = re.compile(r"Unknown Error|requires reset|is lost|ERR!", re.IGNORECASE)
_NONE_HERE = re.compile(r"No devices were found|couldn't communicate with the NVIDIA driver")  # as on a login node


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver tells of it; empty or None is what it does not have, or what nobody may know here.

    Attributes:
        problem: What the driver says in place of a value when the GPU does not work any more.
    """

    index: int
    name: str
    memory_bytes: int | None
    used_bytes: int | None
    driver: str
    compute_mode: str
    mig_mode: str
    ecc_mode: str
    uncorrected_errors: int | None
    problem: str = ""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says.

    Attributes:
        cuda: The newest CUDA version that the driver runs, ``12.4``; empty where it does not say.
        gpus: All that this process may see.
    """

    cuda: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Torch:
    """What torch is built for and sees.

    Attributes:
        version: Of torch.
        cuda: Version that it is built for; None: none.
        hip: ROCm's version that it is built for; None: none.
        names: Of the GPUs that it can use.
        nccl: NCCL's version; empty where there is none.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    names: tuple[str, ...] = ()
    nccl: str = ""


def read_driver() -> Driver | None:
    """Asks nvidia-smi; None where there is none.

    Raises:
        CallError: It fails.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    rows = call("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", limit_s=20)
    return Driver(parse_cuda(call("nvidia-smi", limit_s=20)), parse_gpus(rows))


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The answer to ``--query-gpu``, without header and units: one line a GPU, MiB."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(_FIELDS):  # "No devices were found"
            continue
        said = {name: "" if _NOT_SAID.fullmatch(cell) else cell for name, cell in zip(_FIELDS, row, strict=True)}
        total_mib, used_mib = _number(said["memory.total"]), _number(said["memory.used"])
        gpus.append(
            Gpu(
                index=int(said["index"]) if said["index"].isdecimal() else len(gpus),
                name=said["name"] or "unknown",
                memory_bytes=None if total_mib is None else total_mib << 20,
                used_bytes=None if used_mib is None else used_mib << 20,
                driver=said["driver_version"],
                compute_mode=said["compute_mode"],
                mig_mode=said["mig.mode.current"],
                ecc_mode=said["ecc.mode.current"],
                uncorrected_errors=_number(said["ecc.errors.uncorrected.volatile.total"]),
                problem=", ".join(dict.fromkeys(cell.strip("[]") for cell in row if _LOST.search(cell))),
            )
        )
    return tuple(gpus)


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdecimal() else None


def parse_cuda(text: str) -> str:
    """CUDA's version in the header of nvidia-smi's table; since driver 610 it is called the user mode driver's."""
    found = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", text)
    return found[1] if found else ""


def look_through_torch() -> Torch:
    """What torch is built for and sees here."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl as nccl_of_torch

    names = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    nccl = ""
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, nccl_of_torch.version()))
    return Torch(torch.__version__, torch.version.cuda, torch.version.hip, names, nccl)


def given_gpus(environment: Mapping[str, str]) -> str:
    """``NAME=VALUE`` of the first variable by which somebody gives GPUs to this process; empty: nobody does."""
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        value = environment.get(name, "")
        if value not in ("", "-1", "NoDevFiles") and not (name == "SLURM_GPUS_ON_NODE" and value == "0"):
            return f"{name}={value}"
    return ""


def check_gpus(config: Config | None) -> Iterator[Check]:
    """The driver's account and torch's, and what follows from them."""
    setting = config.launch.device if config else "auto"
    if setting == "cpu":
        yield ok("gpus", "launch.device=cpu: runs on the CPU", difference="failure")
        return
    driver = None
    try:
        driver = read_driver()
    except CallError as error:
        yield _judge_silence(str(error), given_gpus(os.environ), setting)
    yield from judge(look_through_torch(), driver, os.environ, setting)


def _judge_silence(said: str, given: str, setting: str) -> Check:
    """Of a driver that does not answer."""
    if given or setting == "cuda":
        remedy = "leave the node out with sbatch --exclude, and have the driver mended"
        return failure("driver", f"{given or 'launch.device=cuda'}, but {said}", remedy)
    if _NONE_HERE.search(said):
        return ok("driver", f"none at work here: {said}")
    return warning("driver", said, "have the driver mended (a restart, after an update), if there are GPUs")


def judge(torch: Torch, driver: Driver | None, environment: Mapping[str, str], setting: str) -> Iterator[Check]:
    """Checks of what was found.

    Args:
        torch: What torch sees.
        driver: What the driver says; None: there is no nvidia-smi.
        environment: Of this process.
        setting: ``launch.device``, not ``cpu``.
    """
    gpus = driver.gpus if driver else ()
    if not torch.names:
        yield _no_gpu(torch, driver, environment, setting)
    else:
        yield _judge_count(torch.names, gpus, environment)
    if driver and gpus:
        drivers = ", ".join(dict.fromkeys(gpu.driver for gpu in gpus if gpu.driver)) or "unknown"
        yield ok("driver", f"{drivers}, for CUDA up to {driver.cuda or 'unknown'}", difference="warning")
        yield from _check_cuda(torch.cuda, driver)
        yield from _check_each(gpus)
    if torch.nccl:
        yield ok("NCCL", torch.nccl, difference="failure")


def _count(names: tuple[str, ...]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _judge_count(names: tuple[str, ...], gpus: tuple[Gpu, ...], environment: Mapping[str, str]) -> Check:
    """Whether torch can use as many as there should be; of GPUs in instances (MIG) it uses one, whatever there is."""
    visible, expected = environment.get("CUDA_VISIBLE_DEVICES"), {}
    given = _number(environment.get("SLURM_GPUS_ON_NODE", ""))
    tasks = int((re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) or ["1"])[0])
    if visible:  # each task may have GPUs of its own
        is_whole = len(visible.split(",")) <= len(names)
    else:
        is_whole = given is not None and tasks > 1 and len(names) in (1, given // tasks)
    if given and not is_whole:
        expected["SLURM_GPUS_ON_NODE"] = given
    if visible is None:
        expected["nvidia-smi"] = len(gpus)
    short = [f"{count} by {source}" for source, count in expected.items() if count > len(names)]
    if short and not any("MIG" in name for name in names) and all(gpu.mig_mode != "Enabled" for gpu in gpus):
        remedy = "see which one is lost (nvidia-smi, dmesg), and leave the node out with sbatch --exclude"
        return failure("gpus", f"torch can use {_count(names)}, of {' and '.join(short)}", remedy)
    return ok("gpus", _count(names), difference="failure")


def _no_gpu(torch: Torch, driver: Driver | None, environment: Mapping[str, str], setting: str) -> Check:
    """Torch sees none: as it should be, or not."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    given = given_gpus(environment)
    if not given and (hidden or not (driver and driver.gpus)) and setting != "cuda":
        return ok("gpus", f"no GPU{' is to be seen (CUDA_VISIBLE_DEVICES)' if hidden else ''}: runs on the CPU",
                  difference="failure")  # fmt: skip
    seen = f"nvidia-smi sees {_count(tuple(gpu.name for gpu in driver.gpus))}" if driver and driver.gpus else ""
    asked = " and ".join(filter(None, [seen, given, "launch.device=cuda" if setting == "cuda" else ""]))
    if not torch.cuda and not torch.hip:
        remedy = "install a build of torch for CUDA (pytorch.org/get-started), or set launch.device=cpu"
        return failure("gpus", f"{asked}, but torch {torch.version} is a build for CPUs", remedy)
    if hidden:
        remedy = "unset CUDA_VISIBLE_DEVICES, or set launch.device=cpu"
        return failure("gpus", f"{asked}, but CUDA_VISIBLE_DEVICES hides them from torch", remedy)
    built_for = f"ROCm {torch.hip}" if torch.hip else f"CUDA {torch.cuda}"
    remedy = "see whether the driver works and is new enough (nvidia-smi); in a container, pass the GPUs on (--nv)"
    return failure("gpus", f"{asked}, but torch {torch.version} for {built_for} can use none", remedy)


def _check_cuda(built_for: str | None, driver: Driver) -> Iterator[Check]:
    """Within a major version any driver runs any CUDA (NVIDIA's minor version compatibility); across them none does."""
    if not built_for or not driver.cuda:
        return
    if int(built_for.split(".")[0]) > int(driver.cuda.split(".")[0]):
        remedy = f"install a torch for CUDA {driver.cuda.split('.')[0]}, or have the driver updated"
        yield failure("CUDA", f"torch is built for {built_for}, the driver runs {driver.cuda} at most", remedy)
    else:
        yield ok("CUDA", f"torch is built for {built_for}", difference="failure")


def _check_each(gpus: tuple[Gpu, ...]) -> Iterator[Check]:
    sizes = dict.fromkeys("unknown" if gpu.memory_bytes is None else size(gpu.memory_bytes) for gpu in gpus)
    yield ok("GPU memory", ", ".join(sizes), difference="warning")
    for gpu in gpus:
        if gpu.problem:
            remedy = "leave the node out with sbatch --exclude, and have the GPU reset (nvidia-smi -r) or replaced"
            yield failure("GPU state", f"GPU {gpu.index}: {gpu.problem}", remedy)
    hints = (
        ("GPUs in use", [g for g in gpus if (g.used_bytes or 0) > _MOST_USED_BYTES], "memory is in use already",
         "see who runs there (nvidia-smi), or leave the node out with sbatch --exclude"),
        ("compute mode", [g for g in gpus if g.compute_mode == "Prohibited"], "Prohibited: nothing can run",
         "have the site set it to Default (nvidia-smi -c DEFAULT)"),
        ("MIG", [g for g in gpus if g.mig_mode == "Enabled"], "cut into instances (MIG), which NCCL does not join",
         "use one instance and one process, or ask for whole GPUs"),
        ("ECC", [g for g in gpus if g.ecc_mode == "Disabled"], "ECC is off: flipped bits go unnoticed",
         "have the site turn it on (nvidia-smi -e 1), or set train.check_replicas_every"),
        ("memory errors", [g for g in gpus if g.uncorrected_errors], "uncorrected errors since the driver started",
         "leave the node out with sbatch --exclude, and tell the site"),
    )  # fmt: skip
    for name, concerned, problem, remedy in hints:
        if concerned:
            yield warning(name, f"GPU {', '.join(str(gpu.index) for gpu in concerned)}: {problem}", remedy)
    if not any(concerned for _, concerned, *_ in hints) and not any(gpu.problem for gpu in gpus):
        yield ok("GPU settings", "free, whole, with ECC where they have it, without memory errors")
