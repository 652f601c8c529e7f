"""The quick part of an acceptance: do all processes meet, run one program, see one folder, and reckon right?

What comes first needs no group: the processes tell each other through a store (``pipeline.meeting``).
"""

import shutil
import statistics
import time
import uuid
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.acceptance import Check, folder_of
from pipeline.checkpoint import list_steps
from pipeline.config import Config
from pipeline.distributed import Process, init_process_group, processes_on_this_machine, resolve_device
from pipeline.doctor.storage import MOST_SKEW_S, VISIBLE_WITHIN_S
from pipeline.environment import describe_environment
from pipeline.errors import ConfigError
from pipeline.launch import threads_per_process
from pipeline.meeting import ANSWER_S, GROUP_LIMIT, Meeting, appears, collective
from pipeline.plan import make_plan
from pipeline.stages import free_bytes, stage_folder

_SLOW = 1.5  # times the median of all processes
_SHOWN = ("electra", "commit", "Python", "torch", "CUDA", "deepspeed")  # all that matter are compared
_OF_RUN_DIR = "set run.dir to storage that all nodes mount, and may write to"
_SIZE = {"cuda": 8192, "cpu": 512}  # of the product's matrices
_RUNS = 15


def quick(config: Config, process: Process) -> list[Check]:
    """All checks, on every rank.

    Raises:
        ElectraError: The processes do not meet, or one falls silent.
    """
    began = time.monotonic()
    with Meeting(process) as meeting:
        joined_s = time.monotonic() - began
        nodes = list(dict.fromkeys(meeting.nodes))
        found = f"{process.world_size} on {len(nodes)} nodes ({', '.join(nodes)}), met in {joined_s:.1f} s"
        checks = [Check("processes", "OK", found, numbers={"nodes": nodes, "seconds": joined_s})]
        device, check = agree_on_device(meeting, config)
        checks.append(check)
        checks.append(_check_versions(meeting))
        checks.append(_check_folder(meeting, folder_of(config)))
        checks.append(_check_clocks(meeting))
        checks.append(_check_space(meeting, config))
        if device is None:
            return checks
        torch.set_num_threads(threads_per_process(config, processes_on_this_machine(process)))
        with collective(process, "a small all-reduce"):
            init_process_group(process, device, GROUP_LIMIT)  # from here on each has a GPU of its own
            checks += _check_products(meeting, device)
            checks.append(_check_all_reduce(meeting, device))
            dist.destroy_process_group()
        return checks


def agree_on_device(meeting: Meeting, config: Config) -> tuple[str | None, Check]:
    """``cpu`` or ``cuda`` if it is the same for all, else None; and the check."""
    try:
        kind, problem = resolve_device(config.launch.device), ""
        own = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    except ConfigError as error:
        kind, own, problem = None, "none", str(error)
    answers = meeting.exchange("naming devices", [kind, own, problem])
    usual = Counter(name for _, name, _ in answers).most_common(1)[0][0]
    odd = [rank for rank, (_, name, problem) in enumerate(answers) if name != usual or problem]
    if not odd:
        return kind, Check("device", "OK", f"{own} on every rank", numbers={"device": own})
    why = next((problem for *_, problem in answers if problem), f"{answers[odd[0]][1]}, and {usual} on the others")
    is_same_kind = len({kind for kind, *_ in answers}) == 1
    check = Check(
        "device", "WARNING" if is_same_kind and kind else "FAILED", f"{meeting.name(odd)}: {why}",
        "leave the node out with sbatch --exclude",
    )  # fmt: skip
    return kind if is_same_kind else None, check


def _check_versions(meeting: Meeting) -> Check:
    here = describe_environment()
    own = {"electra": here["electra"], "commit": here["git"] or "none", "Python": here["python"]}
    own |= here["packages"] | {"CUDA": torch.version.cuda or "none"}
    answers = meeting.exchange("versions", own)
    words = []
    for name in dict.fromkeys(name for answer in answers for name in answer):
        found = [answer.get(name, "none") for answer in answers]
        usual = Counter(found).most_common(1)[0][0]
        others = [rank for rank, version in enumerate(found) if version != usual]
        if name == "commit":  # git may be absent on a node, or too slow an answer: that is no other commit
            others = [rank for rank in others if "none" not in (found[rank], usual)]
        if others:
            words.append(f"{name} {usual}, but {found[others[0]]} on {meeting.name(others)}")
    if words:
        return Check("versions", "FAILED", "; ".join(words), "let every node use one environment (slurm/site.env)")
    return Check("versions", "OK", ", ".join(f"{name} {own[name]}" for name in _SHOWN if name in own), numbers=own)


