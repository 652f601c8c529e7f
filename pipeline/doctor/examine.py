"""The story of ``electra doctor``: each node is asked the same questions, the answers meet, rank 0 makes one report.

    every node ──▶ examine_node ──▶ checks ──┐
         └────────▶ check_together ──────────┴──▶ rank 0: compare ──▶ one line for what is alike

On a single machine it is the same with one node. No process group is made, and nothing of training runs.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.distributed import Process, processes_on_this_machine
from pipeline.doctor.checks import LIMIT_S, Check, ask, failure, ok
from pipeline.doctor.gpus import check_gpus, given_gpus
from pipeline.doctor.machine import (
    check_folders,
    check_leftovers,
    check_limits,
    check_memory,
    check_network,
    check_threads,
)
from pipeline.doctor.nodes import check_together, compare, find_process, name_nodes
from pipeline.doctor.server import check_tracking
from pipeline.doctor.slurm import check_job, check_slurm
from pipeline.doctor.software import check_deepspeed, check_kernels, check_versions, kernel_table
from pipeline.doctor.storage import (
    check_corpora,
    check_inputs,
    check_run_dir,
    check_shards,
    check_space,
    check_tasks,
    count_shards,
)
from pipeline.errors import ConfigError, ElectraError
from pipeline.slurm_step import address_of, nodes_of_step

JOIN_S = 180.0
"""Patience with the other nodes' start: a cold one reads PyTorch over the network."""

_KERNELS_S, _DEEPSPEED_S = 180.0, 250.0  # kernels are compiled, DeepSpeed is read from a cold disk
_EXAMINING_S = 600.0
_OF_ABSENCE = "see its log, or leave it out with sbatch --exclude"


