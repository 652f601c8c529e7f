"""The command ``electra doctor``. Every import that costs time happens inside it."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--debug", is_flag=True, help="Show a traceback when a check fails for a reason that nobody foresaw.")
def doctor(config: Path | None, overrides: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """What this machine can do, and what is wrong with it; with CONFIG also whether its run could be made here.

    Under srun or torchrun each node is examined, and rank 0 makes one report. Exit code 78 if anything failed.
    """
    from pipeline.errors import ConfigError

    try:
        from pipeline.config_file import load_configs
        from pipeline.doctor.examine import Report, examine
        from pipeline.log import set_up_logging
    except ImportError as error:
        raise ConfigError(f"doctor cannot begin: {error}; pip install -c constraints.txt -e .") from error

    settings = load_configs(config, overrides)[0] if config else None
    set_up_logging(1)  # what is wrong is in the report

    def show(report: Report) -> None:
        click.echo(json.dumps(report.to_dict(), indent=1) if as_json else "\n".join(report.lines()))

    report, code = examine(settings, show, debug)
    if code:
        failed = ", ".join(dict.fromkeys(report.of_state("failure"))) if report else ""
        raise ConfigError(f"doctor: {failed}" if failed else "")
