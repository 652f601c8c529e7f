"""Limits and settings of a node that bite later: files, memory, threads, temporary folders, interfaces."""

import os
import resource
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.doctor.checks import Check, failure, ok, size, warning
from pipeline.doctor.software import check_cache
from pipeline.plan import make_plan

_SPARE_FILES, _FEW_FILES = 512, 4096
_SMALL_SHM_BYTES, _SMALL_TMP_BYTES = 1 << 30, 1 << 30
_PROCESS_BYTES = 4 << 30  # libraries, buffers of rows and a CUDA context
_BYTES_PER_PARAMETER = 16  # on a CPU: weight, gradient and two moments in fp32
_NO_LIMIT_BYTES = 1 << 60  # what cgroup v1 says is a number like this


def check_limits(num_shards: int) -> Iterator[Check]:
    """Open files and locked memory.

    Args:
        num_shards: Files of the run's shards, each of which a process keeps open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{_limit(soft)} (the program may raise it to {_limit(hard)})"
    remedy = "raise it (ulimit -Hn, limits.conf, or LimitNOFILE of slurmd)"
    if hard != resource.RLIM_INFINITY and hard < num_shards + _SPARE_FILES:
        yield failure("open files", f"{shown}, and there are {num_shards:,} shards", f"{remedy}, or data.task_bytes")
    elif hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        yield warning("open files", shown, remedy)
    else:
        yield ok("open files", shown)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield judge_locked_memory(soft, adapters)


def judge_locked_memory(soft_bytes: int, adapters: list[str]) -> Check:
    """InfiniBand registers memory, which counts as locked."""
    if not adapters:
        return ok("locked memory", "no InfiniBand here that would need it")
    found = f"{_limit(soft_bytes)} bytes, with {', '.join(adapters)}"
    if soft_bytes == resource.RLIM_INFINITY:
        return ok("locked memory", found)
    remedy = (
        "InfiniBand may not register its buffers: have slurmd start with LimitMEMLOCK=infinity, and "
        "PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    )
    return warning("locked memory", found, remedy)


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number:,}"


def check_memory(config: Config | None, processes: int, is_gpu: bool) -> Iterator[Check]:
    """This job's memory against what the run needs on a node, and shared memory."""
    available = available_bytes()
    limit = cgroup_limit_bytes(Path("/proc/self/cgroup").read_text(encoding="utf-8"), Path("/sys/fs/cgroup"))
    found = size(min(available, limit or available))
    found += " free on the node" if limit is None or available < limit else " allowed by its cgroup"
    if config is None:
        yield ok("memory", found)
    else:
        needed = needed_bytes(config, processes, is_gpu)
        found += f", the run needs some {size(needed)} on the node of rank 0"
        if min(available, limit or available) < needed:
            remedy = "ask for more (sbatch --mem=0 takes all), or start fewer processes on a node"
            yield failure("memory", found, remedy)
        else:
            yield ok("memory", found)
    shm = os.statvfs("/dev/shm")
    total = shm.f_blocks * shm.f_frsize
    if total < _SMALL_SHM_BYTES:
        yield warning("/dev/shm", size(total), "NCCL's processes meet there: start the container with --shm-size=8g")
    else:
        yield ok("/dev/shm", size(total))


