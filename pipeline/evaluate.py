"""The evaluate stage: a checkpoint, or a Hugging Face folder, to scores by fine-tuning its discriminator.

    pretrained ──▶ units (task, recipe, seed), claimed one by one ──▶ result.json each ──▶ results.json

Processes of a job, and jobs of an array, share the units; each is done once. A unit that fails does not stop the rest.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from data_shards.temporaries import remove_abandoned
from pipeline.config import Config
from pipeline.distributed import (
    Control,
    Process,
    ignore_stop_signals,
    init_process_group,
    place_in_array,
    processes_on_this_machine,
    resolve_device,
)
from pipeline.errors import FORESEEN, ElectraError, StoppedEarly
from pipeline.evaluation.pretrained import Pretrained, find_more, find_pretrained
from pipeline.evaluation.results import (
    Results,
    gather,
    set_aside_others,
    write_progress,
    write_results,
    write_summary,
)
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.tasks import load_tasks
from pipeline.evaluation.units import Shift, Unit, plan_units
from pipeline.launch import threads_per_process
from pipeline.log import log_to_file, logger
from pipeline.stages import StageRecord, stage_folder
from pipeline.stopping import StopRequest

_LONGEST_WAIT = timedelta(days=2)  # of a process whose units were short for one whose units are long
_MOST_FAILURES_IN_A_ROW = 3
Plan = TypeVar("Plan")


def run_evaluate(config: Config, record: StageRecord, process: Process) -> bool:
    """Fine-tunes every unit that is not done, and writes results.json.

    Returns:
        False where other jobs of an array still do units: the last one to end writes the results.

    Raises:
        ConfigError, DamagedError: A task, its data or the checkpoint is not as it should be; before any training.
        StoppedEarly: Told to stop; the unit in hand goes on from where it was.
        ElectraError: Units failed; the others are done.
    """
    folder = stage_folder(config, "evaluate")
    log_to_file(folder / "log.txt", process.rank)
    device = resolve_device(config.launch.device)
    torch.set_num_threads(threads_per_process(config, processes_on_this_machine(process)))
    init_process_group(process, device, _LONGEST_WAIT)
    control = Control(device, _LONGEST_WAIT)

    if process.rank == 0:
        remove_abandoned(folder)
        set_aside_others(folder, record.fingerprint)
    of_each = _agree(control, lambda: _plan(config, folder))
    if process.rank == 0:
        for label in of_each:
            set_aside_others(folder / label, record.fingerprint)
    units = [unit for of_one in of_each.values() for unit in of_one]
    logger.info("%s: %d of %d units to do", ", ".join(of_each), sum(not u.finished() for u in units), len(units))

    element, elements = place_in_array()
    share, shares = element * process.world_size + process.rank, elements * process.world_size
    shift, stop = Shift(units, share, shares, may_leave=elements > 1), StopRequest()
    chosen = next(iter(of_each.values()))
    runner = Runner(config, device)
    gave_up = _work(config, shift, runner, stop, lambda: write_progress(folder, gather(config, chosen, record)))

    stops, gave_up = control.sum([float(stop.reason() is not None), float(gave_up)])
    done = f"{sum(unit.finished() is not None for unit in units)} of {len(units)} units done"
    if stops:
        ignore_stop_signals()
        raise StoppedEarly(f"stopped with {done}; the same command goes on")
    if elements > 1 and shift.pending():
        if gave_up:
            raise ElectraError(
                f"{done}, and {_MOST_FAILURES_IN_A_ROW} in a row failed here, as if this machine were at fault; other "
                "jobs of the array may do the rest, and the same command tries it again"
            )
        logger.info("%s; other jobs of the array do the rest", done)
        return False
    if process.rank == 0:
        for of_one in of_each.values():
            if all(unit.finished() for unit in of_one):
                write_results(folder, gather(config, of_one, record), of_one)
        _refuse_missing(folder, units, done)
        results = gather(config, chosen, record)
        write_summary(folder, results)
        remove_abandoned(folder, below=False)  # of processes that were killed since
        scored = chosen[0].pretrained
        record.output = {"checkpoint_step": scored.step, "results": str(folder / "results.json")}
        record.output |= {"checkpoint": str(scored.folder), "checkpoint_sha256": scored.digest}
        record.metrics, record.metrics_step = metrics_of(results), scored.step
    return True


def _plan(config: Config, folder: Path) -> dict[str, list[Unit]]:
    """The units of each checkpoint, the configured one first; everything that can be checked has been."""
    tasks = load_tasks(config)
    for task in tasks:
        task.check()
    sources: dict[str, Pretrained] = {}
    for source in [find_pretrained(config), *find_more(config)]:
        sources.setdefault(source.label, source)
    units = {label: plan_units(config, folder, source, tasks) for label, source in sources.items()}
    for task in tasks:
        task.forget_examples()  # those of all tasks together may not fit into memory
    return units


def _agree(control: Control, plan: Callable[[], Plan]) -> Plan:
    """The plan, where every process has one.

    Raises:
        ElectraError: The first process's that has none, on all of them, before any of them trains.
    """
    planned, problem = None, None
    try:
        planned = plan()
    except (*FORESEEN, OSError) as error:
        problem = (str(error), int(getattr(error, "exit_code", 1)))
    problems = [found for found in control.gather(problem) if found]
    if problems:
        message, code = problems[0]
        refusal = ElectraError(message if control.is_first else "")  # said once
        refusal.exit_code = code
        raise refusal
    assert planned is not None
    return planned


def _work(config: Config, shift: Shift, runner: Runner, stop: StopRequest, report: Callable[[], None]) -> bool:
    """Does units until there are none left to begin; a failure is noted beside its unit, and the next one goes on.

    Returns:
        Whether it gave up, as one unit after another failed.
    """
    failures_in_a_row = 0
    for unit, claim in shift.claims(stop.reason):
        with claim:
            try:
                result = runner.run(unit, stop.reason)
                failures_in_a_row = 0
            except Exception as error:  # whatever it is, the other units are not to suffer
                unit.write_failure(error, shift.process)
                logger.error("%s failed: %s", unit.name, error, exc_info=not isinstance(error, ElectraError | OSError))
                failures_in_a_row += not isinstance(error, ElectraError)
                result = None
        if result:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
            logger.info("%s: %s in %.1f s", unit.name, scores, result["seconds"])
        report()
        if failures_in_a_row == _MOST_FAILURES_IN_A_ROW:
            logger.error("%d units failed in a row, as if this machine were at fault; no more here", failures_in_a_row)
            return True
    return False


def _refuse_missing(folder: Path, units: list[Unit], done: str) -> None:
    """Ends the stage where units are missing: they failed, or others did that they start from."""
    missing = [unit for unit in units if not unit.finished()]
    if not missing:
        return
    of_reason: dict[str, list[str]] = {}
    for unit in missing:
        waits = unit.needs is not None and not unit.needs.finished()
        reason = unit.failure() or ("what it starts from is missing" if waits else "not tried")
        of_reason.setdefault(reason, []).append(unit.name)
    lines = [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {why}" for why, names in of_reason.items()]
    raise ElectraError(
        f"{done}, the others failed:\n  " + "\n  ".join(lines) + f"\n{folder}/results_so_far.json has what is there, "
        "and a checkpoint that is done its own results.json; the same command tries the rest again"
    )


def metrics_of(results: Results) -> dict[str, float]:
    """Medians by MLflow's names, with mean, spread and interval."""
    metrics = {}
    for task, of_task in results["tasks"].items():
        for metric, summary in of_task.items():
            name = f"eval/{task}_{metric}"
            low, high = summary["ci95"] or (None, None)
            metrics |= {
                name: summary["median"], f"{name}_mean": summary["mean"], f"{name}_std": summary["std"],
                f"{name}_ci95_low": low, f"{name}_ci95_high": high,
            }  # fmt: skip
    metrics["eval/glue_average"] = results["glue_average"]
    return {name: value for name, value in metrics.items() if value is not None}