def _check_folder(meeting: Meeting, parent: Path) -> Check:
    """Whether every process reads what rank 0 writes under its own run.dir, and rank 0 what they write."""
    rank, token = meeting.process.rank, uuid.uuid4().hex
    token = meeting.exchange("naming a folder in run.dir", token)[0]
    folder, problem = parent / f".quick-{token}", ""
    if rank == 0:
        problem = _try_to_write(folder / "token", token)
    problem = meeting.exchange("writing to run.dir", problem)[0]
    if problem:
        return Check("run.dir", "FAILED", f"{parent.parent}: {meeting.name([0])}: {problem}", _OF_RUN_DIR)
    if not appears(folder / "token", token, time.monotonic() + VISIBLE_WITHIN_S):
        problem = f"rank 0's file is not to be seen within {VISIBLE_WITHIN_S:.0f} s"
    elif rank:
        problem = _try_to_write(folder / f"rank_{rank}", token)
    problems = meeting.exchange("reading run.dir", problem, VISIBLE_WITHIN_S + ANSWER_S)
    if rank == 0:
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        for other in range(1, len(problems)):
            if not problems[other] and not appears(folder / f"rank_{other}", token, deadline):
                problems[other] = f"what it wrote is not to be seen from {meeting.nodes[0]}"
        shutil.rmtree(folder, ignore_errors=True)
    problems = meeting.exchange("comparing run.dir", problems, VISIBLE_WITHIN_S + ANSWER_S)[0]
    bad = [other for other, problem in enumerate(problems) if problem]
    if bad:
        return Check("run.dir", "FAILED", f"{parent.parent}: {meeting.name(bad)}: {problems[bad[0]]}", _OF_RUN_DIR)
    return Check("run.dir", "OK", f"{parent.parent} is seen and written by all")


def _try_to_write(path: Path, content: str) -> str:
    """Writes; returns what is wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        return f"cannot write: {error.strerror}"
    return ""


def _check_clocks(meeting: Meeting) -> Check:
    offsets_s = meeting.clock_offsets_s()
    off = [rank for rank, seconds in enumerate(offsets_s) if abs(seconds) > MOST_SKEW_S]
    skew_s = max(offsets_s) - min(offsets_s)
    found = f"{skew_s:.2f} s apart"
    if off:
        return Check("clocks", "WARNING", f"{found}: {meeting.name(off)}", "have the site set its clocks (NTP)")
    return Check("clocks", "OK", found, numbers={"skew_s": skew_s})


def _check_space(meeting: Meeting, config: Config) -> Check:
    plan = make_plan(config, meeting.process.world_size)
    there = len(list_steps(stage_folder(config, "pretrain") / "checkpoints"))
    needed = max(plan.disk_bytes - there * plan.checkpoint_bytes, plan.checkpoint_bytes)
    free = min(meeting.exchange("free space", free_bytes(config.run.dir)))
    found = f"{free / 2**30:.1f} GiB free, the run's checkpoints need {needed / 2**30:.2f}"
    numbers = {"free_bytes": free, "needed_bytes": needed}
    if free < needed:
        return Check("free space", "FAILED", found, "free space, or lower train.keep_checkpoints", numbers)
    return Check("free space", "OK", found, numbers=numbers)


def _check_products(meeting: Meeting, device: str) -> list[Check]:
    """Products of whole numbers, which come out exactly; and how long one takes."""
    is_right, own_s = _multiply(device)
    answers = meeting.exchange("products", [is_right, own_s], 2 * ANSWER_S)
    wrong = [rank for rank, (right, _) in enumerate(answers) if not right]
    middle_s = statistics.median_low(seconds for _, seconds in answers)
    slow = [rank for rank, (_, seconds) in enumerate(answers) if seconds > _SLOW * middle_s]
    size = _SIZE[device]
    checks = [Check("product", "OK", f"of whole numbers, {size}x{size}, exact on all")]
    if wrong:
        checks = [Check("product", "FAILED", f"wrong on {meeting.name(wrong)}", "leave the node out, tell the site")]
    rates = [2 * size**3 / seconds / 1e12 for _, seconds in answers]
    found = f"{min(rates):.3g} to {max(rates):.3g} TFLOP/s"
    numbers = {"tflop_per_s": rates, "nodes": meeting.nodes}
    if slow:
        remedy = "see who else is on that node, and its GPU's clocks (nvidia-smi -q -d PERFORMANCE)"
        return [*checks, Check("speed", "WARNING", f"{found}; slow: {meeting.name(slow)}", remedy, numbers)]
    return [*checks, Check("speed", "OK", found, numbers=numbers)]


def _multiply(device: str) -> tuple[bool, float]:
    """Whether an fp32 product of small whole numbers is exact, and the median seconds of one in bf16 (CPU: fp32)."""
    size = _SIZE[device]
    numbers = torch.arange(size * size, device=device)
    a, b = (numbers % 7 - 3).view(size, size).float(), (numbers % 11 - 5).view(size, size).float()
    row_sums = a.double() @ b.double().sum(1)
    is_right = bool(((a @ b).double().sum(1) == row_sums).all())
    a, b = (a.bfloat16(), b.bfloat16()) if device == "cuda" else (a, b)
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - began)
    return is_right, statistics.median(seconds[_RUNS // 3 :])


def _check_all_reduce(meeting: Meeting, device: str) -> Check:
    world_size = meeting.process.world_size
    summed = torch.full((1024,), meeting.process.rank + 1.0, device=device)
    dist.all_reduce(summed)
    is_right = bool((summed == world_size * (world_size + 1) / 2).all())
    wrong = [rank for rank, right in enumerate(meeting.exchange("an all-reduce", is_right, ANSWER_S)) if not right]
    if wrong:
        return Check("all-reduce", "FAILED", f"wrong on {meeting.name(wrong)}", "leave the node out, tell the site")
    return Check("all-reduce", "OK", f"right on all {world_size} by {dist.get_backend()}")
