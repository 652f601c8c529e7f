"""A run that is killed, started again and changed is one run in MLflow, and MLflow says at each moment how it is."""

import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ElectraError
from pipeline.journal import read_entries
from pipeline.stages import STAGES, StageRecord, read_record, run_identity, start_record, write_config, write_record
from pipeline.tracking import sqlite_uri
from pipeline.tracking_mirror import Mirror
from pipeline.tracking_store import Store
from tests.forking import Forked

TOKENS_PER_STEP = 8 * 32
NAME = "killed"
BEGAN_S, HOUR_S = 1.7e9, 3600.0
INPUTS = {"science": {}}


def client_of(config: Path) -> MlflowClient:
    return MlflowClient(sqlite_uri(config.parent / "out"))


def run_id(config: Path, stage: str) -> str:
    return json.loads((config.parent / "out/runs" / NAME / "mlflow.json").read_text())["runs"][stage]


def wait_until(condition: Callable[[], bool], command_line: Forked) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline
        assert command_line.poll() in (None, 0, -9), "it ended by itself"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def statuses(shared_config: Path, start_electra: Callable[..., Forked]) -> dict[str, list[str]]:
    """What MLflow said of a run that hangs twice, is killed both times with kill -9, and then ends well, by stage."""
    said: dict[str, list[str]] = {"pipeline": [], "pretrain": []}
    noted = shared_config.parent / "out/runs" / NAME / "mlflow.json"

    def reached(status: str, step: int) -> bool:
        ids = json.loads(noted.read_text())["runs"] if noted.exists() else {}
        if "pretrain" not in ids:
            return False
        runs = {stage: client_of(shared_config).get_run(ids[stage]) for stage in said}
        for stage, run in runs.items():
            if said[stage][-1:] != [run.info.status]:
                said[stage].append(run.info.status)
        tokens = runs["pretrain"].data.metrics.get("progress/tokens")
        return {run.info.status for run in runs.values()} == {status} and tokens == step * TOKENS_PER_STEP

    environment = {
        "ELECTRA_FAULT": "hang@step=7,attempt=1; hang@step=11,attempt=2",
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
    }
    overrides = [f"run.name={NAME}", "tracking.uri=auto", "train.steps=14", "train.checkpoint_every=4"]
    for step, changed in ((6, []), (10, []), (14, ["train.micro_batch_size=4"])):  # another rounding at last
        running = start_electra("run", shared_config, *overrides, *changed, **environment)
        try:
            wait_until(partial(reached, "RUNNING" if step < 14 else "FINISHED", step), running)
            assert step < 14 or running.wait(150) == 0
        finally:
            running.kill()
        if step < 14:
            wait_until(partial(reached, "KILLED", step), running)
    return said


def test_status_is_right_at_each_moment(statuses: dict[str, list[str]]) -> None:
    expected = ["RUNNING", "KILLED", "RUNNING", "KILLED", "RUNNING", "FINISHED"]
    unseen = [*expected[:4], "FINISHED"]  # the last attempt has done its steps before MLflow is asked
    assert statuses["pretrain"] in (expected, unseen)
    assert statuses["pipeline"] in (expected, unseen)


def test_three_attempts_are_one_run_with_each_point_once(statuses: dict[str, list[str]], shared_config: Path) -> None:
    del statuses
    client, pretrain = client_of(shared_config), run_id(shared_config, "pretrain")
    assert client.get_run(pretrain).data.tags["electra.attempts"] == "3"
    history = client.get_metric_history(pretrain, "train/total_loss")
    assert [point.step for point in history] == list(range(1, 15))
    with sqlite3.connect(shared_config.parent / "out/mlflow.db") as database:
        points = database.execute("select key, step from metrics where run_uuid = ?", [pretrain]).fetchall()
        identity = client.get_run(pretrain).data.tags["electra.run_id"]
        runs = database.execute("select count(*) from tags where key = 'electra.run_id' and value = ?", [identity])
        assert runs.fetchone() == (3,)  # pipeline, tokenize, pretrain
    assert set(Counter(points).values()) == {1}


def test_system_metrics_go_on_counting(statuses: dict[str, list[str]], shared_config: Path) -> None:
    del statuses
    client, pretrain = client_of(shared_config), run_id(shared_config, "pretrain")
    samples = read_entries(shared_config.parent / "out/runs" / NAME / "pretrain/system.jsonl")
    assert [sample["step"] for sample in samples] == list(range(1, len(samples) + 1))
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "network_receive_megabytes"):
        held = client.get_metric_history(pretrain, f"system/{name}")
        assert [(point.step, point.value) for point in held] == [(s["step"], s[name]) for s in samples]


