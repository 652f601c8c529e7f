"""MLflow on a server: one that dies, is slow, refuses, wants a token. Training goes on, and nothing is lost."""

import base64
import json
import os
import re
import shlex
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import Electra, read_journal
from tests.distributed.drill import Drill
from tests.pipeline.mlflow_server import Proxy, Server

STEPS = ["train.steps=6", "train.checkpoint_every=3"]
TOKEN, HUB_TOKEN, PASSWORD = "token-Zx81kQ", "hub-Pq72mW", "pass-Lk53vB"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def run_ids(config: Path, name: str) -> dict[str, str]:
    return json.loads((config.parent / "out/runs" / name / "mlflow.json").read_text())["runs"]


def assert_whole(server: Server, config: Path, name: str) -> None:
    """MLflow holds each line of the journal once, and says that the run is finished."""
    client, ids = MlflowClient(server.uri), run_ids(config, name)
    journal = read_journal(config.parent / "out", name)
    for metric in ("train/total_loss", "progress/tokens", "progress/flops", "progress/wall_s"):
        held = [(point.step, point.value) for point in client.get_metric_history(ids["pretrain"], metric)]
        field = metric.removeprefix("progress/") if metric.startswith("progress/") else metric
        assert held == [(entry["step"], entry[field]) for entry in journal], metric
    assert {client.get_run(run_id).info.status for run_id in ids.values()} == {"FINISHED"}
    with sqlite3.connect(server.folder / "server.db") as database:
        points = database.execute("select key, step from metrics where run_uuid = ?", [ids["pretrain"]]).fetchall()
    assert set(Counter(points).values()) == {1}


def assert_no_step_waited(config: Path, name: str, seconds: float) -> None:
    """Between no two lines of the journal lies as much time as one answer of the server takes."""
    times = [entry["time/unix_s"] for entry in read_journal(config.parent / "out", name)]
    assert max(after - before for before, after in pairwise(times)) < seconds


def command_that_ships(stderr: str) -> list[str]:
    """The command that the warning at the end of a run names."""
    (found,) = re.findall(r"this ships the rest: electra (.*)", stderr)
    return shlex.split(found.partition(" (with")[0])


def test_refusing_server(shared_config: Path, electra: Electra, server: Server, proxy: Proxy) -> None:
    proxy.refusals = (401, 500)
    done = electra("run", shared_config, "run.name=refused", f"tracking.uri={proxy.uri}", *STEPS)
    assert "pretrain: done" in done.stderr
    assert "6 lines of the journal (steps 1 to 6); state, results or files of tokenize, pretrain" in done.stderr
    assert {status for _, status, _ in proxy.answers} <= {401, 500}
    proxy.refusals = ()
    proxy.answers.clear()
    assert "6 steps shipped" in electra(*command_that_ships(done.stderr)).stdout
    assert_whole(server, shared_config, "refused")
    assert len(proxy.answers) <= 30  # at five seconds each


def test_server_killed_in_the_middle(shared_config: Path, electra: Electra, server: Server, proxy: Proxy) -> None:
    """It dies when it has taken the first points, and is back after the end of the run."""
    proxy.kills_at = "runs/log-batch"
    arguments = [shared_config, "run.name=bereft", f"tracking.uri={proxy.uri}", "train.steps=40"]
    try:
        done = electra("run", *arguments, ELECTRA_FAULT="slow@seconds=0.3")  # each step: 12 s in all
    finally:
        server.start()
    assert "pretrain: done" in done.stderr
    assert "did not take everything" in done.stderr
    assert_no_step_waited(shared_config, "bereft", 10)  # the time-out of a call
    electra(*command_that_ships(done.stderr))
    assert_whole(server, shared_config, "bereft")


def test_slow_server_and_the_next_attempt(shared_config: Path, electra: Electra, server: Server, proxy: Proxy) -> None:
    """Five seconds an answer, and the run is told to stop: it ends without the rest, which the next attempt ships."""
    proxy.delay_s = 5
    overrides = [f"tracking.uri={proxy.uri}", "train.steps=120"]
    with Drill(shared_config, "patient", *overrides, fault="slow@seconds=0.3") as drill:
        assert drill.until_step(10)
        assert drill.until(lambda: bool(proxy.answers))
        os.kill(drill.command_pid, signal.SIGTERM)
        assert drill.wait() == 85
    assert "did not take everything" in drill.said
    record = json.loads((drill.folder / "stage.json").read_text())
    assert record["ended_unix_s"] < proxy.answers[-1][-1]  # training had ended, and answers were still to come
    assert_no_step_waited(shared_config, "patient", 5)
    proxy.delay_s = 0
    done = electra("run", shared_config, "run.name=patient", *overrides)
    assert "did not take everything" not in done.stderr
    assert_whole(server, shared_config, "patient")


