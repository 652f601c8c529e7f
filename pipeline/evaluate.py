"""The evaluate stage: a checkpoint, or a Hugging Face folder, to scores by fine-tuning its discriminator.

    pretrained ──▶ units (task, recipe, seed), claimed one by one ──▶ result.json each ──▶ results.json

Processes of a job, and jobs of an array, share the units; each is done once. A unit that fails does not stop the rest.
"""

from datetime import timedelta
from pathlib import Path

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
from pipeline.errors import ElectraError, StoppedEarly
from pipeline.evaluation.pretrained import find_more, find_pretrained
from pipeline.evaluation.results import Results, gather, write_progress, write_results, write_summary
from pipeline.evaluation.runner import Runner
from pipeline.evaluation.tasks import load_tasks
from pipeline.evaluation.units import Shift, Unit, plan_units
from pipeline.launch import threads_per_process
from pipeline.log import log_to_file, logger
from pipeline.stages import StageRecord, stage_folder
from pipeline.stopping import StopRequest

_LONGEST_WAIT = timedelta(days=2)  # of a process whose units were short for one whose units are long


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
    tasks = load_tasks(config)
    for task in tasks:
        task.check()
    chosen = find_pretrained(config)
    sources = {source.label: source for source in [chosen, *find_more(config)]}
    of_each = {label: plan_units(config, folder, source, tasks) for label, source in sources.items()}
    units = [unit for of_one in of_each.values() for unit in of_one]
    logger.info("%s: %d of %d units to do", ", ".join(of_each), sum(not u.finished() for u in units), len(units))

    element, elements = place_in_array()
    share, shares = element * process.world_size + process.rank, elements * process.world_size
    shift, stop = Shift(units, share, shares, may_leave=elements > 1), StopRequest()
    runner = Runner(config, device)
    for unit, claim in shift.claims(stop.reason):
        with claim:
            _do(runner, unit, stop)
        if unit.pretrained.label == chosen.label:
            write_progress(folder, gather(config, of_each[chosen.label]), record.fingerprint)

    (stops,) = control.sum([float(stop.reason() is not None)])
    done = f"{sum(unit.finished() is not None for unit in units)} of {len(units)} units done"
    if stops:
        ignore_stop_signals()
        raise StoppedEarly(f"stopped with {done}; the same command goes on")
    if shift.pending():
        logger.info("%s; other jobs of the array do the rest", done)
        return False
    if process.rank == 0:
        _refuse_failures(folder, units, done)
        results = {label: gather(config, of_one) for label, of_one in of_each.items()}
        for label, of_one in of_each.items():
            write_results(folder, results[label], of_one)
        write_summary(folder, results[chosen.label], record.fingerprint)
        record.output = {"checkpoint_step": chosen.step, "results": str(folder / "results.json")}
        record.metrics, record.metrics_step = metrics_of(results[chosen.label]), chosen.step
    return True


def _do(runner: Runner, unit: Unit, stop: StopRequest) -> None:
    """Does one unit; a failure is noted beside it, and the next one goes on."""
    try:
        result = runner.run(unit, stop.reason)
    except (ElectraError, RuntimeError, OSError, ValueError) as error:
        unit.write_failure(error)
        logger.error("%s failed: %s", unit.name, error, exc_info=not isinstance(error, ElectraError))
        return
    if result:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        logger.info("%s: %s in %.1f s", unit.name, scores, result["seconds"])


def _refuse_failures(folder: Path, units: list[Unit], done: str) -> None:
    """Ends the stage where units are missing: they failed, or others did that they start from."""
    failures = [f"{unit.name}: {error}" for unit in units if (error := unit.failure()) and not unit.finished()]
    if failures:
        raise ElectraError(
            f"{done}, the others failed:\n  " + "\n  ".join(failures) + f"\n{folder}/results_so_far.json has what is "
            "there, and the same command tries the rest again"
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