@dataclass
class Report:
    """What was found.

    Attributes:
        nodes: That were examined.
        checks: Each with the nodes that it holds for.
        kernels: Of rank 0's node, see ``software.kernel_table``; empty if torch cannot say.
    """

    nodes: list[str]
    checks: list[tuple[Check, list[str]]]
    kernels: dict[str, Any] = field(default_factory=dict)

    def of_state(self, state: str) -> list[str]:
        """Names of the checks that ended so."""
        return [check.name for check, _ in self.checks if check.state == state]

    @property
    def exit_code(self) -> int:
        """0, or that of a wrong setting if anything failed."""
        return ConfigError.exit_code if self.of_state("failure") else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON types: one entry for each check and node."""
        checks = [
            {"name": check.name, "node": node, "state": check.state, "value": check.value, "remedy": check.remedy}
            for check, nodes in self.checks
            for node in nodes
        ]
        return self.kernels | {"nodes": self.nodes, "checks": checks, "exit_code": self.exit_code}

    def lines(self) -> Iterator[str]:
        """For people; what a single node says is said of it."""
        for check, nodes in self.checks:
            is_of_all = len(nodes) == len(self.nodes)
            where = "" if is_of_all else f"{name_nodes(nodes)}: "
            of_all = f" ({len(nodes)} nodes)" if is_of_all and len(nodes) > 1 else ""
            remedy = f"; {check.remedy}" if check.remedy else ""
            yield f"{check.state.upper():8} {check.name:32} {where}{check.value}{of_all}{remedy}"
        warnings, failures = len(self.of_state("warning")), len(self.of_state("failure"))
        counts = f"{len(self.of_state('ok'))} OK, {_count(warnings, 'warning')}, {_count(failures, 'failure')}"
        yield f"{_count(len(self.nodes), 'node')} examined: {counts}"


def examine(config: Config | None, show: Callable[[Report], None], debug: bool = False) -> tuple[Report | None, int]:
    """Examines this machine, or with the other tasks of a step all its nodes.

    Args:
        config: The run that is to be made here, if there is one.
        show: Called with the report, on rank 0; what srun says of the others' exit codes comes after it.
        debug: Whether an error that nobody foresaw ends it, with its traceback.

    Returns:
        The report, on rank 0; and on every rank the exit code.

    Raises:
        ElectraError: This is not rank 0, and rank 0 is not reached.
    """
    environment = dict(os.environ)
    names = nodes_of_step()
    nodes = [*names, *map(address_of, names[:1])]
    process = find_process()
    if process.world_size == 1:
        checks, kernels = examine_node(config, process, environment, nodes, debug)
        return _of_one_node(checks, kernels, show)
    return _examine_all(config, show, process, environment, nodes, debug)


def _examine_all(
    config: Config | None,
    show: Callable[[Report], None],
    process: Process,
    environment: Mapping[str, str],
    nodes: list[str],
    debug: bool,
) -> tuple[Report | None, int]:
    try:
        from pipeline.meeting import Meeting
    except ImportError as error:
        raise ElectraError(f"{_this_node()}: torch cannot be imported ({error}); install it again there") from None
    checks: list[Check] = []
    kernels: dict[str, Any] = {}
    try:
        with Meeting(process, JOIN_S) as meeting:
            checks, kernels = examine_node(config, process, environment, nodes, debug)
            own = [asdict(check) for check in checks]
            answers = meeting.exchange("being examined", own, _EXAMINING_S)
            together = meeting.exchange("comparing", [asdict(check) for check in check_together(meeting, config)])
            by_node: dict[str, list[Check]] = {}
            for node, first, second in zip(meeting.nodes, answers, together, strict=True):
                by_node.setdefault(node, []).extend(Check(**each) for each in [*first, *second])
            report = Report(list(by_node), compare(by_node), kernels)
            met = ok("processes", f"{process.world_size} on {len(by_node)} nodes: {', '.join(by_node)}")
            report.checks.insert(0, (met, report.nodes))
            if process.rank == 0:
                show(report)
            with suppress(ElectraError):  # all is known
                meeting.exchange("showing the report", None)
            return (report if process.rank == 0 else None), report.exit_code
    except ElectraError as error:
        if process.rank:
            raise
        if not checks:  # what is known of this node may help to tell why
            checks, kernels = examine_node(config, process, environment, nodes, debug)
        return _of_one_node([failure("processes", str(error), _OF_ABSENCE), *checks], kernels, show)


def _of_one_node(checks: list[Check], kernels: dict[str, Any], show: Callable[[Report], None]) -> tuple[Report, int]:
    report = Report([_this_node()], compare({_this_node(): checks}), kernels)
    show(report)
    return report, report.exit_code


def _this_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # as pipeline.meeting has it, without torch


def examine_node(
    config: Config | None, process: Process, environment: Mapping[str, str], nodes: list[str], debug: bool = False
) -> tuple[list[Check], dict[str, Any]]:
    """All questions to this node by the first of its processes; of the others, whether they see their GPUs.

    Args:
        config: The run, if there is one.
        process: This one.
        environment: As it was when the program began.
        nodes: Of this job.
        debug: Whether an error that nobody foresaw ends it.

    Returns:
        The checks; and what is known of kernels.
    """
    checks: list[Check] = []
    kernels: dict[str, Any] = {}

    def put(name: str, question: Callable[..., Iterable[Check]], *arguments: Any, limit_s: float = LIMIT_S) -> None:
        checks.extend(ask(name, question, *arguments, limit_s=limit_s, debug=debug))

    def about_kernels() -> Iterator[Check]:
        kernels.update(kernel_table())
        yield from check_kernels(kernels, config)

    if process.local_rank:
        put("gpus", check_gpus, config, limit_s=_KERNELS_S)
        return checks, kernels
    put("versions", check_versions, limit_s=_KERNELS_S)
    put("gpus", check_gpus, config, limit_s=_KERNELS_S)  # before kernels take memory on them
    put("kernels", about_kernels, limit_s=_KERNELS_S)
    put("deepspeed imports", check_deepspeed, limit_s=_DEEPSPEED_S)
    put("slurm", check_slurm)
    num_here = max(processes_on_this_machine(process), len(kernels.get("devices", [])))  # a run has one a GPU
    num_shards = _num_shards(config)
    put("open files", check_limits, num_shards)
    put("memory", check_memory, config, num_here, bool(kernels.get("devices") or given_gpus(environment)))
    put("threads", check_threads, environment, len(os.sched_getaffinity(0)), num_here)
    needs_hub = config is not None and any(corpus.hub for corpus in config.data.corpora)
    put("TMPDIR", check_folders, environment, needs_hub)
    put("network", check_network, environment, process.world_size == 1)
    put("launcher", check_leftovers, environment, nodes)
    if process.rank == 0:
        put("job", check_job, config)
        put("mlflow server", check_tracking, config)
    if config is not None:
        for name, question in (
            ("run.dir", check_run_dir), ("space", check_space), ("shards", check_shards), ("corpora", check_corpora),
            ("inputs", check_inputs), ("tasks' data", check_tasks),
        ):  # fmt: skip
            put(name, question, config)
    return checks, kernels


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _num_shards(config: Config | None) -> int:
    found: list[int] = []

    def question() -> Iterator[Check]:
        if config is not None:
            found.append(count_shards(config))
        yield from ()

    ask("shards", question)  # what is wrong with them, check_shards says
    return found[0] if found else 0
