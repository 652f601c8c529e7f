"""A run that is killed a hundred times and comes out as if it never had been.

    python -m tests.soak.soak --kills 100 --zero 1 --report tests/soak/report.md

Two processes train a tiny model. The kills are spread over all steps of the run: half of them while a checkpoint is
being written, the others between, some before the first step; a tenth hits the command itself, which is then given
again. The same run without a kill is what the outcome is compared with, bit for bit.
"""

import argparse
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.goodput import read_attempts, total_seconds
from tests.conftest import REPOSITORY, TINY, make_text
from tests.distributed.drill import Drill, kill, run, zero

STEPS_BETWEEN_KILLS, CHECKPOINT_EVERY = 4, 2
_PROCESSES = 2
_LONGEST_START_S, _LONGEST_FORKED_START_S, _PATIENCE_S = 6.0, 2.0, 1200.0
_STEP_S, _WRITE_S, _PUBLISH_S = 0.03, 0.06, 0.04  # slowed down, so that kills fall into each
_SLOW = "; ".join(
    f"slow@phase={phase},seconds={seconds}"
    for phase, seconds in (("step", _STEP_S), ("write", _WRITE_S), ("publish", _PUBLISH_S))
)


@dataclass(frozen=True)
class Kill:
    """One of the kills to come.

    Attributes:
        when: start-up (before the first step), step, or save.
        victim: A rank; None: the command.
        step: At or after which it comes.
        delay: From 0 to 1, how far into that.
    """

    when: str
    victim: int | None
    step: int
    delay: float


@dataclass
class Outcome:
    """What a soak found.

    Attributes:
        stage: Of ZeRO.
        steps: Of the run.
        kills: How often each (moment, victim) was hit.
        commands: How often the command was given.
        attempts: How often the stage was started.
        replayed_steps: Steps made more than once.
        seconds: Of the attempts, by class.
        wall_s: Of the whole soak.
        differences: What is not as it should be; empty: all is.
    """

    stage: int
    steps: int
    kills: Counter = field(default_factory=Counter)
    commands: int = 1
    attempts: int = 0
    replayed_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    differences: list[str] = field(default_factory=list)


