"""The command line. Every import that costs time happens inside a command."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import __version__
from pipeline.acceptance_cli import acceptance
from pipeline.compare_cli import compare
from pipeline.doctor_cli import doctor
from pipeline.export_cli import export
from pipeline.scores_cli import scores
from pipeline.shards_cli import shards
from pipeline.status_cli import WatchCommand, watch
from pipeline.tune_cli import estimate_options, tune

_STAGES = ("tokenize", "pretrain", "evaluate")
_debug = False


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="electra")
def cli() -> None:
    """Pretrain ELECTRA: raw text to tokens, checkpoints and scores.

    CONFIG is a YAML file (presets: configs/). Overrides are section.key=value.
    """


_config = click.argument("config", type=click.Path(path_type=Path))
_overrides = click.argument("overrides", nargs=-1)
_debug_option = click.option("--debug", is_flag=True, help="Show a traceback when something fails.")


@cli.command()
@_config
@_overrides
@click.option("--plan", is_flag=True, help="Only say what would be done, and why.")
@click.option("--until", type=click.Choice(_STAGES), default=_STAGES[-1], help="Last stage to run.")
@click.option("--force", type=click.Choice(_STAGES), help="Move what the run has of this stage and later ones aside.")
@_debug_option
def run(config: Path, overrides: tuple[str, ...], plan: bool, until: str, force: str | None, debug: bool) -> None:
    """Do the stages that are not up to date."""
    _set_debug(debug)
    configs = _load_all(config, overrides)
    from pipeline.chain import plan_stages, stages_of

    stages_of_each = [stages_of(settings, until) for settings in configs]
    if force and not any(force in stages for stages in stages_of_each):
        raise click.UsageError(
            f"--force {force}: that stage is not among those to run ({', '.join(stages_of_each[0])})"
        )
    if plan:
        for settings, stages in zip(configs, stages_of_each, strict=True):
            if len(configs) > 1:
                click.echo(f"{settings.run.name}:")
            for decision in plan_stages(settings, stages, force):
                click.echo(f"{decision.stage:9} {decision.action:7} {decision.why}")
        return
    if len(configs) > 1:
        forced = ["--force", str(force)]  # only of a variant that has the stage
        options = [["--until", until, *(forced if force in stages else [])] for stages in stages_of_each]
        _run_variants("run", configs, config, overrides, options)
        return
    settings, stages = configs[0], stages_of_each[0]
    _run_stages(settings, stages, config, overrides, force)
    if "evaluate" in stages:
        from pipeline.report import print_summary

        print_summary(settings)


_prefetch_option = click.option(
    "--prefetch", is_flag=True, help="Only fetch the tasks' data from the hub into evaluate.data_dir."
)


_force_option = click.option("--force", is_flag=True, help="Move the results that the run has aside.")


def _nothing(command: Any) -> Any:
    return command


def _stage_command(stage: str, help_text: str) -> None:
    @cli.command(stage, help=help_text)
    @_config
    @_overrides
    @click.option("--check", is_flag=True, help="Only check, within seconds, that the stage could start here.")
    @(_prefetch_option if stage == "evaluate" else _nothing)
    @(_force_option if stage == "evaluate" else _nothing)
    @_debug_option
    def command(
        config: Path,
        overrides: tuple[str, ...],
        check: bool,
        debug: bool,
        prefetch: bool = False,
        force: bool = False,
    ) -> None:
        from pipeline.distributed import Process, discover_process, exit_when_told_to_stop, place_in_array

        _set_debug(debug)
        process = discover_process()
        if process:
            exit_when_told_to_stop()
        configs = _load_all(config, overrides)
        if prefetch:
            from pipeline.evaluation import hub
            from pipeline.evaluation.tasks import load_task_configs

            for settings in configs:
                for path in hub.prefetch(load_task_configs(settings), settings.evaluate.data_dir):
                    click.echo(path)
            return
        if check:
            from pipeline.preflight import check_stage

            for settings in configs:
                check_stage(settings, stage)
            return
        if len(configs) > 1:
            _run_variants(stage, configs, config, overrides, [["--force"] * force for _ in configs])
            return
        settings = configs[0]
        if process is None and stage in ("tokenize", "evaluate") and place_in_array()[1] > 1:
            process = Process()  # an array's element that was started without srun
            exit_when_told_to_stop()
        if process is None:
            _run_stages(settings, (stage,), config, overrides, stage if force else None)
            return
        if force:
            raise click.UsageError("--force is for a single process: move the results aside before starting the job")
        _run_as_rank(settings, stage, process)


_stage_command("tokenize", "Text to a tokenizer and shards.")
_stage_command("pretrain", "Shards to checkpoints.")
_stage_command("evaluate", "A checkpoint to scores on downstream tasks.")


@cli.command(cls=WatchCommand)
@_config
@_overrides
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--watch", "seconds", type=click.FloatRange(min=0.1), help="Again every so many seconds (10) to its end.")
@_debug_option
def status(config: Path, overrides: tuple[str, ...], as_json: bool, seconds: float | None, debug: bool) -> None:
    """State of each stage, progress, what is left of it, and MLflow run ids."""
    _set_debug(debug)
    from pipeline.status import describe_status, format_status, is_over

    configs = _load_all(config, overrides)

    def show(found: list[dict[str, Any]]) -> str:
        if as_json:
            return json.dumps(found if _has_variants(config) else found[0], indent=1)
        return "\n\n".join(format_status(each) for each in found)

    def look() -> list[dict[str, Any]]:
        return [describe_status(settings) for settings in configs]

    if seconds is None:
        click.echo(show(look()))
    else:
        watch(look, show, lambda found: all(map(is_over, found)), seconds)


@cli.command("config")
@_config
@_overrides
@click.option("--world-size", type=click.IntRange(min=1), default=1, help="Processes to plan for.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--stages", "only_stages", is_flag=True, help="The stages of `electra run` alone, a line each.")
@estimate_options
@_debug_option
def show_config(
    config: Path,
    overrides: tuple[str, ...],
    world_size: int,
    as_json: bool,
    only_stages: bool,
    debug: bool,
    **of_estimate: Any,
) -> None:
    """The resolved config, the numbers that follow from it, and what it will cost; of several variants a table."""
    _set_debug(debug)
    from pipeline.chain import stages_of
    from pipeline.config_file import dump_yaml
    from pipeline.cost import describe_estimate
    from pipeline.measured import make_estimate
    from pipeline.plan import describe, make_plan

    configs = _load_all(config, overrides)
    if only_stages:
        click.echo("\n".join(max(map(stages_of, configs), key=len)))
        return
    plans = [make_plan(settings, world_size) for settings in configs]
    pairs = list(zip(configs, plans, strict=True))
    estimates = [make_estimate(settings, plan, **of_estimate) for settings, plan in pairs]
    if as_json:
        shown = [
            {"config": settings.model_dump(mode="json"), "plan": plan.to_dict(), "estimate": estimate.to_dict()}
            for (settings, plan), estimate in zip(pairs, estimates, strict=True)
        ]
        click.echo(json.dumps(shown if _has_variants(config) else shown[0], indent=1))
    elif len(configs) > 1:
        from pipeline.variants import describe_variants

        for line in describe_variants(configs, plans):
            click.echo(line)
    else:
        click.echo(dump_yaml(configs[0]))
        for name, value in [*describe(plans[0]), *describe_estimate(estimates[0])]:
            click.echo(f"{name:32} {value}")


@cli.command()
@_config
@_overrides
@_debug_option
def sync(config: Path, overrides: tuple[str, ...], debug: bool) -> None:
    """Ship to MLflow what has not arrived."""
    _set_debug(debug)
    from pipeline.tracking import sync_now

    for settings in _load_all(config, overrides):
        click.echo(sync_now(settings))


cli.add_command(acceptance)
cli.add_command(compare)
cli.add_command(doctor)
cli.add_command(shards)
cli.add_command(export)
cli.add_command(scores)
cli.add_command(tune)


def _load_all(config: Path, overrides: tuple[str, ...]) -> list[Any]:
    """The file's run, or those of its variants."""
    from pipeline.config_file import load_configs

    return load_configs(config, overrides)


