"""The command ``electra acceptance``. Every import that costs time happens inside it."""

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--quick", is_flag=True, help="Only what takes less than a minute.")
@click.option("--part", metavar="PART", help="One part alone: quick, bandwidth, mfu, data, unbroken, killed, …")
@click.option("--check", is_flag=True, help="Only check, within seconds, that it could start here.")
def acceptance(config: Path, overrides: tuple[str, ...], quick: bool, part: str, check: bool) -> None:
    """Can this cluster be trusted with CONFIG? Started by srun, torchrun or alone; needs no corpus.

    One line for each check; exit code 1 if one has failed. What is found is kept in <run.dir>/acceptance.
    """
    from pipeline.acceptance import PARTS, conduct, run_part
    from pipeline.config_file import load_configs
    from pipeline.distributed import Process, discover_process, resolve_device
    from pipeline.errors import UsageError
    from pipeline.log import set_up_logging
    from pipeline.plan import make_plan

    if part and part not in PARTS:
        raise UsageError(f"--part {part}: there are {', '.join(PARTS)}")
    process = discover_process() or Process()
    settings = load_configs(config, overrides)[0]  # variants differ in nothing that a cluster could fail at
    make_plan(settings, process.world_size)
    set_up_logging(process.rank)
    if check:
        resolve_device(settings.launch.device)
    elif quick or part:
        run_part(settings, process, part or "quick", keeps=bool(part))
    else:
        conduct(settings, process, [str(config), *overrides])