def needed_bytes(config: Config, processes: int, is_gpu: bool) -> int:
    """Host memory on rank 0's node: the copy of the state from which a checkpoint is written, and the processes."""
    plan = make_plan(config, world_size=1, micro_batch_rows=1)
    training = 0 if is_gpu else processes * plan.parameters_trained * _BYTES_PER_PARAMETER
    return plan.checkpoint_bytes + training + processes * (_PROCESS_BYTES if is_gpu else _PROCESS_BYTES // 8)


def available_bytes() -> int:
    """Memory that processes can still get, by the kernel's estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_limit_bytes(own: str, root: Path) -> int | None:
    """The smallest memory limit of a process's cgroup and of those above it; None: there is none.

    Args:
        own: Text of /proc/self/cgroup.
        root: /sys/fs/cgroup.
    """
    limits = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        for place in [folder, *folder.parents]:
            if (place / file).is_file() and (text := (place / file).read_text().strip()) != "max":
                limits.append(int(text))
            if place == base:
                break
    return min((limit for limit in limits if limit < _NO_LIMIT_BYTES), default=None)


def check_threads(environment: Mapping[str, str], cores: int, processes: int) -> Iterator[Check]:
    """Cores of this process against OMP_NUM_THREADS and the processes that share them.

    Args:
        environment: Of this process.
        cores: That this process may run on.
        processes: Of this program on the node.
    """
    text = environment.get("OMP_NUM_THREADS", "")
    shown = f"{cores} cores, processes here: {processes}, OMP_NUM_THREADS={text or 'unset'}"
    if text.isdigit() and int(text) > cores:
        yield warning("threads", shown, f"set OMP_NUM_THREADS to {cores} at most: threads would wait for each other")
    elif cores == 1 and processes == 1 and "SLURM_JOB_ID" in environment:
        yield warning("threads", shown, "ask for more cores: sbatch --cpus-per-task, and srun --cpus-per-task as well")
    else:
        yield ok("threads", shown)


def check_folders(environment: Mapping[str, str], needs_hub: bool) -> Iterator[Check]:
    """Temporary files, home and the hub's cache."""
    wanted, taken = environment.get("TMPDIR"), tempfile.gettempdir()
    remedy = "set TMPDIR in slurm/site.env to a folder on the node's own disk that is there on every node"
    if wanted and Path(wanted).resolve() != Path(taken).resolve():
        yield warning("TMPDIR", f"{wanted} cannot be used; Python takes {taken}", remedy)
    elif (free := _free_bytes(taken)) < _SMALL_TMP_BYTES:
        yield warning("TMPDIR", f"{taken} has {size(free)} free", remedy)
    else:
        yield ok("TMPDIR", f"{taken} has room")
    yield check_cache("home", Path.home(), "HOME")
    if needs_hub:
        home = environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
        yield check_cache("HF_HOME", Path(home), "HF_HOME")


def _free_bytes(folder: str) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def check_network(environment: Mapping[str, str], is_alone: bool) -> Iterator[Check]:
    """Interfaces that are asked for, and what this node's name stands for."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if value := environment.get(variable):
            yield judge_interface(variable, value, here)
    if is_alone:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        address, problem = "", f"{name} has no address ({error.strerror})"
    else:
        problem = f"{name} is {address}, which no other node reaches" if address.startswith("127.") else ""
    if problem and not environment.get("GLOO_SOCKET_IFNAME"):
        remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in slurm/site.env (names: ip -br addr)"
        yield warning("host name", problem, remedy)
    else:
        yield ok("host name", "has an address that others reach" if not problem else "interfaces are set")


def judge_interface(variable: str, value: str, here: Iterable[str]) -> Check:
    """NCCL takes prefixes, ``=`` before exact names, ``^`` before those that it shall not use; gloo exact names."""
    here = sorted(here)
    if value.startswith("^"):
        return ok(variable, value)
    exact = variable.startswith("GLOO") or value.startswith("=")
    for wanted in value.lstrip("=").split(","):
        wanted = wanted.partition(":")[0]  # noqa: PLW2901 - NCCL: name:port
        if any(name == wanted if exact else name.startswith(wanted) for name in here):
            return ok(variable, value)
    return failure(variable, f"{value}: no such interface, there are {', '.join(here)}",
                   "correct it in slurm/site.env (names: ip -br addr)")  # fmt: skip


def check_leftovers(environment: Mapping[str, str], nodes: list[str]) -> Iterator[Check]:
    """Variables of a launcher that is not at work here: a rank, or a meeting place of another job.

    Args:
        environment: Of this process.
        nodes: Of this job, by name and by address.
    """
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    if "RANK" in environment and not (in_step or "TORCHELASTIC_RUN_ID" in environment):
        found = f"RANK={environment['RANK']} WORLD_SIZE={environment.get('WORLD_SIZE', 'unset')}, but no torchrun"
        yield warning("launcher", found, "unset RANK, LOCAL_RANK and WORLD_SIZE: the program would wait for others")
    elif "RANK" in environment and in_step and environment["RANK"] != environment["SLURM_PROCID"]:
        found = f"RANK={environment['RANK']} in task {environment['SLURM_PROCID']} of srun"
        yield warning("launcher", found, "unset RANK and WORLD_SIZE before srun: all tasks would be one rank")
    address = environment.get("MASTER_ADDR")
    if address and nodes and address not in nodes and "TORCHELASTIC_RUN_ID" not in environment:
        yield warning("MASTER_ADDR", f"{address} is no node of this job", "unset MASTER_ADDR before srun")
