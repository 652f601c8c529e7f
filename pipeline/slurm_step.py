"""Where the tasks of a Slurm step meet, when a user's own srun has started them and no script of ours."""

import os
import re
from contextlib import suppress
from functools import cache

from pipeline.distributed import FIRST_PORT, NUM_PORTS, Process
from pipeline.doctor.checks import CallError, call


def set_meeting_place(process: Process) -> None:
    """Puts it into the environment of a task of srun; what has set RANK, as torchrun does, has its own."""
    if process.world_size > 1 and "RANK" not in os.environ:
        os.environ.update(meeting_place())


def nodes_of_step() -> list[str]:
    """Names of this step's nodes, or else of this job's; empty outside of Slurm.

    Where nobody expands Slurm's list, in a container, say: the first one alone.
    """
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    return _expand(listed) if listed else []


@cache
def _expand(listed: str) -> list[str]:
    try:
        return call("scontrol", "show", "hostnames", listed).split()
    except CallError:
        first = re.match(r"([^,[]+)(?:\[(\d+))?", listed)
        return [first[1] + (first[2] or "")] if first else []


@cache
def address_of(node: str) -> str:
    """At which the others reach it, as Slurm says; else its name."""
    with suppress(CallError):
        if found := re.search(r"NodeAddr=(\S+)", call("scontrol", "show", "node", node)):
            return found[1]
    return node


def meeting_place() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for the tasks of this step, whatever another step has left there."""
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", "0"))
    nodes = nodes_of_step()
    address = os.environ.get("ELECTRA_MASTER_ADDR") or (address_of(nodes[0]) if nodes else "127.0.0.1")
    return {"MASTER_ADDR": address, "MASTER_PORT": str(FIRST_PORT + (job + 409 * (step + 1)) % NUM_PORTS)}
