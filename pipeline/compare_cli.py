"""`electra compare`: runs side by side, from their folders or from MLflow."""

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN…")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for page, plots and numbers.")
@click.option("--tracking-uri", help="MLflow that RUNs are looked up in; default MLFLOW_TRACKING_URI.")
@click.option("--experiment", default="electra", show_default=True, help="MLflow experiment that names belong to.")
@click.option("--json", "as_json", is_flag=True, help="All numbers as JSON, in place of the tables.")
def compare(runs: tuple[str, ...], out: Path | None, tracking_uri: str | None, experiment: str, as_json: bool) -> None:
    """Show what differs between runs, and what came of it.

    A RUN is a run's folder (<run.dir>/runs/<run.name>), or the name or id of a pipeline run in MLflow. With --out the
    same as one HTML page with curves (compare.html), PNG plots and compare.json.
    """
    import json

    from pipeline.comparison.find import find_runs
    from pipeline.comparison.report import make_report, to_json
    from pipeline.comparison.text import format_report

    report = make_report(find_runs(runs, tracking_uri, experiment))
    click.echo(json.dumps(to_json(report), indent=1) if as_json else format_report(report))
    if out:
        from pipeline.comparison.files import write_files

        for path in write_files(report, out):
            click.echo(str(path), err=as_json)
