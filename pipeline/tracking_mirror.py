"""MLflow as a mirror of the run folder; the folder is the truth.

A pass creates the runs that are missing, ships journal entries beyond the last
one that the store holds, and sets statuses. Doing it twice changes nothing, so
the shipper process, `electra sync` and a pass after a crash are the same code.
"""

import getpass
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from data_shards.store import write_json
from pipeline.errors import FORESEEN, DamagedError
from pipeline.evaluation.stored import read_results
from pipeline.journal import Entry, stream_entries
from pipeline.redaction import redact
from pipeline.stages import STAGES, StageRecord, load_run, read_record_file, run_identity
from pipeline.tracking import stage_summary
from pipeline.tracking_lineage import (
    corpora_inputs,
    forked_from,
    register_model,
    scored_checkpoint,
    stage_tags,
    task_inputs,
)
from pipeline.tracking_lines import Tail
from pipeline.tracking_notes import NOTE, describe_run, note_tag
from pipeline.tracking_rollbacks import Rollbacks
from pipeline.tracking_store import PARENT, Store, TrackedRun
from pipeline.tracking_system import FIRST_METRIC, SAMPLES, points_of

_STATUS = {"running": "RUNNING", "done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_HIGH_WATER_METRIC = "progress/tokens"  # in every entry, and rising; a batch arrives whole or not at all
_FILES = ("results.json", "results.md", "scores_and_flops.png")

Records = dict[str, StageRecord]


class Mirror:
    """Brings MLflow into agreement with one run folder."""

    def __init__(self, run_folder: Path, uri: str, experiment: str, say: Callable[[str], None] = print):
        """Connects, creating the SQLite file if need be. Raises whatever MLflow raises when it cannot."""
        self._folder, self._uri, self._say = run_folder, uri, say
        self._config = load_run(run_folder)
        self._identity = run_identity(self._config)
        self.store = Store(uri, experiment, self._identity)
        self._journal = Tail(run_folder / "pretrain" / "journal.jsonl")
        self._samples = {stage: Tail(run_folder / stage / SAMPLES) for stage in STAGES}
        self._entry: Entry | None = None  # last one that MLflow holds
        self._rollbacks = Rollbacks(run_folder / "pretrain", _HIGH_WATER_METRIC)
        self._sampled: dict[str, int] = {}
        self._seeds: dict[tuple[str, str], set[int]] = {}
        self._seen: dict[str, Any] = {}
        self._mirrored: dict[str, Any] = {}
        self._ids: dict[str, str] = {}

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
        try:
            return self._pass(records, owner_alive)
        finally:
            self._leave_word()

    def _pass(self, records: Records, owner_alive: bool) -> int:
        starts_s = [record.started_unix_s for record in records.values() if record.started_unix_s]
        parent = self.run("pipeline", self._identity, started_unix_s=min(starts_s, default=None))
        runs = {
            stage: self.run(stage, record.lineage, parent, started_unix_s=record.started_unix_s)
            for stage, record in records.items()
        }
        self.store.adopt(parent)
        self._ids = {stage: run.run_id for stage, run in {"pipeline": parent, **runs}.items()}
        shipped = self._ship_journal(runs["pretrain"]) if "pretrain" in runs else 0
        trains = "pretrain" in records and records["pretrain"].state == "running"
        note = describe_run(self._config, records, None if trains else self._entry)
        self.store.put(parent, self._config.flat(), note_tag(parent.tags.get(NOTE), note))
        for stage, record in records.items():
            self._log_stage(stage, runs, record, note, owner_alive)
        if "evaluate" in records:
            self._log_tasks(runs["evaluate"], records["evaluate"], owner_alive)
        ends_s = [record.ended_unix_s for record in records.values() if record.ended_unix_s]
        ended_s = max(ends_s) if len(ends_s) == len(records) else None  # of one that was killed nobody knows
        self.store.set_status(parent, self._pipeline_status(records, owner_alive), ended_s)
        for stage, record in records.items():
            self._ship_samples(stage, runs[stage], record)
        for stage, record in records.items():  # last: the store of artifacts may be another one, and fail
            self._log_inputs(stage, runs[stage], records)
            self._log_artifacts(stage, runs[stage], record)
        self._register(runs, records)
        self._mirrored |= {stage: stage_summary(record) for stage, record in records.items()}
        return shipped

    def run(
        self, stage: str, lineage: str, parent: TrackedRun | None = None, task: str | None = None,
        started_unix_s: float | None = None,
    ) -> TrackedRun:  # fmt: skip
        """The MLflow run of a stage or of one of its tasks; it begins with the first attempt."""
        of_stage = "" if stage == "pipeline" else f" {stage}"
        name = f"{self._config.run.name}{of_stage}{f' {task}' if task else ''}"
        tags = {"mlflow.source.name": f"electra{of_stage}", "mlflow.source.type": "LOCAL"}
        with suppress(KeyError, OSError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        tags |= {PARENT: parent.run_id} if parent else {}
        return self.store.run(f"{stage} {task}" if task else stage, lineage, name, tags, started_unix_s)

    def _ship_journal(self, run: TrackedRun) -> int:
        shipped, held_tokens = 0, run.metrics.get(_HIGH_WATER_METRIC, 0)
        self._rollbacks.look(self.store.client, run)

        def points_lacking(entry: Entry) -> list[Metric]:
            if self._rollbacks.is_due(entry["step"], _time_ms(entry)):
                absent = [name for name, value in entry.items() if "/" in name and value is None]
                at = _time_ms(entry), entry["step"]  # NaN takes the place of what the first line may have had
                return _points_of(entry) + [Metric(name, math.nan, *at) for name in absent]
            return _points_of(entry) if entry["tokens"] > held_tokens else []

        for entries, points in self._journal.batches(points_lacking):
            self.store.put(run, metrics=points)
            self._rollbacks.note(points)
            shipped += len({point.step for point in points})
            self._entry = entries[-1]
            self._mirrored["step"] = entries[-1]["step"]
        return shipped

    def _ship_samples(self, stage: str, run: TrackedRun, record: StageRecord) -> None:
        """System metrics of this lineage that the run lacks."""
        if run.run_id not in self._sampled:
            self._sampled[run.run_id] = max(self.store.steps_of(run, FIRST_METRIC), default=0)
        held, mine = self._sampled[run.run_id], record.lineage
        try:
            for lines, points in self._samples[stage].batches(
                lambda line: points_of(line) if line["lineage"] == mine and line["step"] > held else []
            ):
                self.store.put(run, metrics=points)
                self._sampled[run.run_id] = max(held, lines[-1]["step"])
        except DamagedError as error:
            if self._seen.get("samples") != str(error):
                self._say(f"no system metrics from here on: {error}")
            self._seen["samples"] = str(error)

    def _log_stage(
        self, stage: str, runs: dict[str, TrackedRun], record: StageRecord, note: list[str], owner_alive: bool
    ) -> None:
        """Parameters, results, tags and status of a stage."""
        run, ended_s = runs[stage], record.ended_unix_s
        ended_ms = int((ended_s or record.started_unix_s) * 1000)  # no clock: sent twice, it has to be the same point
        # Held-out scores may be there from earlier steps; a result that is there already is equal.
        points = [
            Metric(name, value, ended_ms, record.metrics_step)
            for name, value in record.metrics.items()
            if run.metrics.get(name) != value
        ]
        tags = stage_tags(record, run.tags) | note_tag(run.tags.get(NOTE), note)
        if stage == "evaluate":
            tags |= scored_checkpoint(record, runs.get("pretrain"))
            points = self._scores(run, record, ended_ms)
        elif stage == "pretrain":
            tags |= forked_from(self._config)
        self.store.put(run, record.inputs.get("science", {}) | record.numerics, tags, points)
        self.store.set_status(run, _stage_status(record, owner_alive), ended_s)

    def _scores(self, run: TrackedRun, record: StageRecord, at_ms: int) -> list[Metric]:
        """Scores of every checkpoint that was evaluated, and what it had cost: curves against step, tokens or FLOPs."""
        if record.state != "done" or self._seen.get("scores") == record.ended_unix_s:
            return []
        scores = {record.metrics_step: record.metrics}
        for path in (self._folder / "evaluate").glob("step_*/results.json"):
            results = read_results(path)
            if results and results["fingerprint"] == record.fingerprint and results["step"] not in (None, *scores):
                scores[results["step"]] = {
                    f"eval/{task}_{metric}": summary["median"]
                    for task, of_task in results["tasks"].items()
                    for metric, summary in of_task.items()
                }
        entries = stream_entries(self._folder / "pretrain" / "journal.jsonl")
        cost = {entry["step"]: _progress_of(entry) for entry in entries if entry["step"] in scores}
        held = self.store.steps_of(run, _HIGH_WATER_METRIC)
        self._seen["scores"] = record.ended_unix_s
        return [
            Metric(name, value, at_ms, step)
            for step in sorted(scores.keys() - held)
            for name, value in (scores[step] | cost.get(step, {})).items()
        ]

    def _log_tasks(self, stage_run: TrackedRun, record: StageRecord, owner_alive: bool) -> None:
        """One run for each task, below the stage's: its recipe as parameters, its seeds as the steps of its metrics."""
        path = self._folder / "evaluate" / "results_so_far.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        if results["fingerprint"] != record.fingerprint:
            return  # of other inputs
        started_ms = int(record.started_unix_s * 1000)
        for task, of_task in results["tasks"].items():
            if task in results["grid"] and task not in results["complete"]:
                continue  # another point may turn out to be the best
            run = self.run("evaluate", record.lineage, stage_run, task, record.started_unix_s)
            points = []
            for metric, summary in of_task.items():
                name = f"eval/{task}_{metric}"
                held = self._seeds.setdefault((run.run_id, name), self.store.steps_of(run, name))
                values = zip(results["seeds"][task], summary["values"], strict=True)
                points += [Metric(name, value, started_ms, seed) for seed, value in values if seed not in held]
            self.store.put(run, results["recipes"][task], metrics=points)
            for point in points:
                self._seeds[run.run_id, point.key].add(point.step)
            self.store.set_status(run, _stage_status(record, owner_alive), record.ended_unix_s)

    def _log_inputs(self, stage: str, run: TrackedRun, records: Records) -> None:
        record, seen = records[stage], f"inputs {run.run_id}"
        if self._seen.get(seen) == record.fingerprint:
            return
        inputs = []
        try:
            if stage == "pretrain" and "corpora" in records.get("tokenize", record).output:
                inputs = corpora_inputs(self._config, records["tokenize"].output)
            elif stage == "evaluate" and "tasks" in record.inputs:
                inputs = task_inputs(self._config, record)
        except FORESEEN as error:
            self._say(f"{stage}: no datasets in MLflow: {error}")
        if inputs:
            self.store.client.log_inputs(run.run_id, inputs)
        self._seen[seen] = record.fingerprint

    def _log_artifacts(self, stage: str, run: TrackedRun, record: StageRecord) -> None:
        seen = stage_summary(record)
        if self._seen.get(f"artifacts {run.run_id}") == seen:
            return
        with tempfile.TemporaryDirectory() as folder:
            environment = Path(folder) / "environment.json"
            write_json(environment, record.environment)
            files = [self._folder / "config.yaml", environment, *(self._folder / stage / name for name in _FILES)]
            for file in files:
                is_of_stage = file.parent == self._folder / stage
                if file.exists() and (record.state == "done" or not is_of_stage):  # else they are an earlier one's
                    self.store.client.log_artifact(run.run_id, str(file))
        self._seen[f"artifacts {run.run_id}"] = seen

    def _register(self, runs: dict[str, TrackedRun], records: Records) -> None:
        """A model version, once evaluate has passed."""
        record = records.get("evaluate")
        if record is None or record.state != "done" or self._seen.get("registered") == stage_summary(record):
            return
        self._say(register_model(self.store, self._config, record, runs["evaluate"], runs.get("pretrain")))
        self._seen["registered"] = stage_summary(record)

    def _pipeline_status(self, records: Records, owner_alive: bool) -> str:
        statuses = {_stage_status(record, owner_alive) for record in records.values()}
        for status in ("FAILED", "KILLED", "RUNNING"):
            if status in statuses:
                return status
        return "RUNNING" if owner_alive else "FINISHED"

    def _leave_word(self) -> None:
        """Leaves the run ids for `electra status`, and how far the mirror got."""
        noted = {"uri": redact(self._uri), "runs": self._ids, "mirrored": {"step": 0} | self._mirrored}
        if self._ids and self._seen.get("noted") != noted:
            write_json(self._folder / "mlflow.json", noted)
            self._seen["noted"] = noted


def _stage_status(record: StageRecord, owner_alive: bool) -> str:
    return "KILLED" if record.state == "running" and not owner_alive else _STATUS[record.state]


def _points_of(entry: Entry) -> list[Metric]:
    return [Metric(name, value, _time_ms(entry), entry["step"]) for name, value in _metrics_of(entry).items()]


def _time_ms(entry: Entry) -> int:
    return int(entry.get("time/unix_s", 0) * 1000)  # absent from journals of earlier versions


def _progress_of(entry: Entry) -> dict[str, float]:
    """What an entry's step has cost, by MLflow's names."""
    named = {
        "progress/tokens": entry["tokens"],
        "progress/flops": entry["flops"],
        "progress/flops_paper": entry.get("flops_paper"),  # absent from journals of earlier versions
        "progress/wall_s": entry["wall_s"],
    }
    return {name: float(value) for name, value in named.items() if value is not None}


def _metrics_of(entry: Entry) -> dict[str, float]:
    """An entry's metrics by MLflow's names."""
    more = {name: value for name, value in entry.items() if "/" in name and not name.startswith("time/")}
    return _progress_of(entry) | {name: float(value) for name, value in more.items() if value is not None}
