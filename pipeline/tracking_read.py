"""A run from MLflow, for `electra compare`; nothing of its folder is needed, and nothing is written."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run as TrackedRun
from mlflow.exceptions import MlflowException

from pipeline.comparison.curves import AXES, Curves
from pipeline.comparison.run import Run, settings_of
from pipeline.config import flatten
from pipeline.errors import ConfigError, ElectraError
from pipeline.evaluation.stored import Results, read_results
from pipeline.redaction import redact
from pipeline.tracking import absolute_uri, first_line, shipper_environment
from pipeline.tracking_store import DRIFT

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}  # histories can be long
_CONNECTIONS = 8
_AXES = {f"progress/{axis}": axis for axis in AXES if axis != "step"}
_STATUS = {"FINISHED": "done", "KILLED": "stopped", "FAILED": "failed", "RUNNING": "running"}
_MOST_NAMES = 8


def read_tracked(wanted: str, uri: str, experiment: str) -> Run:
    """Reads a pipeline run and its stages.

    Args:
        wanted: Its name, or its id or that of a run below it.
        uri: Of MLflow.
        experiment: Where a name is looked up.

    Raises:
        ConfigError: There is no such run, or more than one of that name.
        ElectraError: MLflow cannot be reached.
    """
    uri = absolute_uri(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(f"{uri}: no such file; correct --tracking-uri or MLFLOW_TRACKING_URI")
    os.environ.update(shipper_environment(uri) | _PATIENCE)
    try:
        client = MlflowClient(tracking_uri=os.environ["ELECTRA_TRACKING_URI"])
        pipeline = _find(client, wanted, uri, experiment)
        return _read(client, pipeline, uri)
    except ElectraError:
        raise
    except Exception as error:  # MLflow raises what its store, requests or urllib3 do
        raise ElectraError(
            f"MLflow at {redact(uri)} cannot be read: {first_line(error, uri)}; check the address and the server"
        ) from error


def _find(client: MlflowClient, wanted: str, uri: str, experiment: str) -> TrackedRun:
    found = _by_id(client, wanted) or _by_name(client, wanted, redact(uri), experiment)
    while found.data.tags.get("electra.stage") != "pipeline":
        parent = found.data.tags.get("mlflow.parentRunId")
        if parent is None:
            raise ConfigError(f"{wanted}: a run in MLflow that this program did not make; name a pipeline run")
        found = client.get_run(parent)
    return found


def _by_id(client: MlflowClient, wanted: str) -> TrackedRun | None:
    if not re.fullmatch(r"[0-9a-f]{32}", wanted):
        return None
    try:
        return client.get_run(wanted)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _by_name(client: MlflowClient, wanted: str, uri: str, experiment: str) -> TrackedRun:
    holder = client.get_experiment_by_name(experiment)
    if holder is None:
        raise ConfigError(f"--experiment {experiment}: there is none of that name in {uri}; correct the name")
    names: dict[str, list[TrackedRun]] = {}
    for run in _search(client, holder.experiment_id, "tags.`electra.stage` = 'pipeline'"):
        names.setdefault(run.info.run_name or "", []).append(run)
    found = names.get(wanted, [])
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise ConfigError(f"{wanted}: {len(found)} runs of experiment {experiment} have this name; give an id: {ids}")
    if not found:
        more = ", …" if len(names) > _MOST_NAMES else ""
        known = ", ".join(list(names)[:_MOST_NAMES]) + more
        raise ConfigError(
            f"{wanted}: no such folder, and no pipeline run of that name in experiment {experiment} of {uri}, which "
            f"has: {known or 'none'}; correct the name, or --experiment"
        )
    return found[0]


def _search(client: MlflowClient, experiment_id: str, wanted: str) -> Iterator[TrackedRun]:
    """All runs that a filter finds, newest first."""
    token = None
    while True:
        page = client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _read(client: MlflowClient, pipeline: TrackedRun, uri: str) -> Run:
    run_id = pipeline.info.run_id
    below = _search(client, pipeline.info.experiment_id, f"tags.`mlflow.parentRunId` = '{run_id}'")
    stages: dict[str, TrackedRun] = {}
    for run in below:  # newest first: a stage that was forced has several
        stages.setdefault(run.data.tags.get("electra.stage", ""), run)
    settings = settings_of(_last_params(pipeline))
    tokenizer = stages["tokenize"].data.tags.get("electra.tokenizer_sha256") if "tokenize" in stages else None
    results, notes = _results(client, stages.get("evaluate"), uri)
    pretrain = stages.get("pretrain")
    return Run(
        name=pipeline.info.run_name or run_id,
        source=f"{redact(uri)} run {run_id}",
        settings=settings | ({"tokenizer.sha256": tokenizer} if tokenizer else {}),
        numerics=_numerics(_last_params(pretrain)) if pretrain else {},
        curves=_curves(client, pretrain),
        facts=_facts(stages),
        results=results,
        all_results=[results] if results else [],
        task_digests=_task_digests(stages.get("evaluate")),
        notes=notes,
        identity=pipeline.data.tags.get("electra.run_id", ""),
        is_tracked=True,
    )


def _last_params(run: TrackedRun) -> dict[str, str]:
    """MLflow keeps a parameter's first value; what it has become since is a tag."""
    drifted = {key.removeprefix(DRIFT): value for key, value in run.data.tags.items() if key.startswith(DRIFT)}
    return run.data.params | drifted


