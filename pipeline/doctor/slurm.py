"""Slurm: whether it is there, and what this job was given."""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from pipeline.config import Config
from pipeline.doctor.checks import CallError, Check, call, ok, warning


def check_slurm() -> Iterator[Check]:
    """Its commands and whether the controller answers."""
    absent = [name for name in ("sbatch", "srun", "sinfo", "scontrol") if shutil.which(name) is None]
    if len(absent) == 4:
        if "SLURM_JOB_ID" in os.environ:
            yield ok("slurm", "this is a job, without Slurm's commands (a container): where it ends is not known")
        else:
            yield ok("slurm", "not here")
        return
    if absent:
        yield warning("slurm", f"{', '.join(absent)} not in PATH", "add Slurm's commands to PATH, for the job scripts")
    try:
        version = call("sinfo", "--version").strip()
        call("sinfo", "--noheader", "--format=%D")
    except CallError as error:
        yield warning("slurm", str(error), "see whether this machine belongs to a cluster (SLURM_CONF, scontrol ping)")
        return
    yield ok("slurm", version, difference="warning")


def check_job(config: Config | None) -> Iterator[Check]:
    """What this job was given and how long it may run; nothing outside of a job, or where Slurm's commands are not."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or shutil.which("scontrol") is None:
        return
    record = call("scontrol", "show", "job", "--oneliner", job)
    patience_s = config.train.stop_before_limit_seconds if config else 120.0
    yield from judge_job(record, os.environ, patience_s, time.time())


def judge_job(record: str, environment: Mapping[str, str], patience_s: float, now_s: float) -> Iterator[Check]:
    """Checks of a job's record.

    Args:
        record: Text of ``scontrol show job``.
        environment: Of this process.
        patience_s: ``train.stop_before_limit_seconds``.
        now_s: Unix time.
    """
    fields = dict(re.findall(r"(\w+)=(\S*)", record))
    gpus = count_gpus(fields)
    given = f"{fields.get('NumNodes')} nodes, {fields.get('NumTasks')} tasks, {gpus or 'no'} GPUs in all"
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    here = f"; this step has {tasks} tasks" if tasks else ""
    yield ok("job", f"{environment['SLURM_JOB_ID']}: {given}{here}")
    if gpus and tasks and fields.get("NumNodes", "").isdigit():
        num_nodes = int(fields["NumNodes"])
        if num_nodes < int(tasks) != gpus:  # a task a node is how a node is looked at
            yield warning("tasks", f"{tasks} tasks for {gpus} GPUs", "start one task per GPU: --ntasks-per-node")
    limit = fields.get("TimeLimit", "unknown")
    left_s = None
    with suppress(ValueError):
        left_s = time.mktime(time.strptime(fields.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - now_s
    if limit != "UNLIMITED" and left_s is not None and left_s < 2 * patience_s:
        found = f"{limit}, of which {left_s:.0f} s are left, and the program stops {patience_s:.0f} s before"
        yield warning("time limit", found, "ask for more (sbatch --time), or lower train.stop_before_limit_seconds")
    else:
        yield ok("time limit", limit)
    if fields.get("BatchFlag") == "1" and fields.get("Requeue") == "0":
        remedy = "submit with --requeue; where the site forbids it, use slurm/chain.sh"
        yield warning("requeue", "not allowed: the job ends at its time limit", remedy)
    elif fields.get("BatchFlag") == "1":
        yield ok("requeue", f"allowed; {fields.get('Restarts', '0')} so far")


def count_gpus(fields: Mapping[str, str]) -> int:
    """GPUs of all nodes of a job, by its record; where accounting does not count them, what each node has been asked.

    Args:
        fields: Of the record, by name; ``AllocTRES`` since Slurm 23.
    """
    counted = re.findall(r"gres/gpu(:[^=,]+)?=(\d+)", fields.get("AllocTRES") or fields.get("TRES", ""))
    of_all = [int(number) for kind, number in counted if not kind]  # beside them the kinds may be listed once more
    if counted:
        return of_all[0] if of_all else sum(int(number) for _, number in counted)
    asked = [part for part in fields.get("TresPerNode", "").split(",") if re.match(r"gres[/:]gpu\b", part)]
    numbers = [part.rpartition(":")[2] for part in asked]  # gres/gpu:4g.20gb:2; without a number it is one
    on_a_node = sum(int(number) if number.isdecimal() else 1 for number in numbers)
    return on_a_node * int(fields["NumNodes"]) if fields.get("NumNodes", "").isdecimal() else on_a_node
