"""What several nodes have found, laid side by side; and what only several can find out together."""

import fcntl
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.distributed import Process, discover_process
from pipeline.doctor.checks import SEVERITY, Check, ask, failure, ok, warning
from pipeline.doctor.storage import MOST_SKEW_S, VISIBLE_WITHIN_S, existing_parent
from pipeline.slurm_step import set_meeting_place

if TYPE_CHECKING:
    from pipeline.meeting import Meeting  # imports torch, which may be what is broken

_MOST_NAMED = 8
_OF_FOLDER = "set run.dir to storage that all nodes mount; in a container, bind it"
_OF_DIFFERENCE = "make the nodes alike (one environment, slurm/site.env), or leave it out with sbatch --exclude"


def find_process() -> Process:
    """Which task of the step this is; what a launcher that is not at work has left in the environment is forgotten."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return discover_process() or Process()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    process = discover_process() or Process()
    set_meeting_place(process)
    return process


def check_together(meeting: "Meeting", config: Config | None) -> list[Check]:
    """This rank's part of what all do together; on rank 0 also what it finds of the others, whose node it names."""
    offset_s = meeting.clock_offsets_s()[meeting.process.rank]
    checks = judge_clock(offset_s) if meeting.process.local_rank == 0 else []
    if config is not None:
        checks += _check_shared_folder(meeting, config.run.dir)
    return checks


def judge_clock(off_s: float) -> list[Check]:
    """The distance of this node's clock from the median of all."""
    if abs(off_s) <= MOST_SKEW_S:
        return [ok("clocks", f"within {MOST_SKEW_S:.0f} s of each other")]
    return [warning("clocks", f"{off_s:+.1f} s from the other nodes'", "have the site set its clocks (NTP)")]


def _check_shared_folder(meeting: "Meeting", run_dir: Path) -> list[Check]:
    """Whether every node sees what rank 0 writes, and rank 0 what they write; and whether a lock holds for all."""
    from pipeline.meeting import appears

    process, name = meeting.process, "shared folder"
    level, token, problem, lock = 0, uuid.uuid4().hex, "", None
    if process.rank == 0:
        try:
            level, folder = existing_parent(run_dir)
            (folder / _hidden(token)).mkdir()
            (folder / _hidden(token) / "0").write_text(token, encoding="utf-8")
            lock = open(folder / _hidden(token) / "0", "rb")
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problem = error.strerror or str(error)
    level, token, problem = meeting.exchange("writing to run.dir", [level, token, problem])[0]
    if problem:  # its own check of run.dir says what to do
        return [failure(name, f"cannot be written to: {problem}", _OF_FOLDER)] if process.rank == 0 else []
    own = [run_dir.absolute(), *run_dir.absolute().parents][level] / _hidden(token)
    asked = process.rank and process.local_rank == 0
    checks = ask(name, _read_token, own, token, process.rank, meeting.nodes[0]) if asked else []
    wrote = meeting.exchange("reading run.dir", any(check.state != "failure" for check in checks))
    if process.rank == 0:
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        unseen = [rank for rank, did in enumerate(wrote) if did and not appears(own / str(rank), token, deadline)]
        checks = [failure(name, f"what {meeting.name(unseen)} wrote is not seen here", _OF_FOLDER)] if unseen else []
        checks = checks or [ok(name, "what a node writes the others read")]
        if lock:
            lock.close()
        shutil.rmtree(own, ignore_errors=True)
    return checks


def _hidden(token: str) -> str:
    return f".electra-doctor-{token}"


def _read_token(folder: Path, token: str, rank: int, writer: str) -> Iterator[Check]:
    from pipeline.meeting import appears

    name = "shared folder"
    if not appears(folder / "0", token, time.monotonic() + VISIBLE_WITHIN_S):
        yield failure(name, f"{folder.parent}: what {writer} writes there is not seen from this node", _OF_FOLDER)
        return
    (folder / str(rank)).write_text(token, encoding="utf-8")
    yield ok(name, "what a node writes the others read")
    try:
        with open(folder / "0", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by the other node, as it should be; or no locks at all, which a check of its own says
        return
    remedy = "have it mounted with locks for all nodes (Lustre: -o flock), or start each run only once"
    yield warning("locks", f"a lock that {writer} holds does not hold here", remedy)


def compare(answers: dict[str, list[Check]]) -> list[tuple[Check, list[str]]]:
    """Equal checks of several nodes become one; where a value should be the same everywhere, an odd one is marked.

    Args:
        answers: Checks by node.

    Returns:
        Each check with the nodes that it holds for, in the order in which they were asked.
    """
    names = dict.fromkeys(check.name for checks in answers.values() for check in checks)
    merged: list[tuple[Check, list[str]]] = []
    for name in names:
        of_nodes = {node: [c for c in checks if c.name == name] for node, checks in answers.items()}
        alike: dict[Check, list[str]] = {}
        for node, checks in of_nodes.items():
            for check in dict.fromkeys(checks):
                alike.setdefault(check, []).append(node)
        merged += mark_difference(alike)
    return merged


def mark_difference(alike: dict[Check, list[str]]) -> list[tuple[Check, list[str]]]:
    """The checks of one name, the commonest value first; good ones that differ from it get their ``difference``."""
    good = Counter({check: len(nodes) for check, nodes in alike.items() if check.state == "ok"})
    if len(good) < 2:
        return list(alike.items())
    usual = good.most_common(1)[0][0]
    marked = []
    for check, nodes in sorted(alike.items(), key=lambda item: item[0] != usual):
        if check != usual and check.state == "ok" and check.difference != "ok":
            value = f"{check.value}, and {usual.value} on the others"
            marked.append((replace(check, state=check.difference, value=value, remedy=_OF_DIFFERENCE), nodes))
        else:
            marked.append((check, nodes))
    return marked


def name_nodes(nodes: list[str]) -> str:
    """Nodes for people, not all of very many."""
    shown = ", ".join(nodes[:_MOST_NAMED])
    return shown + (f" and {len(nodes) - _MOST_NAMED} more" if len(nodes) > _MOST_NAMED else "")


def worst(checks: list[Check]) -> str:
    """The worst state."""
    return max((check.state for check in checks), key=SEVERITY.index, default="ok")
