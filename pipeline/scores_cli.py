"""`electra scores`: the results of several runs, or of several checkpoints of one, side by side."""

from pathlib import Path
from typing import Any

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

    found = [results for run in runs for results in _results_of(run)]
    click.echo(comparison_table(found))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        drawn = plot_run(found, out)
        click.echo(f"plot: {drawn}" if drawn else "no plot: none of these has FLOPs, as runs of this program have")


def _results_of(run: Path) -> list[dict[str, Any]]:
    from pipeline.errors import ConfigError
    from pipeline.evaluation.stored import read_results

    read = map(read_results, sorted(run.glob("evaluate/*/results.json")))
    found = [results for results in read if results]
    if not found:
        raise ConfigError(f"{run}: no results in it (evaluate/*/results.json); give a run's folder, evaluated")
    return found
