"""The command ``electra tune``, and what ``electra config`` says of a run's cost; imports happen inside."""

import math
from pathlib import Path
from typing import Any

import click


def estimate_options(command: Any) -> Any:
    """Options that choose what an estimate rests on."""
    options = [
        click.option(
            "--hardware", help="h200, h100, or measured; default: measured if there is a measurement, else h200."
        ),
        click.option(
            "--measured", type=click.Path(path_type=Path), help="File that `electra tune` wrote; default: the run's."
        ),
        click.option(
            "--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="Processes of a node."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--seconds", type=click.FloatRange(min=0), default=60, show_default=True, help="Time for measuring.")
@click.option("--world-size", type=click.IntRange(min=1), help="Processes the run will have; default: those here.")
def tune(config: Path, overrides: tuple[str, ...], seconds: float, world_size: int | None) -> None:
    """Measure micro-batch sizes and kernels here; the last line is the fastest, as overrides.

    What was measured is kept for `electra config`. Started by torchrun or srun, all processes measure at once,
    and the link between them is measured too.
    """
    from pipeline.config_file import load_config
    from pipeline.distributed import discover_process, resolve_device
    from pipeline.errors import UsageError
    from pipeline.log import set_up_logging
    from pipeline.measured import measurement_file, read_measurements, write_measurement
    from pipeline.slurm_step import set_meeting_place
    from pipeline.tune import device_name, tune

    if not math.isfinite(seconds):
        raise UsageError(f"--seconds {seconds}: must be a finite number; 60 is the default")
    settings, process = load_config(config, overrides), discover_process()
    if process:
        set_meeting_place(process)
    set_up_logging(process.rank if process else 0)
    there = measurement_file(settings, device_name(resolve_device(settings.launch.device)))
    if there.exists():
        read_measurements(there)  # if it is damaged, say so now and not after a minute
    tuned = tune(settings, process, world_size, seconds)
    if tuned.measurement is None:
        return
    for line in tuned.table:
        click.echo(line, err=True)
    click.echo(f"measured: {write_measurement(settings, tuned.measurement)}", err=True)
    click.echo(tuned.overrides)
