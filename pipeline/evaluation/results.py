"""What the units say together: medians, spread, the best of a grid, files to submit.

evaluate/results.json  results.md          of the configured checkpoint; results.md has tables beside published scores
evaluate/results_so_far.json               of its units that are done
evaluate/<checkpoint>/results.json  .md    the same for each checkpoint that was evaluated
evaluate/<checkpoint>/submission/          for GLUE's server, and answers to test questions
evaluate/scores_and_flops.png              all of them, against what pretraining cost
"""

import json
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from data_shards.store import write_json
from data_shards.temporaries import publish_bytes
from pipeline.config import Config
from pipeline.evaluation.claims import clear
from pipeline.evaluation.plot import plot_run
from pipeline.evaluation.pretrained import Pretrained
from pipeline.evaluation.recipes import size_of
from pipeline.evaluation.scores import summarize
from pipeline.evaluation.stored import Results, read_results
from pipeline.evaluation.submission import GLUE_FILES, check_complete, write_glue, write_squad
from pipeline.evaluation.table import glue_average, markdown_table
from pipeline.evaluation.tasks import Task
from pipeline.evaluation.units import Unit
from pipeline.journal import read_entries
from pipeline.log import logger
from pipeline.plan import make_plan, with_steps_before
from pipeline.stages import StageRecord, stage_folder


def gather(config: Config, units: list[Unit], record: StageRecord) -> Results:
    """Everything that is known of the units of one checkpoint so far; ``record`` is the stage's."""
    pretrained = units[0].pretrained
    done = {unit: result for unit in units if (result := unit.finished())}
    tasks: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    chosen_units: dict[str, list[Unit]] = {}
    for task in {unit.task.name: unit.task for unit in sorted(units, key=lambda unit: unit.place)}.values():
        by_point: dict[str, list[Unit]] = {}
        for unit in sorted(done, key=lambda unit: (unit.point, unit.seed)):
            if unit.task is task:
                by_point.setdefault(unit.point, []).append(unit)
        if not by_point:
            continue
        point = _best_point(task, by_point, done)
        if point:
            grid[task.name] = _describe_grid(task, by_point, done, point)
        chosen_units[task.name] = by_point[point]
        metrics = [done[unit]["metrics"] for unit in by_point[point]]
        tasks[task.name] = {name: summarize([values[name] for values in metrics]) for name in metrics[0]}
    first = {name: chosen[0] for name, chosen in chosen_units.items()}
    in_average = {name: tasks[name] for name, unit in first.items() if unit.task.config.in_glue_average}
    return {
        **_about(config, pretrained),
        "fingerprint": record.fingerprint,
        "tasks": tasks,
        "score": {name: unit.task.config.metrics[0] for name, unit in first.items()},
        "glue_average": glue_average(in_average),
        "recipes": {name: unit.recipe.to_dict() for name, unit in first.items()},
        "seeds": {name: [unit.seed for unit in chosen] for name, chosen in chosen_units.items()},
        "units": {"done": len(done), "of": len(units)},
        "complete": sorted(tasks.keys() - {unit.task.name for unit in units if unit not in done}),
        "grid": grid,
        "failed": [
            {"task": unit.task.name, "point": unit.point, "seed": unit.seed, "error": error}
            for unit in units
            if (error := unit.failure()) and unit not in done
        ],
    }


def _about(config: Config, pretrained: Pretrained) -> Results:
    plan = make_plan(config, 1, pretrained.vocab_size) if pretrained.step else None
    if plan and config.run.fork_from:
        plan = with_steps_before(plan, config, read_entries(stage_folder(config, "pretrain") / "journal.jsonl"))
    return {
        "checkpoint": str(pretrained.folder),
        "run": config.run.name,
        "step": pretrained.step if plan else None,
        "size": size_of(pretrained.model),
        "flops": plan.flops_at(pretrained.step) if plan else None,
        "flops_paper": plan.flops_paper_at(pretrained.step) if plan else None,
    }


def _median_score(task: Task, units: list[Unit], done: dict[Unit, Results]) -> float:
    name = task.config.metrics[0]
    return summarize([done[unit]["metrics"][name] for unit in units])["median"]


def _best_point(task: Task, by_point: dict[str, list[Unit]], done: dict[Unit, Results]) -> str:
    """The point with the best median of the task's score; of equals the one with the least learning rate."""
    return max(_in_order(by_point), key=lambda point: _median_score(task, by_point[point], done))


def _in_order(by_point: dict[str, list[Unit]]) -> list[str]:
    return sorted(by_point, key=lambda point: (by_point[point][0].recipe.lr, by_point[point][0].recipe.layer_decay))