def _numerics(params: dict[str, str]) -> dict[str, str]:
    """The pretrain run's parameters that are no keys of the configuration; the chosen kernels one by one."""
    own = {key: value for key, value in params.items() if "." not in key and key != "recipe"}
    try:
        kernels = json.loads(own.pop("kernels", "{}"))
    except ValueError:
        kernels = {}
    return own | flatten({"kernels": kernels})


def _facts(stages: dict[str, TrackedRun]) -> dict[str, Any]:
    latest = next((stage for stage in ("evaluate", "pretrain", "tokenize") if stage in stages), None)
    tags = stages["pretrain"].data.tags if "pretrain" in stages else {}
    attempts, commit = tags.get("electra.attempts"), tags.get("mlflow.source.git.commit")
    return {
        "status": f"{latest} {_STATUS.get(stages[latest].info.status, '')}" if latest else "not started",
        "attempts": int(attempts) if attempts else None,
        "git": f"{commit}-dirty" if commit and tags.get("mlflow.source.git.dirty") == "true" else commit,
        "goodput_pct": None,
    }


def _curves(client: MlflowClient, pretrain: TrackedRun | None) -> Curves:
    """The metrics' histories as columns, one line for each step that tokens were logged at."""
    if pretrain is None:
        return Curves({axis: np.empty(0) for axis in AXES}, {})
    run_id = pretrain.info.run_id
    names = sorted(name for name in pretrain.data.metrics if not name.startswith("system/"))  # those have other steps
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        histories = dict(zip(names, pool.map(lambda name: _history(client, run_id, name), names), strict=True))
    steps = np.unique(histories.get("progress/tokens", (np.empty(0), np.empty(0)))[0])
    columns = {name: _at_steps(steps, *history) for name, history in histories.items()}
    axes = {axis: columns.pop(name, np.full(len(steps), np.nan)) for name, axis in _AXES.items()}
    return Curves({"step": steps, **axes}, columns)


def _history(client: MlflowClient, run_id: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, in the order of their times."""
    history = sorted(client.get_metric_history(run_id, name), key=lambda entry: entry.timestamp)
    return np.array([entry.step for entry in history], float), np.array([entry.value for entry in history], float)


def _at_steps(steps: np.ndarray, logged_at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values at these steps, NaN where there is none; of several at one step the latest."""
    column = np.full(len(steps), np.nan)
    known = np.isin(logged_at, steps)
    column[np.searchsorted(steps, logged_at[known])] = values[known]
    return column


def _task_digests(evaluate: TrackedRun | None) -> dict[str, str]:
    """Their first characters, from the stage's datasets."""
    datasets = [each.dataset for each in evaluate.inputs.dataset_inputs] if evaluate and evaluate.inputs else []
    return {dataset.name: dataset.digest for dataset in datasets}


def _results(client: MlflowClient, evaluate: TrackedRun | None, uri: str) -> tuple[Results | None, list[str]]:
    """results.json of the stage, which is there once it is done; a note if the store of artifacts does not give it."""
    if evaluate is None or evaluate.info.status != "FINISHED":
        return None, []
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(evaluate.info.run_id, "results.json", folder)
        except Exception as error:
            why = first_line(error, uri)
            return None, [f"its results.json cannot be had from MLflow's store of artifacts, so no scores: {why}"]
        return read_results(Path(path)), []
