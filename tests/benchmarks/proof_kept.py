"""Of earlier tables of proof.py, the lines of runs whose folders are no longer at hand.

Weights are not kept in the repository and folders on scratch disks end with them, so that the tables are what remains.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.comparison.curves import Curves
from pipeline.comparison.run import Run
from pipeline.evaluation.scores import summarize
from pipeline.evaluation.stored import Results

T = TypeVar("T")
Line = dict[str, str]
"""A table's line: heading to what stands there."""


@dataclass
class Kept:
    """What earlier tables say of runs that are not given anew.

    Attributes:
        order: The names of all runs of the earlier tables.
        runs: Names and scores alone; no settings, no journal.
        about: Lines of the table of runs.
        held_out: Lines of the table of held-out scores.
        journal: Lines of the CSV, without the heading.
        scores: Lines of the CSV, without the heading.
    """

    order: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    about: list[Line] = field(default_factory=list)
    held_out: list[Line] = field(default_factory=list)
    journal: list[list[str]] = field(default_factory=list)
    scores: list[list[str]] = field(default_factory=list)

    def in_order(self, lines: Iterable[T], name_of: Callable[[T], str]) -> list[T]:
        """Lines sorted as the earlier tables have their runs, those of new runs at the end."""
        place = {name: place for place, name in enumerate(self.order)}
        return sorted(lines, key=lambda line: place.get(name_of(line), len(place)))


def read_kept(out: Path, given: Sequence[Run]) -> Kept:
    """From OUT.md, OUT_journal.csv and OUT_scores.csv all but the lines of the runs ``given``.

    Of those that were trained at the same commit, scores of checkpoints and tasks that their folders do not have are
    added to them.

    Raises:
        SystemExit: One of the files is absent.
    """
    try:
        about, held_out, *_ = _markdown_tables(out.with_name(f"{out.name}.md").read_text(encoding="utf-8"))
        journal, scores = (_csv(out.with_name(f"{out.name}_{name}.csv")) for name in ("journal", "scores"))
    except FileNotFoundError as error:
        raise SystemExit(f"--keep: {error.filename} is not there; leave --keep out to write the first tables") from None
    order = [line["run"] for line in about]
    commits = {line["run"]: line.get("git commit", "–") for line in about}
    for run in given:
        if commits.get(run.name) == (run.facts.get("git") or "–"):  # else it was trained anew
            _add_scores(run, [line for line in scores if line[0] == run.name])
    names = {run.name for run in given}
    about, held_out = ([line for line in lines if line["run"] not in names] for lines in (about, held_out))
    journal, scores = ([line for line in lines if line[0] not in names] for lines in (journal, scores))
    runs = [_run(line["run"], [of for of in scores if of[0] == line["run"]]) for line in about]
    return Kept(order, runs, about, held_out, journal, scores)


def _markdown_tables(text: str) -> list[list[Line]]:
    def cells(row: str) -> list[str]:
        return [cell.strip() for cell in row.strip("| ").split("|")]

    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[dict(zip(cells(rows[0]), cells(row), strict=True)) for row in rows[2:]] for rows in blocks]


def _csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _run(name: str, scores: list[list[str]]) -> Run:
    results = _all_results(scores)
    return Run(name, "earlier tables", {}, {}, Curves({}, {}), {}, results[-1] if results else None, results)


def _add_scores(run: Run, scores: list[list[str]]) -> None:
    for earlier in _all_results(scores):
        of_step = [results for results in run.all_results if results["step"] == earlier["step"]]
        if not of_step:
            run.all_results.append(earlier)
        for results in [*of_step, *([run.results] if run.results else [])]:
            if results["step"] == earlier["step"]:
                for part in ("score", "tasks"):
                    results[part] = earlier[part] | results[part]
    run.all_results.sort(key=lambda results: results["step"] or 0)


def _all_results(scores: list[list[str]]) -> list[Results]:
    steps = dict.fromkeys(line[1] for line in scores)
    return [_results(step, [line for line in scores if line[1] == step]) for step in steps]


def _results(step: str, lines: list[list[str]]) -> Results:
    metric_of = {task: metric for _, _, _, task, metric, *_ in lines}
    values = {task: [float(line[6]) / 100 for line in lines if line[3] == task] for task in metric_of}
    return {
        "step": int(step) if step else None, "flops_paper": float(lines[0][2]), "score": metric_of,
        "tasks": {task: {metric: summarize(values[task])} for task, metric in metric_of.items()},
    }  # fmt: skip
