"""MLflow's runs of one run folder: found by their tags or created, and written to in as few calls as possible.

What a run holds is read once and then known, so that a pass over a folder in which
nothing has changed makes no call, and a server that takes seconds to answer is asked little.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from data_shards.temporaries import is_running
from pipeline.errors import ElectraError
from pipeline.redaction import redact

DRIFT = "electra.drift."
"""Tags with the new value of a parameter that has changed; parameters never do."""

PARENT = "mlflow.parentRunId"

_MAX_PARAM_CHARACTERS, _MAX_TAG_CHARACTERS = 6000, 8000
_RUNS_PER_PAGE = 1000


@dataclass
class TrackedRun:
    """What MLflow holds of one of its runs.

    Attributes:
        fresh: Whether this process created it, so that its history holds nothing else.
        started_ms: When it began, in Unix milliseconds; MLflow takes that once.
        ended_ms: When it ended last, if it has.
        metrics: The value at the highest step, by name.
    """

    run_id: str
    status: str
    fresh: bool
    started_ms: int
    ended_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Store:
    """The tracking server or database, seen from one run folder."""

    def __init__(self, uri: str, experiment: str, identity: str):
        """Connects, creating the SQLite file and the experiment if need be.

        Raises:
            ElectraError: The experiment is deleted.
            Exception: Whatever MLflow raises.
        """
        self.is_sqlite = uri.startswith("sqlite:///")
        path = Path(uri.removeprefix("sqlite:///"))
        if self.is_sqlite:
            create_sqlite(path)
        self.client = MlflowClient(tracking_uri=uri)
        artifacts = (path.parent / "mlartifacts" / experiment).as_uri() if self.is_sqlite else None
        self.experiment = _find_experiment(self.client, experiment, artifacts, uri)
        self._identity = identity
        self._runs = self._find_runs()

    def _find_runs(self) -> dict[tuple[str, str], TrackedRun]:
        """The folder's runs by stage and lineage.

        A call that timed out may have created a run all the same, with the same start: of several alike the one that
        was written to is it, else the first by id, and the others, which nobody has written to, are deleted.
        """
        found: list[MlflowRun] = []
        ids, wanted, token = [self.experiment.experiment_id], f"tags.`electra.run_id` = '{self._identity}'", None
        while True:
            page = self.client.search_runs(ids, wanted, max_results=_RUNS_PER_PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        runs: dict[tuple[str, str], TrackedRun] = {}
        for run in sorted(found, key=lambda run: (_is_empty(run), run.info.start_time, run.info.run_id)):
            data, info = run.data, run.info
            key = data.tags.get("electra.stage", ""), data.tags.get("electra.lineage", "")
            if key not in runs:
                runs[key] = TrackedRun(
                    info.run_id, info.status, False, info.start_time, info.end_time,
                    dict(data.params), dict(data.tags), dict(data.metrics),
                )  # fmt: skip
            elif _is_empty(run):
                self.client.delete_run(info.run_id)
        return runs

    def run(
        self, stage: str, lineage: str, name: str, tags: dict[str, str], started_unix_s: float | None = None
    ) -> TrackedRun:
        """The run of a stage, created with ``tags`` in one call where there is none; it starts now if nobody says."""
        if (stage, lineage) not in self._runs:
            own = {"electra.run_id": self._identity, "electra.stage": stage, "electra.lineage": lineage} | tags
            started_ms = int((started_unix_s or time.time()) * 1000)
            info = self.client.create_run(self.experiment.experiment_id, started_ms, tags=own, run_name=name).info
            self._runs[stage, lineage] = TrackedRun(info.run_id, info.status, True, info.start_time, tags=own)
        return self._runs[stage, lineage]

    def adopt(self, pipeline: TrackedRun) -> None:
        """Puts runs whose parent has been deleted below the one that took its place, those of past lineages too."""
        ids = {run.run_id for run in self._runs.values()}
        for (stage, lineage), run in self._runs.items():
            above = self._runs.get((stage.split()[0], lineage), pipeline) if " " in stage else pipeline
            if run is not pipeline and run.tags.get(PARENT) not in ids:
                self.put(run, tags={PARENT: above.run_id})

    def put(
        self, run: TrackedRun, params: dict[str, Any] | None = None, tags: dict[str, str] | None = None,
        metrics: Iterable[Metric] = (),
    ) -> None:  # fmt: skip
        """Writes what the run does not hold yet. A parameter that differs stays; its new value becomes a tag."""
        wanted = {key: _text(value)[:_MAX_PARAM_CHARACTERS] for key, value in (params or {}).items()}
        new = {key: value for key, value in wanted.items() if key not in run.params}
        changed = {key: value[:_MAX_TAG_CHARACTERS] for key, value in (tags or {}).items()}
        for key, value in wanted.items():
            if run.params.get(key, value) != value or DRIFT + key in run.tags:  # the latter: it may have gone back
                changed[DRIFT + key] = value
        changed = {key: value for key, value in changed.items() if run.tags.get(key) != value}
        points = list(metrics)
        self.client.log_batch(
            run.run_id,
            metrics=points,
            params=[Param(*param) for param in new.items()],
            tags=[RunTag(*tag) for tag in changed.items()],
        )
        run.params |= new
        run.tags |= changed
        run.metrics |= {point.key: point.value for point in points}

    def set_status(self, run: TrackedRun, status: str, ended_unix_s: float | None = None) -> None:
        """Sets a run's status and end where they are others; an end that nobody has recorded is now.

        No run ends before it starts: an earlier version had it start when it was shipped, and clocks of nodes differ.
        """
        if status == "RUNNING":
            if run.status != status:
                self.client.update_run(run.run_id, status=status)
        else:
            ended_ms = max(int((ended_unix_s or time.time()) * 1000), run.started_ms)
            if run.status == status and (ended_unix_s is None or ended_ms == run.ended_ms):
                return
            self.client.set_terminated(run.run_id, status, ended_ms)
            run.ended_ms = ended_ms
        run.status = status

    def steps_of(self, run: TrackedRun, metric: str) -> set[int]:
        """Steps at which the run holds a metric."""
        if run.fresh or metric not in run.metrics:
            return set()
        return {point.step for point in self.client.get_metric_history(run.run_id, metric)}


def _is_empty(run: MlflowRun) -> bool:
    return not run.data.metrics and not run.data.params


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _find_experiment(client: MlflowClient, name: str, artifacts: str | None, uri: str) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        problem: MlflowException | None = None
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:  # another client was first
            problem = error
        found = client.get_experiment_by_name(name)
        if found is None:
            raise problem or MlflowException(f"experiment {name} was created and is not there")
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise ElectraError(
            f"experiment {name} is deleted on {redact(uri)}; restore it (`mlflow experiments restore -x "
            f"{found.experiment_id}`, with MLFLOW_TRACKING_URI set), or set another tracking.experiment"
        )
    return found


def create_sqlite(path: Path) -> None:
    """Creates MLflow's SQLite file aside and links it into place whole.

    MLflow migrates a new file through dozens of revisions; a kill in the middle
    would leave one that fails for ever, and two clients at once break each other.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{os.uname().nodename}."
    for leftover in path.parent.glob(f"{prefix}*.tmp*"):  # of creators on this host that were killed
        pid = leftover.name.removeprefix(prefix).partition(".")[0]
        if pid.isdigit() and not is_running(int(pid)):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments()
    with suppress(FileExistsError):  # another client was first; its file is as good
        os.link(temporary, path)
    temporary.unlink()
