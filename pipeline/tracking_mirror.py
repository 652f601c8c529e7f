"""MLflow as a mirror of the run folder; the folder is the truth.

A pass creates the runs that are missing, ships journal entries beyond the last
one that the store holds, and sets statuses. Doing it twice changes nothing, so
the shipper process, `electra sync` and a pass after a crash are the same code.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from data_shards.store import write_json
from pipeline.config_file import load_config
from pipeline.journal import Entry, read_entries
from pipeline.stages import STAGES, StageRecord, read_record_file, run_identity
from pipeline.tracking import redact, stage_summary

_STATUS = {"running": "RUNNING", "done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_HIGH_WATER_METRIC = "progress/tokens"  # in every entry; a batch arrives whole or not at all
_ENTRIES_PER_BATCH = 20
_MAX_PARAM_CHARACTERS = 6000


class Mirror:
    """Brings MLflow into agreement with one run folder."""

    def __init__(self, run_folder: Path, uri: str, experiment: str):
        """Connects, creating the SQLite file if need be. Raises whatever MLflow raises when it cannot."""
        if uri.startswith("sqlite:///"):
            create_sqlite(Path(uri.removeprefix("sqlite:///")))
        self._folder, self._uri = run_folder, uri
        self._client = MlflowClient(tracking_uri=uri)
        self._config = load_config(run_folder / "config.yaml")
        self._identity = run_identity(self._config)
        self._experiment_id = self._find_experiment(experiment)
        self._runs: dict[str, str] = {}
        self._params: dict[str, dict[str, str]] = {}
        self._shipped_step: dict[str, int] = {}
        self._seen: dict[str, Any] = {}

    def mirror(self, owner_alive: bool) -> int:
        """One pass; returns the number of journal entries that it shipped.

        Args:
            owner_alive: Whether the process that runs the stages lives. A stage that claims
                to be running without it was killed.
        """
        records = {
            stage: record for stage in STAGES if (record := read_record_file(self._folder / stage / "stage.json"))
        }
        if not records:
            return 0
        parent = self._run("pipeline", self._identity, None)
        self._log_params(parent, self._config.flat())
        runs = {stage: self._run(stage, record.lineage, parent) for stage, record in records.items()}
        shipped = self._ship_journal(runs["pretrain"]) if "pretrain" in runs else 0
        for stage, record in records.items():
            self._log_stage(stage, runs[stage], record, owner_alive)
        if "evaluate" in records:
            self._log_tasks(runs["evaluate"], records["evaluate"], owner_alive)
        self._set_status(parent, self._pipeline_status(records, owner_alive))
        for stage, record in records.items():  # last: the store of artifacts may be another one, and fail
            self._log_artifacts(stage, runs[stage], record)
        self._note({"pipeline": parent, **runs}, records)
        return shipped

    def _find_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (Path(self._uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name).as_uri()
        try:
            return self._client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another client was first
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def _run(self, stage: str, lineage: str, parent: str | None, task: str | None = None) -> str:
        """The MLflow run of a stage or of one of its tasks, found by its tags or created with them in one call."""
        key = f"{stage}/{lineage}/{task or ''}"
        if key not in self._runs:
            tags = {
                "electra.run_id": self._identity,
                "electra.stage": f"{stage} {task}" if task else stage,
                "electra.lineage": lineage,
            }
            wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
            found = self._client.search_runs([self._experiment_id], wanted, max_results=1)
            if found:
                self._runs[key] = found[0].info.run_id
            else:
                of_stage = "" if stage == "pipeline" else f" {stage}"
                name = f"{self._config.run.name}{of_stage}{f' {task}' if task else ''}"
                more = {"mlflow.parentRunId": parent} if parent else {}
                run = self._client.create_run(self._experiment_id, tags=tags | more, run_name=name)
                self._runs[key] = run.info.run_id
        return self._runs[key]

    def _log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Parameters are written once; one that changes later becomes a tag."""
        wanted = {key: json.dumps(v) if isinstance(v, list | dict) else str(v) for key, v in params.items()}
        wanted = {key: value[:_MAX_PARAM_CHARACTERS] for key, value in wanted.items()}
        if self._params.get(run_id) == wanted:
            return
        held = self._client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in wanted.items() if key not in held]
        drifted = [
            RunTag(f"electra.drift.{key}", value) for key, value in wanted.items() if held.get(key, value) != value
        ]
        for first in range(0, max(len(new), len(drifted)), 100):
            self._client.log_batch(run_id, params=new[first : first + 100], tags=drifted[first : first + 100])
        self._params[run_id] = wanted

    def _ship_journal(self, run_id: str) -> int:
        if run_id not in self._shipped_step:
            history = self._client.get_metric_history(run_id, _HIGH_WATER_METRIC)
            self._shipped_step[run_id] = max((metric.step for metric in history), default=0)
        path = self._folder / "pretrain" / "journal.jsonl"
        entries = [entry for entry in read_entries(path) if entry["step"] > self._shipped_step[run_id]]
        for first in range(0, len(entries), _ENTRIES_PER_BATCH):
            batch = entries[first : first + _ENTRIES_PER_BATCH]
            metrics = [
                Metric(name, value, int(entry["time/unix_s"] * 1000), entry["step"])
                for entry in batch
                for name, value in _metrics_of(entry).items()
            ]
            self._client.log_batch(run_id, metrics=metrics)
            self._shipped_step[run_id] = batch[-1]["step"]
        return len(entries)

    def _log_stage(self, stage: str, run_id: str, record: StageRecord, owner_alive: bool) -> None:
        """Parameters, results, tags and status of a stage, when something changed."""
        status = self._stage_status(record, owner_alive)
        seen = (status, record.attempts, record.ended_unix_s)
        if self._seen.get(run_id) == seen:
            return
        self._log_params(run_id, record.inputs.get("science", {}) | record.numerics)
        held = self._client.get_run(run_id).data.metrics
        ended_ms = int((record.ended_unix_s or time.time()) * 1000)
        # Held-out scores may be there from earlier steps; a result that is there already is equal.
        results = [Metric(k, v, ended_ms, record.metrics_step) for k, v in record.metrics.items() if held.get(k) != v]
        tags = {"electra.attempts": str(record.attempts), "electra.host": str(record.environment.get("host"))}
        if record.environment.get("git"):
            tags["mlflow.source.git.commit"] = record.environment["git"]
        tags |= {f"electra.{key.lower()}": value for key, value in record.environment.get("slurm", {}).items()}
        tags |= {f"electra.{key}": str(value) for key, value in record.output.items() if key.endswith("sha256")}
        self._client.log_batch(run_id, metrics=results, tags=[RunTag(*tag) for tag in tags.items()])
        self._set_status(run_id, status, record.ended_unix_s)
        self._seen[run_id] = seen

    def _log_tasks(self, stage_run: str, record: StageRecord, owner_alive: bool) -> None:
        """One run for each task, below the stage's: its recipe as parameters, its seeds as the steps of its metrics."""
        path = self._folder / "evaluate" / "results_so_far.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        status = self._stage_status(record, owner_alive)
        seen = (status, results["units"])
        if results["fingerprint"] != record.fingerprint or self._seen.get(f"tasks {stage_run}") == seen:
            return  # of other inputs; or shipped already
        for task, of_task in results["tasks"].items():
            if task in results["grid"] and task not in results["complete"]:
                continue  # another point may turn out to be the best
            run_id = self._run("evaluate", record.lineage, stage_run, task)
            self._log_params(run_id, results["recipes"][task])
            now_ms = int(time.time() * 1000)
            for metric, summary in of_task.items():
                name = f"eval/{task}_{metric}"
                held = {entry.step for entry in self._client.get_metric_history(run_id, name)}
                values = zip(results["seeds"][task], summary["values"], strict=True)
                new = [Metric(name, value, now_ms, seed) for seed, value in values if seed not in held]
                self._client.log_batch(run_id, metrics=new)
            self._set_status(run_id, status, record.ended_unix_s)
        self._seen[f"tasks {stage_run}"] = seen

    def _log_artifacts(self, stage: str, run_id: str, record: StageRecord) -> None:
        seen = stage_summary(record)
        if self._seen.get(f"artifacts {run_id}") == seen:
            return
        with tempfile.TemporaryDirectory() as folder:
            environment = Path(folder) / "environment.json"
            write_json(environment, record.environment)
            names = ("results.json", "results.md", "scores_and_flops.png")
            files = [self._folder / "config.yaml", environment, *(self._folder / stage / name for name in names)]
            for file in files:
                is_of_stage = file.parent == self._folder / stage
                if file.exists() and (record.state == "done" or not is_of_stage):  # else they are an earlier one's
                    self._client.log_artifact(run_id, str(file))
        self._seen[f"artifacts {run_id}"] = seen

    def _stage_status(self, record: StageRecord, owner_alive: bool) -> str:
        return "KILLED" if record.state == "running" and not owner_alive else _STATUS[record.state]

    def _pipeline_status(self, records: dict[str, StageRecord], owner_alive: bool) -> str:
        statuses = {self._stage_status(record, owner_alive) for record in records.values()}
        for status in ("FAILED", "KILLED", "RUNNING"):
            if status in statuses:
                return status
        return "RUNNING" if owner_alive else "FINISHED"

    def _set_status(self, run_id: str, status: str, ended_unix_s: float | None = None) -> None:
        if self._seen.get(f"status {run_id}") == status:
            return
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status, int((ended_unix_s or time.time()) * 1000))
        self._seen[f"status {run_id}"] = status

    def _note(self, runs: dict[str, str], records: dict[str, StageRecord]) -> None:
        """Leaves the run ids for `electra status`, and how far the mirror got."""
        mirrored: dict[str, Any] = {stage: stage_summary(record) for stage, record in records.items()}
        mirrored["step"] = self._shipped_step.get(runs.get("pretrain", ""), 0)
        noted = {"uri": redact(self._uri), "runs": runs, "mirrored": mirrored}
        if self._seen.get("noted") != noted:
            write_json(self._folder / "mlflow.json", noted)
            self._seen["noted"] = noted


def _metrics_of(entry: Entry) -> dict[str, float]:
    """An entry's metrics by MLflow's names."""
    named = {
        "progress/tokens": entry["tokens"],
        "progress/flops": entry["flops"],
        "progress/flops_paper": entry.get("flops_paper"),  # absent from journals of earlier versions
        "progress/wall_s": entry["wall_s"],
    }
    named |= {name: value for name, value in entry.items() if "/" in name and not name.startswith("time/")}
    return {name: float(value) for name, value in named.items() if value is not None}


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
        if not Path(f"/proc/{leftover.name.removeprefix(prefix).split('.')[0]}").exists():
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments()
    with suppress(FileExistsError):  # another client was first; its file is as good
        os.link(temporary, path)
    temporary.unlink()