def plan_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Kills in the order of their steps: half while saving, a tenth at the start, a tenth of the command."""
    draw = random.Random(seed)
    kinds = [("save", "step", "save", "step", "save", "step", "save", "step", "save", "start-up")[i % 10]
             for i in range(count)]  # fmt: skip
    victims = [None if i % 10 == 4 else draw.randrange(_PROCESSES) for i in range(count)]
    draw.shuffle(kinds)
    draw.shuffle(victims)
    last = steps - 2 * CHECKPOINT_EVERY  # a save follows
    return [
        Kill(when, victim, 1 + int((i + draw.random()) * last / count), draw.random())
        for i, (when, victim) in enumerate(zip(kinds, victims, strict=True))
    ]


def _run_patiently(drill: Drill) -> Drill:
    return run(drill, timeout_s=_PATIENCE_S)


def soak(
    folder: Path,
    kills: int,
    stage: int,
    seed: int = 0,
    run_whole: Callable[[Drill], Drill] = _run_patiently,
    forks: bool = False,
) -> Outcome:
    """Runs once whole, by ``run_whole``, and once under fire, and compares; with ``forks`` ranks are forked."""
    began = time.monotonic()
    config = folder / "tiny.yaml"
    if not config.exists():
        (folder / "made_up.txt").write_text(make_text(300), encoding="utf-8")
        config.write_text(TINY.format(run_dir=folder / "out", corpus=folder / "made_up.txt"), encoding="utf-8")
    steps = max(20, STEPS_BETWEEN_KILLS * kills)
    overrides = [zero(stage), f"train.steps={steps}", f"train.checkpoint_every={CHECKPOINT_EVERY}",
                 f"launch.processes={_PROCESSES}", f"launch.restarts={kills + 1}"]  # fmt: skip
    whole = run_whole(Drill(config, f"whole{stage}", *overrides))
    outcome = Outcome(stage, steps)
    with Drill(config, f"killed{stage}", *overrides, fault=_SLOW, forks=forks) as drill:
        for number, planned in enumerate(plan_kills(kills, steps, seed), 1):
            struck = _strike(drill, planned, _LONGEST_FORKED_START_S if forks else _LONGEST_START_S)
            if struck is None:
                outcome.differences.append(f"it had ended before kill {number}")
                break
            outcome.kills[struck] += 1
            outcome.commands += struck[1] == "command"
            print(f"kill {number}: {struck[1]}, {struck[0]}, step {drill.attempt[1]} of {steps}", flush=True)
        code = drill.wait(_PATIENCE_S)
        outcome.differences += [f"exit code {code}"] if code else []
        outcome.differences += [f"process {pid} is left over" for pid in drill.left_over()]
    outcome.differences += _compare(whole, drill, steps)
    attempts = read_attempts(drill.folder)
    outcome.attempts = attempts[-1].number
    outcome.replayed_steps = sum(attempt.step - attempt.first_step for attempt in attempts) - steps
    outcome.seconds = total_seconds(attempts)
    outcome.wall_s = time.monotonic() - began
    return outcome


def _strike(drill: Drill, planned: Kill, longest_start_s: float) -> tuple[str, str] | None:
    """Kills as planned; returns what was really hit: a save that was waited for may just have ended."""
    before, _ = drill.attempt
    if not drill.until(lambda: len(drill.ranks()) == _PROCESSES):
        return None
    ranks = drill.ranks()
    if planned.when == "start-up":
        time.sleep(planned.delay * longest_start_s)
    elif not drill.until_step(planned.step, before):
        return None
    elif planned.when == "save":
        drill.until(lambda: not drill.is_saving)
        drill.until(lambda: drill.is_saving)
        time.sleep(planned.delay * (_WRITE_S + _PUBLISH_S))
    else:
        time.sleep(planned.delay * _STEP_S)
    if drill.code is not None:
        return None
    when = "start-up" if drill.attempt[0] == before else "save" if drill.is_saving else "step"
    pid = drill.command_pid if planned.victim is None else ranks[planned.victim]
    if not kill(pid):
        return None
    if planned.victim is None:
        drill.wait()
        assert not drill.left_over(), "a process outlives the command"
        drill.start()
    else:
        drill.until(lambda: not set(ranks.values()) & set(drill.ranks().values()))
    return when, "command" if planned.victim is None else f"rank {planned.victim}"


def _compare(whole: Drill, killed: Drill, steps: int) -> list[str]:
    """What differs between the unbroken run and the one under fire."""
    found = []
    if killed.journal() != whole.journal():
        found.append("the journals differ")
    if [entry["step"] for entry in killed.journal()] != list(range(1, steps + 1)):
        found.append("steps are missing in the journal, or stand in it twice")
    if killed.digest(steps) != whole.digest(steps):
        found.append("weights or moments differ")
    if list(killed.folder.glob("checkpoints/*.damaged-*")):
        found.append("a checkpoint was damaged")
    return found


def describe(outcome: Outcome, arguments: str) -> str:
    """A section of the report."""
    count, whole = sum(outcome.kills.values()), sum(outcome.seconds.values())
    lines = [
        f"## ZeRO {outcome.stage}: {count} kills",
        "",
        f"    python -m tests.soak.soak {arguments}",
        "",
        f"{_machine()}; {outcome.wall_s:,.0f} s in all, {outcome.steps:,} steps, a checkpoint every "
        f"{CHECKPOINT_EVERY}. The command was given {outcome.commands} times and started the stage "
        f"{outcome.attempts} times in all; {outcome.replayed_steps:,} steps were made again.",
        "",
        "**" + ("; ".join(outcome.differences) or "Journal, weights and moments equal the unbroken run's, bit for bit; "
                "no process is left over") + ".**",
        "",
        "| victim | during a save | between | before the first step |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    for victim in ("rank 0", "rank 1", "command"):
        cells = (str(outcome.kills[when, victim]) for when in ("save", "step", "start-up"))
        lines.append(f"| {victim} | {' | '.join(cells)} |")
    lines += ["", "| class | seconds | % |", "|---|---:|---:|"]
    for name, seconds in outcome.seconds.items():
        lines.append(f"| {name} | {seconds:,.1f} | {100 * seconds / whole:.1f} |")
    return "\n".join(lines) + "\n"


def _machine() -> str:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"Commit {commit.stdout.strip()}; {match[1] if match else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def write_section(report: Path, section: str) -> None:
    """Puts a section into the report, in place of the one about the same stage."""
    title = "# Killed over and over\n\nWritten by `tests/soak/soak.py`; README.md says how to read it.\n"
    sections = re.split(r"^(?=## )", report.read_text(encoding="utf-8"), flags=re.M)[1:] if report.exists() else []
    stage = section.partition(":")[0]
    kept = [old for old in sections if old.partition(":")[0] != stage]
    report.write_text("\n".join(part.strip() + "\n" for part in [title, *sorted([*kept, section])]), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--zero", type=int, default=1, choices=range(4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        outcome = soak(Path(folder), given.kills, given.zero, given.seed)
    section = describe(outcome, f"--kills {given.kills} --zero {given.zero} --seed {given.seed}")
    print(section)
    if given.report:
        write_section(given.report, section)
    sys.exit(bool(outcome.differences))


if __name__ == "__main__":
    main()