def _describe_grid(task: Task, by_point: dict[str, list[Unit]], done: dict[Unit, Results], best: str) -> Results:
    points = _in_order(by_point)
    described = [
        {
            "lr": by_point[point][0].recipe.lr,
            "layer_decay": by_point[point][0].recipe.layer_decay,
            "score": _median_score(task, by_point[point], done),
            "seeds": len(by_point[point]),
        }
        for point in points
    ]
    return {"points": described, "chosen": points.index(best), "chosen_on": "dev"}


def set_aside_others(folder: Path, fingerprint: str) -> None:
    """Renames results of other inputs to ``*.before-N``: they would stand beside the units of these."""
    if (read_results(folder / "results.json") or {}).get("fingerprint") == fingerprint:
        return
    number = next(number for number in count(1) if not list(folder.glob(f"results.before-{number}.*")))
    for name in ("results.json", "results.md"):
        path = folder / name
        with suppress(FileNotFoundError):  # none there, or another element of an array was first
            os.replace(path, path.with_name(f"{path.stem}.before-{number}{path.suffix}"))


def write_progress(folder: Path, results: Results) -> None:
    """What is known while units are still to do."""
    write_json(folder / "results_so_far.json", results)


def write_results(folder: Path, results: Results, units: list[Unit]) -> None:
    """What there is of one checkpoint, all of whose units are done: files to submit, tables, and its results.json."""
    for unit in units:
        clear(unit.folder)
    of_checkpoint = folder / units[0].pretrained.label
    write_submissions(of_checkpoint / "submission", results, units)
    publish_bytes(of_checkpoint / "results.md", markdown_table(results, results["size"]).encode())
    write_json(of_checkpoint / "results.json", results)


def write_summary(folder: Path, results: Results) -> None:
    """The configured checkpoint's results, last results.json, and the plot of all checkpoints evaluated so far."""
    publish_bytes(folder / "results.md", markdown_table(results, results["size"]).encode())
    write_progress(folder, results)
    found = map(read_results, sorted(folder.glob("*/results.json")))
    plot_run([results for results in found if results], folder)
    write_json(folder / "results.json", results)


def write_submissions(folder: Path, results: Results, units: list[Unit]) -> None:
    """Predictions on test files, of the seed that did best on dev; ``chosen.json`` says which.

    Of tasks with one test file, the predictions of the first in ``evaluate.tasks`` have its name.
    """
    chosen: dict[str, Any] = {}
    writers: dict[str, str] = {}  # test file to the task whose predictions on it have its name
    _remove_written(folder)
    for name in results["tasks"]:
        unit = _best_unit(name, results, units)
        for test in unit.task.tests():
            answers = json.loads((unit.folder / f"test_{test}.json").read_text(encoding="utf-8"))
            place = folder if writers.setdefault(test, name) == name else folder / name
            if place != folder:
                logger.warning("%s: predictions of %s on %s, beside those of %s", place, name, test, writers[test])
            path = _write_predictions(place, test, unit.task.kind, answers)
            about = {"task": name, "seed": unit.seed, "point": unit.point, "chosen_on": "dev"}
            chosen[str(path.relative_to(folder))] = about
    if chosen:
        write_json(folder / "chosen.json", chosen)
        logger.info("predictions on test files: %s", folder)
        missing = check_complete(folder)
        if 0 < len(missing) < len(GLUE_FILES):
            logger.info("GLUE's server wants eleven files; missing: %s", ", ".join(missing))


def _write_predictions(folder: Path, test: str, kind: str, answers: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "question_answering":
        return write_squad(folder, test, answers)
    if kind == "tagging":
        path = folder / f"{test}.json"
        write_json(path, answers)
        return path
    return write_glue(folder, test, kind, answers)


def _remove_written(folder: Path) -> None:
    """Removes what was written here before, which may be of tasks that are no longer evaluated, and nothing else."""
    with suppress(FileNotFoundError, ValueError):
        for name in json.loads((folder / "chosen.json").read_text(encoding="utf-8")):
            (folder / name).unlink(missing_ok=True)
        (folder / "chosen.json").unlink()


def _best_unit(name: str, results: Results, units: list[Unit]) -> Unit:
    summary = results["tasks"][name][results["score"][name]]
    seed = results["seeds"][name][summary["values"].index(max(summary["values"]))]
    recipe = results["recipes"][name]
    return next(
        unit for unit in units
        if (unit.task.name, unit.seed, unit.recipe.to_dict()) == (name, seed, recipe)
    )  # fmt: skip