def _has_variants(config: Path) -> bool:
    from pipeline.config_file import has_variants

    return has_variants(config)


def _run_variants(
    command: str, configs: list[Any], config: Path, overrides: tuple[str, ...], options: list[list[str]]
) -> None:
    """The command for each variant with its options, one after the other; one that does not end well is the last.

    Each has a process of its own, with the same rank where there is one: a run leaves its marks on its process
    (signal handlers, process groups, files of the log).
    """
    import os
    import time

    from pipeline.distributed import RENDEZVOUS, own_port
    from pipeline.errors import StoppedEarly
    from pipeline.goodput import begin_part
    from pipeline.launch import Children

    begin = time.monotonic()
    names = [settings.run.variant for settings in configs]
    with Children() as children:
        for number, (settings, more) in enumerate(zip(configs, options, strict=True)):
            name, rest = names[number], names[number + 1 :]
            own = [*_time_left(command, settings, time.monotonic() - begin), f"run.variant={name}", *more]
            arguments = [command, str(config), *overrides, *own, *(["--debug"] * _debug)]
            code = children.run(arguments, os.environ | {RENDEZVOUS: name} | own_port(number) | begin_part(name))
            if code:
                raise _unfinished(f"variant {name} ended with exit code {code}", code, rest)
            if rest and children.told_to_stop:
                raise _unfinished(f"told to stop when variant {name} was done", StoppedEarly.exit_code, rest)


