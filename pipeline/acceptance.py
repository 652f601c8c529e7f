"""Whether a cluster can be trusted with a run: parts that ask it something, one process group each, and their report.

    every rank ──▶ quick ──▶ bandwidth ──▶ mfu ──▶ data ──▶ unbroken, killed, resumed ──▶ parity
                     │ a child process of its own for each part; the first that does not end well is the last
                     └──▶ <run.dir>/acceptance/parts/<part>.json ──▶ rank 0: report.json, report.md, PASSED or FAILED

A part has processes of its own, since a group that has failed cannot be used again; and a port of its own, so that
nobody meets a process of the part before.
"""

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import click

from data_shards.store import write_json
from pipeline.attempts import EXIT_FILE
from pipeline.config import Config
from pipeline.distributed import RENDEZVOUS, Process, own_port
from pipeline.environment import describe_environment
from pipeline.errors import ElectraError, StoppedEarly
from pipeline.launch import Children
from pipeline.log import logger

PARTS = {
    "quick": ("acceptance_quick", "meeting, versions, run.dir, clocks, disk, products, a small all-reduce"),
    "bandwidth": ("acceptance_speed", "an all-reduce of 64 MiB"),
    "mfu": ("acceptance_speed", "a few steps of the configured model on each process"),
    "data": ("acceptance_drill", "the bundled sample tokenized, for the parts after"),
    "unbroken": ("acceptance_drill", "a tiny run from start to end"),
    "killed": ("acceptance_drill", "the same run, all its processes killed in the middle"),
    "resumed": ("acceptance_drill", "the killed run to its end: equal weights"),
    "parity": ("acceptance_drill", "ten steps of a tiny model under each ZeRO stage: equal losses"),
}
"""Parts in the order in which they run: the module whose function of that name asks, and what."""

MEANT_TO_DIE = "killed"
_LONGEST_PART_S = 600  # what hangs longer is ended by a signal that needs nobody's cooperation

State = Literal["OK", "WARNING", "FAILED"]