def test_a_changed_numerics_key_is_a_tag(statuses: dict[str, list[str]], shared_config: Path) -> None:
    del statuses
    pipeline = client_of(shared_config).get_run(run_id(shared_config, "pipeline")).data
    assert pipeline.params["train.micro_batch_size"] == "2"
    assert pipeline.tags["electra.drift.train.micro_batch_size"] == "4"


def test_a_run_of_an_earlier_version_is_mirrored(statuses: dict[str, list[str]], shared_config: Path) -> None:
    """One whose records do not say command, digests or dates, and which has no samples."""
    del statuses
    out = shared_config.parent / "out"
    old = out / "runs/earlier"
    for stage in ("tokenize", "pretrain"):
        record = json.loads((out / "runs" / NAME / stage / "stage.json").read_text())
        record["environment"] = {"host": "there", "git": None, "slurm": {"SLURM_JOB_ID": "7"}}
        record["output"] = {key: value for key, value in record["output"].items() if key != "checkpoint"}
        (old / stage).mkdir(parents=True)
        (old / stage / "stage.json").write_text(json.dumps(record))
    entries = read_entries(out / "runs" / NAME / "pretrain/journal.jsonl")
    for entry in entries:
        del entry["time/unix_s"], entry["flops_paper"]
    (old / "pretrain/journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (old / "config.yaml").write_text((out / "runs" / NAME / "config.yaml").read_text().replace(NAME, "earlier"))
    assert Mirror(old, sqlite_uri(out), "electra").mirror(owner_alive=False) == 14
    assert Mirror(old, sqlite_uri(out), "electra").mirror(owner_alive=False) == 0
    held = client_of(shared_config).get_run(json.loads((old / "mlflow.json").read_text())["runs"]["pretrain"])
    assert (held.info.status, held.data.tags["electra.slurm_job_ids"]) == ("FINISHED", "7")


def test_a_note_that_a_user_has_written_stays(statuses: dict[str, list[str]], shared_config: Path) -> None:
    del statuses
    client, pipeline = client_of(shared_config), run_id(shared_config, "pipeline")
    client.set_tag(pipeline, "mlflow.note.content", "mine")
    out = shared_config.parent / "out"
    Mirror(out / "runs" / NAME, sqlite_uri(out), "electra").mirror(owner_alive=False)
    assert client.get_run(pipeline).data.tags["mlflow.note.content"] == "mine"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database; tests choose experiments of their own."""
    return sqlite_uri(tmp_path_factory.mktemp("database"))


@pytest.mark.parametrize("written", [None, 0, 1])
def test_a_run_that_a_lost_answer_left_is_not_another_run(uri: str, written: int | None) -> None:
    """The server creates a run, its answer is lost, and the next pass creates it again before it can see the first."""
    made = [(store, store.run("pretrain", "1", "lost", {}, BEGAN_S)) for store in [
        Store(uri, "lost", f"lost {written}") for _ in range(2)]]  # fmt: skip
    assert len({run.run_id for _, run in made}) == 2
    if written is None:
        kept = min(run.run_id for _, run in made)
    else:
        store, run = made[written]
        store.put(run, {"a": 1})
        kept = run.run_id
    assert Store(uri, "lost", f"lost {written}").run("pretrain", "1", "lost", {}).run_id == kept
    stages = {run.run_id: MlflowClient(uri).get_run(run.run_id).info.lifecycle_stage for _, run in made}
    assert stages == {run_id: "active" if run_id == kept else "deleted" for run_id in stages}


@pytest.fixture
def evaluated(config_path: Path) -> Config:
    """A run of yesterday, by its records: one hour of each stage, and a task."""
    config = load_config(config_path)
    write_config(config, "tokenize")
    for number, stage in enumerate(STAGES):
        began_s = BEGAN_S + number * HOUR_S
        write_record(config, StageRecord(stage, "done", INPUTS, started_unix_s=began_s, ended_unix_s=began_s + HOUR_S))
    record = read_record(config, "evaluate")
    assert record
    results = {
        "fingerprint": record.fingerprint, "grid": [], "complete": ["cola"], "seeds": {"cola": [1]},
        "tasks": {"cola": {"matthews": {"median": 0.5, "values": [0.5]}}}, "recipes": {"cola": {"lr": 1e-4}},
    }  # fmt: skip
    (config.run_folder / "evaluate/results_so_far.json").write_text(json.dumps(results))
    return config


def mirror(config: Config, uri: str, experiment: str, owner_alive: bool = False) -> dict[str, MlflowRun]:
    """A pass of a process of its own; the runs that MLflow has then, by name."""
    Mirror(config.run_folder, uri, experiment).mirror(owner_alive)
    client = MlflowClient(uri)
    holder = client.get_experiment_by_name(experiment)
    assert holder
    return {run.info.run_name or "": run for run in client.search_runs([holder.experiment_id])}


def hours(runs: dict[str, MlflowRun]) -> dict[str, tuple[float, ...]]:
    """Start and end of each run, in hours after the first."""
    times = {name: (run.info.start_time, run.info.end_time) for name, run in runs.items()}
    return {name: tuple((ms / 1000 - BEGAN_S) / HOUR_S for ms in both if ms) for name, both in times.items()}


def test_runs_last_as_long_as_their_stages_did(uri: str, evaluated: Config) -> None:
    """A store that sees the run only now says when it was; an attempt more begins nothing anew."""
    expected = {"tiny": (0, 3), "tiny tokenize": (0, 1), "tiny pretrain": (1, 2), "tiny evaluate": (2, 3),
                "tiny evaluate cola": (2, 3)}  # fmt: skip
    assert hours(mirror(evaluated, uri, "times")) == expected
    record = start_record(evaluated, "evaluate", INPUTS, {})
    again = mirror(evaluated, uri, "times", owner_alive=True)
    running = {name for name, run in again.items() if run.info.status == "RUNNING"}
    assert running == {"tiny", "tiny evaluate", "tiny evaluate cola"}
    record.state, record.ended_unix_s = "done", BEGAN_S + 5 * HOUR_S
    write_record(evaluated, record)
    later = {"tiny": (0, 5), "tiny evaluate": (2, 5), "tiny evaluate cola": (2, 5)}
    assert hours(mirror(evaluated, uri, "times")) == expected | later
    record.ended_unix_s = BEGAN_S + 6 * HOUR_S  # another attempt, between two passes
    write_record(evaluated, record)
    assert hours(mirror(evaluated, uri, "times"))["tiny"] == (0, 6)


def test_a_requeued_run_starts_with_its_first_attempt(uri: str, evaluated: Config) -> None:
    start_record(evaluated, "pretrain", INPUTS, {})
    shutil.rmtree(evaluated.run_folder / "evaluate")
    runs = mirror(evaluated, uri, "requeued", owner_alive=True)
    assert {name: run.info.status for name, run in runs.items()} == {
        "tiny": "RUNNING", "tiny tokenize": "FINISHED", "tiny pretrain": "RUNNING",
    }  # fmt: skip
    assert runs["tiny pretrain"].info.start_time == int((BEGAN_S + HOUR_S) * 1000)
    assert runs["tiny pretrain"].info.end_time is None


def test_runs_that_an_earlier_version_let_start_late_do_not_end_before(uri: str, evaluated: Config) -> None:
    store = Store(uri, "late", run_identity(evaluated))
    for stage in STAGES:
        record = read_record(evaluated, stage)
        assert record
        run = store.run(stage, record.lineage, f"tiny {stage}", {})  # starts now
        store.client.set_terminated(run.run_id, "FINISHED", int(BEGAN_S * 1000))
    lasted = hours(mirror(evaluated, uri, "late"))
    assert len(lasted) == 5
    assert all(end >= start for start, end in lasted.values())


def test_children_go_below_the_run_that_took_a_deleted_ones_place(uri: str, evaluated: Config) -> None:
    client, before = MlflowClient(uri), mirror(evaluated, uri, "orphans")
    record = read_record(evaluated, "pretrain")
    assert record
    record.lineage = "second"  # as after --force
    write_record(evaluated, record)
    for name in ("tiny", "tiny evaluate"):
        client.delete_run(before[name].info.run_id)
    mirror(evaluated, uri, "orphans")
    runs = client.search_runs([before["tiny"].info.experiment_id])
    ids = {run.info.run_name: run.info.run_id for run in runs}
    assert ids["tiny"] != before["tiny"].info.run_id
    above = Counter((run.info.run_name, run.data.tags.get("mlflow.parentRunId")) for run in runs)
    assert above == {
        ("tiny", None): 1, ("tiny tokenize", ids["tiny"]): 1, ("tiny pretrain", ids["tiny"]): 2,
        ("tiny evaluate", ids["tiny"]): 1, ("tiny evaluate cola", ids["tiny evaluate"]): 1,
    }  # fmt: skip


def test_a_deleted_experiment_is_named_with_the_ways_on(uri: str) -> None:
    client = MlflowClient(uri)
    experiment_id = Store(uri, "gone", "any").experiment.experiment_id
    client.delete_experiment(experiment_id)
    with pytest.raises(ElectraError, match=rf"gone is deleted on {uri}; .*set another tracking\.experiment") as raised:
        Store(uri, "gone", "any")
    assert f"`mlflow experiments restore -x {experiment_id}`" in str(raised.value)
    client.restore_experiment(experiment_id)
    assert Store(uri, "gone", "any").experiment.experiment_id == experiment_id
