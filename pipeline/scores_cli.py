"""`electra scores`: the results of several runs, or of several checkpoints of one, side by side."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for scores_and_flops.png.")
def scores(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show what RUNS (their folders) scored at each checkpoint that was evaluated.

    With --out also plotted against pretraining FLOPs, beside the paper's points.
    """
    from pipeline.evaluation.plot import plot_run
    from pipeline.evaluation.table import comparison_table

    files = [path for run in runs for path in _results_of(run)]
    click.echo(comparison_table([json.loads(path.read_text(encoding="utf-8")) for path in files]))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        drawn = plot_run(files, out)
        click.echo(f"plot: {drawn}" if drawn else "no plot: none of these has FLOPs, as runs of this program have")


def _results_of(run: Path) -> list[Path]:
    from pipeline.errors import ConfigError

    found = sorted(run.glob("evaluate/*/results.json"))
    if not found:
        raise ConfigError(f"{run}: no results in it (evaluate/*/results.json); give a run's folder, evaluated")
    return found