@dataclass(frozen=True)
class Check:
    """One thing that was asked.

    Attributes:
        name: What.
        state: ``WARNING`` fails nothing.
        found: What was found, with numbers and units.
        remedy: What to do about it; empty where nothing is to be done.
        numbers: The same for machines.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.state:8} {self.name:18} {self.found}{'; ' if self.remedy else ''}{self.remedy}"


def run_part(config: Config, process: Process, part: str, keeps: bool = True) -> None:
    """Runs one part on this process; rank 0 prints its checks.

    Args:
        config: The run that the cluster is to be trusted with.
        process: This one.
        part: A key of ``PARTS``.
        keeps: Whether the result is kept for the report.

    Raises:
        ElectraError: A check failed, on every rank alike, or this rank could not go on.
    """
    ask = getattr(import_module(f"pipeline.{PARTS[part][0]}"), part)
    signal.alarm(_LONGEST_PART_S)
    began = time.monotonic()
    try:
        checks = ask(config, process)
    except StoppedEarly:
        raise
    except ElectraError as error:
        if process.rank:
            raise
        checks = [Check(part, "FAILED", str(error))]
    if process.rank == 0:
        for check in checks:
            click.echo(check)
        if keeps:
            content = {"part": part, "seconds": time.monotonic() - began, "checks": [asdict(check) for check in checks]}
            _parts_folder(config).mkdir(parents=True, exist_ok=True)
            write_json(_parts_folder(config) / f"{part}.json", content)
    failed = [check.name for check in checks if check.state == "FAILED"]
    if failed:
        raise ElectraError(f"{part}: FAILED: {', '.join(failed)}" if process.rank == 0 else "")


def folder_of(config: Config) -> Path:
    """Where reports go, and everything that the parts write."""
    return config.run.dir / "acceptance"


def _parts_folder(config: Config) -> Path:
    return folder_of(config) / "parts"


def conduct(config: Config, process: Process, arguments: list[str]) -> None:
    """All parts one after the other, each in a child process of every rank; rank 0 writes the report.

    Args:
        config: The run that the cluster is to be trusted with.
        process: This one.
        arguments: Config file and overrides, for the children.

    Raises:
        ElectraError: Not passed; on rank 0 alone. The others end in silence, or Slurm might end rank 0 for it.
    """
    began = time.monotonic()
    if process.rank == 0:
        shutil.rmtree(_parts_folder(config), ignore_errors=True)
        _parts_folder(config).mkdir(parents=True)
    logger.disabled = True  # that a child was killed on purpose is no news
    with Children() as children:
        for number, (part, (_, asked)) in enumerate(PARTS.items()):
            if process.rank == 0:
                click.echo(f"acceptance, {part}: {asked}")
            environment = os.environ | {RENDEZVOUS: f"acceptance {part}"} | own_port(number + 1)
            environment.pop(EXIT_FILE, None)  # which is for the end of the whole
            code = children.run(["acceptance", *arguments, "--part", part], environment)
            ended_as_meant = children.lost if part == MEANT_TO_DIE else code == 0
            if children.told_to_stop or not ended_as_meant:
                break
    if process.rank == 0:
        _conclude(config, time.monotonic() - began, process)


def _conclude(config: Config, seconds: float, process: Process) -> None:
    """Writes the report and says what it says."""
    report = make_report(config, seconds, process.world_size)
    folder = folder_of(config)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    if report["passed"]:
        shutil.rmtree(folder / "drill", ignore_errors=True)  # else it is kept, to be looked into
    for part in report["parts"].values():  # once more, without what training says in between
        for check in part["checks"]:
            click.echo(Check(**check))
    click.echo(f"{'PASSED' if report['passed'] else 'FAILED'}: {report['summary']}; {folder / 'report.md'}")
    if not report["passed"]:
        raise ElectraError("")


def make_report(config: Config, seconds: float, world_size: int) -> dict[str, Any]:
    """What the parts have found, as JSON types."""
    found = {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part in PARTS
        if (path := _parts_folder(config) / f"{part}.json").exists()
    }
    checks = [check for part in found.values() for check in part["checks"]]
    failed = [check["name"] for check in checks if check["state"] == "FAILED"]
    warned = [check["name"] for check in checks if check["state"] == "WARNING"]
    missing = [part for part in PARTS if part not in found and part != MEANT_TO_DIE]
    parts_of_summary = [
        f"{len(checks)} checks in {seconds:.0f} s",
        *([f"failed: {', '.join(failed)}"] if failed else []),
        *([f"warnings: {', '.join(warned)}"] if warned else []),
        *([f"without a result: {', '.join(missing)}; the log says more"] if missing else []),
    ]
    return {
        "passed": not failed and not missing,
        "summary": "; ".join(parts_of_summary),
        "unix_s": time.time(),
        "seconds": seconds,
        "processes": world_size,
        "config": config.model_dump(mode="json"),
        "environment": describe_environment(),
        "parts": found,
        "missing": missing,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """A report for people."""
    environment = report["environment"]
    versions = environment["packages"] | {"python": environment["python"], "electra": environment["electra"]}
    nodes = report["parts"].get("quick", {}).get("checks", [{}])[0].get("numbers", {}).get("nodes", [])
    lines = [
        f"# Acceptance: {'PASSED' if report['passed'] else 'FAILED'}",
        "",
        f"{report['summary']}.",
        "",
        f"- when: {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(report['unix_s']))}",
        f"- processes: {report['processes']} on {', '.join(nodes) or 'unknown nodes'}",
        f"- job: {environment['slurm'].get('SLURM_JOB_ID', 'none')}",
        f"- commit: {environment['git'] or 'unknown'}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
        "",
        "| part | seconds | check | state | found | remedy |",
        "|---|---:|---|---|---|---|",
    ]
    for part, (_, asked) in PARTS.items():
        found = report["parts"].get(part)
        if found is None:
            lines.append(f"| {part} | | {asked} | {'see resumed' if part == MEANT_TO_DIE else 'NO RESULT'} | | |")
            continue
        for check in found["checks"]:
            cells = [part, f"{found['seconds']:.1f}", *(check[key] for key in ("name", "state", "found", "remedy"))]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"