def _time_left(command: str, settings: Any, spent_s: float) -> list[str]:
    """The argument with what the variants before have left of ``train.stop_after_seconds``.

    At least a moment: the variant then stops by itself, which ranks agree about. They would not about the clock here.
    """
    allowed = settings.train.stop_after_seconds
    if allowed is None or command not in ("run", "pretrain"):
        return []
    return [f"train.stop_after_seconds={max(allowed - spent_s, 0.001):.3f}"]


def _unfinished(what: str, code: int, rest: list[str]) -> Exception:
    from pipeline.distributed import discover_process
    from pipeline.errors import ElectraError

    process = discover_process()
    speaks = process is None or process.rank == 0
    failure = ElectraError(f"{what}{'; not run: ' if rest else ''}{', '.join(rest)}" if speaks else "")
    failure.exit_code = code
    return failure


def _run_stages(
    settings: Any, stages: tuple[str, ...], config: Path, overrides: tuple[str, ...], force: str | None
) -> None:
    from pipeline.chain import run_stages
    from pipeline.distributed import exit_when_told_to_stop
    from pipeline.log import log_to_file, set_up_logging

    exit_when_told_to_stop()  # until the stage listens itself
    set_up_logging()
    log_to_file(settings.run_folder / "log.txt")
    run_stages(settings, stages, [str(config), *overrides], force)


def _run_as_rank(settings: Any, stage: str, process: Any) -> None:
    import os

    from pipeline.chain import run_as_rank
    from pipeline.log import set_up_logging

    set_up_logging(process.rank)
    run_as_rank(settings, stage, process, launched_here="ELECTRA_LAUNCHED" in os.environ)


def _set_debug(debug: bool) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Entry point: runs a command; every foreseeable failure is one message and its exit code."""
    from pipeline.distributed import exit_process
    from pipeline.log import write_whole

    write_whole()
    try:
        cli(standalone_mode=False)
        exit_process(0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        _end(64, error)
    except Exception as error:
        if _debug:
            traceback.print_exc()
        _end(_report(error), error)


def _end(code: int, error: Exception) -> NoReturn:
    from pipeline.attempts import record_exit
    from pipeline.distributed import exit_process

    record_exit(code, error)
    exit_process(code)


def _report(error: Exception) -> int:
    """Prints one message; returns the exit code. Errors that are nobody's fault but ours keep their traceback."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        if str(error):
            click.echo(f"electra: {error}", err=True)
        return int(code)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        click.echo(f"electra: {where}{reason}; check the path, its permissions and the free space", err=True)
        return 1
    if not _debug:
        traceback.print_exc()
    return 1
