"""From what the user names to runs."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.comparison.folder import read_folder
from pipeline.comparison.run import Run, distinct_names
from pipeline.errors import ConfigError, UsageError


def find_runs(wanted: Sequence[str], tracking_uri: str | None, experiment: str) -> list[Run]:
    """Reads each run from its folder, or else from MLflow, where it goes by name or id.

    Args:
        wanted: Two or more.
        tracking_uri: MLflow; None: what MLFLOW_TRACKING_URI says.
        experiment: Where names are looked up.

    Raises:
        UsageError: Fewer than two.
        ConfigError: There is no such run, or one is named twice.
    """
    if len(wanted) < 2:
        raise UsageError(f"{len(wanted)} run given, and a comparison needs two or more; name another folder or run")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    runs: list[Run] = []
    for name in wanted:
        run = _find(name, uri, experiment)
        if same := next((other for other in runs if run.is_same_as(other)), None):
            places = " and ".join(dict.fromkeys((same.source, run.source)))
            raise ConfigError(f"{name}: the same run is named twice ({places}); leave one out")
        runs.append(run)
    for run, name in zip(runs, distinct_names([run.name for run in runs]), strict=True):
        run.name = name
        for results in filter(None, [run.results, *run.all_results]):
            results["run"] = name
    return runs


def _find(name: str, uri: str | None, experiment: str) -> Run:
    folder = Path(name)
    if (folder / "config.yaml").is_file() or (folder.is_dir() and (uri is None or os.sep in name)):
        return read_folder(folder)
    if os.sep in name:
        raise ConfigError(f"{name}: no such folder; give the folder of a run, <run.dir>/runs/<run.name>")
    if uri is None:
        raise ConfigError(
            f"{name}: no such folder, and no MLflow to look it up in; correct the path, or give --tracking-uri "
            "(or set MLFLOW_TRACKING_URI)"
        )
    from pipeline.tracking_read import read_tracked

    return read_tracked(name, uri, experiment)