@pytest.fixture(scope="module")
def guarded(
    shared_config: Path, electra: Electra, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """What a run with evaluation says, on a server that wants a token; secrets are in the environment and the URI."""
    folder = tmp_path_factory.mktemp("task")
    for split, count in (("train", 24), ("dev", 8)):
        rows = [{"id": f"{split}-{n}", "text": ("zozo", "bada")[n % 2], "label": "ba"[n % 2]} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "syllable.yaml"
    task.write_text("name: syllable\nkind: classification\ntrain: train.jsonl\ndev: dev.jsonl\ntext: [text]\n"
                    "metrics: [accuracy]\n")  # fmt: skip
    proxy = Proxy(server, authorization=f"Bearer {TOKEN}")
    name = ["run.name=guarded", f"evaluate.tasks=[{task}]", "evaluate.more_checkpoints=[3]", *STEPS]
    secrets = {"MLFLOW_TRACKING_TOKEN": TOKEN, "HF_TOKEN": HUB_TOKEN}
    first = electra("run", shared_config, *name, f"tracking.uri=http://{proxy.address}", **secrets)
    assert "did not take everything" not in first.stderr
    proxy.authorization = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    with_password = f"tracking.uri=http://me:{PASSWORD}@{proxy.address}"
    second = electra("sync", shared_config, with_password, *name, HF_TOKEN=HUB_TOKEN)
    proxy.authorization = "Bearer of another"
    refused = electra("sync", shared_config, with_password, *name, HF_TOKEN=HUB_TOKEN, code=1)
    shown = electra("config", shared_config, with_password, "run.name=guarded")
    status = electra("status", shared_config, with_password, *name)
    proxy.close()
    yield "".join(done.stdout + done.stderr for done in (first, second, refused, shown, status))


def test_no_secret_is_kept_or_shown(guarded: str, shared_config: Path, server: Server) -> None:
    """Not in any byte of the run's folder, of the server's database and artifacts, or of what was said."""
    assert "cannot be reached" in guarded
    secrets = [secret.encode() for secret in (TOKEN, HUB_TOKEN, PASSWORD)]
    secrets += [base64.b64encode(f"me:{PASSWORD}".encode())]
    places = {"console": guarded.encode()}
    for root in (shared_config.parent / "out", server.folder):
        places |= {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert any(name.endswith("server.db") for name in places)
    assert any(name.endswith("tracking.log") for name in places)
    assert any("artifacts" in name and name.endswith("config.yaml") for name in places)
    assert not [name for name, content in places.items() if any(secret in content for secret in secrets)]


def test_lineage_of_scores(guarded: str, shared_config: Path, server: Server) -> None:
    """From the scores to the checkpoint, from there to the text; the checkpoint is one version, though synced twice."""
    assert_whole(server, shared_config, "guarded")
    client, ids = MlflowClient(server.uri), run_ids(shared_config, "guarded")
    record = json.loads((shared_config.parent / "out/runs/guarded/pretrain/stage.json").read_text())
    evaluate, pretrain = client.get_run(ids["evaluate"]), client.get_run(ids["pretrain"])
    assert evaluate.data.tags["electra.pretrain_run_id"] == ids["pretrain"]
    digest = evaluate.data.tags["electra.checkpoint_sha256"]
    assert digest == pretrain.data.tags["electra.checkpoint_sha256"] == record["output"]["checkpoint_sha256"]
    assert evaluate.data.tags["electra.checkpoint_step"] == "6"
    for name in ("eval/syllable_accuracy", "progress/tokens", "progress/flops", "progress/wall_s"):  # a curve, its axes
        assert [point.step for point in client.get_metric_history(ids["evaluate"], name)] == [3, 6], name
    assert evaluate.data.metrics["progress/flops"] == pretrain.data.metrics["progress/flops"]

    assert pretrain.inputs and evaluate.inputs
    (text,) = pretrain.inputs.dataset_inputs
    assert (text.dataset.name, len(text.dataset.digest)) == ("made_up", 36)
    assert json.loads(text.dataset.source)["uri"].endswith("made_up.txt")
    assert [(tag.key, tag.value) for tag in text.tags] == [("mlflow.data.context", "training")]
    (task,) = evaluate.inputs.dataset_inputs
    assert (task.dataset.name, task.tags[0].value) == ("syllable", "evaluation")

    (version,) = client.search_model_versions(f"tags.`electra.checkpoint_sha256` = '{digest}'")
    assert version.source == f"runs:/{ids['pretrain']}/checkpoints/step_00000006"
    assert float(version.tags["eval/syllable_accuracy"]) == pytest.approx(
        evaluate.data.metrics["eval/syllable_accuracy"]
    )
    (manifest,) = client.list_artifacts(ids["pretrain"], "checkpoints/step_00000006")
    assert manifest.path.endswith("MANIFEST.json")


def test_note_says_what_ran_and_how_to_run_it_again(guarded: str, shared_config: Path, server: Server) -> None:
    del guarded
    client, ids = MlflowClient(server.uri), run_ids(shared_config, "guarded")
    notes = {stage: client.get_run(run_id).data.tags["mlflow.note.content"] for stage, run_id in ids.items()}
    note = notes["pipeline"]
    assert set(notes.values()) == {note}
    for part in ("**guarded**", "1,536 tokens", "nominal", "eval/syllable_accuracy", f"electra run {shared_config}"):
        assert part in note
    commit = client.get_run(ids["pretrain"]).data.tags.get("mlflow.source.git.commit")
    assert commit is None or commit in note
