"""MLflow as a mirror: SQLite and a server, kills and races, a server that is not there."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config_file import load_config
from pipeline.stages import write_config
from pipeline.tracking import Shipper, on_network_file_system, redact, resolve_uri, sqlite_uri
from pipeline.tracking_mirror import _metrics_of
from tests.conftest import REPOSITORY, Electra, clean_environment, free_port

STEPS = ["train.steps=6", "train.checkpoint_every=3"]


@pytest.fixture(scope="module")
def tracked(shared_config: Path, electra: Electra) -> Path:
    """A run of tokenize and pretrain, tracked in SQLite by default."""
    electra("run", shared_config, "run.name=tracked", "tracking.uri=auto", "train.held_out_every=4", *STEPS)
    return shared_config.parent / "out"


def test_one_pipeline_run_with_a_child_per_stage(tracked: Path) -> None:
    client = MlflowClient(sqlite_uri(tracked))
    noted = json.loads((tracked / "runs/tracked/mlflow.json").read_text())["runs"]
    assert set(noted) == {"pipeline", "tokenize", "pretrain"}
    runs = {stage: client.get_run(run_id) for stage, run_id in noted.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for stage in ("tokenize", "pretrain"):
        assert runs[stage].data.tags["mlflow.parentRunId"] == noted["pipeline"]
    assert runs["pipeline"].data.params["optimizer.lr"] == "0.0005"
    assert runs["pretrain"].data.params["world_size"] == "1"
    assert runs["tokenize"].data.metrics["data/tokens"] > 1000
    assert runs["pretrain"].data.metrics["held_out/discriminator_auc"] > 0
    history = client.get_metric_history(noted["pretrain"], "held_out/discriminator_auc")
    assert [metric.step for metric in history] == [4, 6]
    names = {file.path for file in client.list_artifacts(noted["pretrain"])}
    assert names == {"config.yaml", "environment.json"}


def test_metrics_have_the_fixed_names(tracked: Path) -> None:
    noted = json.loads((tracked / "runs/tracked/mlflow.json").read_text())["runs"]
    metrics = MlflowClient(sqlite_uri(tracked)).get_run(noted["pretrain"]).data.metrics
    fixed = {
        "train/total_loss",
        "train/generator_mlm_loss",
        "train/discriminator_rtd_loss",
        "train/generator_accuracy",
        "train/discriminator_accuracy",
        "train/discriminator_auc",
        "train/discriminator_recall",
        "train/replaced_fraction",
        "train/grad_norm",
        "train/learning_rate",
        "progress/tokens",
        "progress/flops",
        "progress/flops_paper",
        "speed/tokens_per_s",
        "speed/tokens_per_s_per_device",
        "speed/mfu_pct",
        "memory/peak_gib",
    }
    assert fixed <= set(metrics)


def test_syncing_again_changes_nothing(tracked: Path, shared_config: Path, electra: Electra) -> None:
    def rows() -> list[tuple]:
        with sqlite3.connect(tracked / "mlflow.db") as connection:
            return connection.execute("select run_uuid, key, step, value from metrics order by 1, 2, 3").fetchall()

    before = rows()
    assert "0 steps shipped" in electra("sync", shared_config, "run.name=tracked", "tracking.uri=auto", *STEPS).stdout
    assert rows() == before
    assert set(Counter((run, key, step) for run, key, step, _ in before).values()) == {1}


def test_unreachable_server_delays_no_step_and_sync_makes_up(shared_config: Path, electra: Electra) -> None:
    arguments = [shared_config, "run.name=offline", *STEPS]
    dead = f"tracking.uri=http://user:secret@127.0.0.1:{free_port()}"
    done = electra("run", *arguments, dead)
    assert "pretrain: done" in done.stderr
    assert "did not take everything: 6 lines of the journal (steps 1 to 6)" in done.stderr
    assert "secret" not in done.stderr + done.stdout
    out = shared_config.parent / "out"
    for file in ("tracking.log", "log.txt", "config.yaml"):
        assert "secret" not in (out / "runs/offline" / file).read_text(), file
    refused = electra("sync", *arguments, dead, code=1).stderr
    assert "cannot be reached" in refused
    assert "secret" not in refused
    assert "6 steps shipped" in electra("sync", *arguments, "tracking.uri=auto").stdout


CREATE = (
    "import sys; from pathlib import Path; from pipeline.tracking_store import create_sqlite;"
    "create_sqlite(Path(sys.argv[1]))"
)


def create(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CREATE, str(path)], cwd=REPOSITORY, env=clean_environment(),
                            stderr=subprocess.DEVNULL)  # fmt: skip


def test_kill_while_the_sqlite_file_is_created(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    kills = 0
    for wait_s in (0.05, 0.4, 0.9):  # after the first sign of the temporary file: in the middle of the migrations
        process = create(path)
        while process.poll() is None and not list(tmp_path.glob(".mlflow.db.*.tmp")):
            time.sleep(0.01)
        time.sleep(wait_s)
        process.kill()
        kills += process.wait() == -9
        if path.exists():  # it was whole before the kill came
            assert MlflowClient(f"sqlite:///{path}").search_experiments()
            path.unlink()
    assert kills >= 1
    assert create(path).wait() == 0
    assert MlflowClient(f"sqlite:///{path}").search_experiments()


def test_what_killed_creators_left_goes_even_if_nobody_asked_for_them(tmp_path: Path) -> None:
    """In a container whose first process asks for no children, their numbers stay taken."""
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie
    prefix = f".mlflow.db.{os.uname().nodename}"
    names = (f"{prefix}.{dead.pid}.tmp", f"{prefix}.{dead.pid}.tmp-journal", f"{prefix}.{os.getpid()}.tmp")
    for name in names:
        (tmp_path / name).touch()
    assert create(tmp_path / "mlflow.db").wait() == 0
    assert [name for name in names if (tmp_path / name).exists()] == [names[2]]  # its creator lives
    assert dead.wait() == 0


RACE = """
import os, sys
from pipeline.tracking_store import Store
children = []
for number in range(8):
    pid = os.fork()
    if not pid:
        store = Store(sys.argv[1], "raced", f"run-{number}")
        store.put(store.run("pipeline", "1", f"run-{number}", {}), {"number": number})
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
sys.exit(codes != [0] * 8)
"""


def test_eight_processes_start_on_one_fresh_sqlite_file(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    subprocess.run(
        [sys.executable, "-c", RACE, uri],
        cwd=REPOSITORY,
        env=clean_environment(MLFLOW_DISABLE_TELEMETRY="true"),
        check=True,
    )
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raced")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["number"] for run in runs) == list("01234567")
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_run_goes_on_when_the_shipper_cannot_be_started(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def popen(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", popen)
    with Shipper(load_config(config_path, ("tracking.uri=auto", "tracking.experiment=mine"))):
        pass
    assert "Resource temporarily unavailable" in caplog.text
    assert "electra sync" in caplog.text and "tracking.experiment=mine" in caplog.text


def test_a_full_disk_leaves_the_config_as_it_was(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = load_config(config_path)
    write_config(config, "tokenize")
    before = (config.run_folder / "config.yaml").read_text()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_config(load_config(config_path, ("train.log_every=2",)), "tokenize")
    assert (config.run_folder / "config.yaml").read_text() == before


def test_where_auto_leads(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path, ("tracking.uri=auto",))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(config) == sqlite_uri(config.run.dir)
    monkeypatch.setattr("pipeline.tracking.on_network_file_system", lambda path, mounts: True)
    assert resolve_uri(config) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert resolve_uri(config) == "http://127.0.0.1:1"


def test_the_path_of_a_database_starts_at_the_current_folder(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, absolute in {
        "sqlite:///a.db": f"sqlite:///{tmp_path}/a.db",
        "sqlite:///../b.db": f"sqlite:///{tmp_path.parent}/b.db",
        "sqlite:////c/d.db": "sqlite:////c/d.db",
        "https://host:80/e": "https://host:80/e",
    }.items():
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert resolve_uri(load_config(config_path, (f"tracking.uri={given}",))) == absolute
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert resolve_uri(load_config(config_path, ("tracking.uri=auto",))) == absolute


def test_network_file_systems_are_recognised() -> None:
    mounts = "a / ext4 rw 0 0\nb /data nfs4 rw 0 0\nc /data/fast xfs rw 0 0\nd /scratch lustre rw 0 0\n"
    known = {"/tmp/x": False, "/data/me": True, "/data/fast/run": False, "/scratch/run": True, "/scratchy": False}
    assert {path: on_network_file_system(Path(path), mounts) for path in known} == known


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [(kind, True) for kind in ("dvs", "pvfs2", "orangefs", "ocfs2", "gfs2", "9p", "virtiofs", "autofs", "fuse",
                               "fuse.sshfs", "smb3")]
    + [(kind, False) for kind in ("fuseblk", "ext4", "btrfs", "zfs", "tmpfs", "overlay")],
)  # fmt: skip
def test_a_kind_of_file_system(kind: str, is_network: bool) -> None:
    assert on_network_file_system(Path("/data/run"), f"a / xfs rw 0 0\nb /data {kind} rw 0 0\n") == is_network


def test_no_password_in_what_is_shown() -> None:
    assert redact("http://me:pw@host:80/x") == "http://host:80/x"
    assert redact("http://me:p@ss@host/x") == "http://host/x"
    assert redact("postgresql://me:p/w@host/db?user=u&password=secret") == "postgresql://host/db"
    assert redact("postgresql://u:123/456@host/db") == "postgresql://host/db"
    assert redact("mysql+pymysql://u:/w@host:3306/db") == "mysql+pymysql://host:3306/db"
    assert redact("postgresql://host:5432/db") == "postgresql://host:5432/db"
    assert redact("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"


def test_forced_stage_gets_an_mlflow_run_of_its_own(tracked: Path, shared_config: Path, electra: Electra) -> None:
    arguments = [shared_config, "run.name=forced-again", "tracking.uri=auto", *STEPS]
    electra("run", *arguments)
    first = json.loads((tracked / "runs/forced-again/mlflow.json").read_text())["runs"]["pretrain"]
    electra("run", *arguments, "--force", "pretrain")
    second = json.loads((tracked / "runs/forced-again/mlflow.json").read_text())["runs"]["pretrain"]
    assert first != second
    history = MlflowClient(sqlite_uri(tracked)).get_metric_history(second, "train/total_loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]


def test_a_failing_artifact_store_keeps_back_artifacts_only(
    tracked: Path, shared_config: Path, electra: Electra, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking_mirror import Mirror

    electra("run", shared_config, "run.name=artless", *STEPS)
    mirror = Mirror(tracked / "runs/artless", sqlite_uri(tracked), "electra")

    def fail(*_: object) -> None:
        raise OSError("no artifact store")

    monkeypatch.setattr(mirror.store.client, "log_artifact", fail)
    with pytest.raises(OSError, match="no artifact store"):
        mirror.mirror(owner_alive=False)
    lineage = json.loads((tracked / "runs/artless/pretrain/stage.json").read_text())["lineage"]
    run_id = mirror.run("pretrain", lineage).run_id
    found = MlflowClient(sqlite_uri(tracked)).get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["progress/tokens"] == 6 * 8 * 32


def test_sync_beside_a_running_stage_leaves_it_running(tracked: Path, shared_config: Path, electra: Electra) -> None:
    from pipeline.stages import read_record, run_lock, write_record

    arguments = [shared_config, "run.name=beside", "tracking.uri=auto", *STEPS]
    electra("run", *arguments)
    config = load_config(shared_config, ("run.name=beside",))
    record = read_record(config, "pretrain")
    assert record
    record.state, record.attempts = "running", 2
    write_record(config, record)
    run_id = json.loads((tracked / "runs/beside/mlflow.json").read_text())["runs"]["pretrain"]
    with run_lock(config):
        electra("sync", *arguments)
    assert MlflowClient(sqlite_uri(tracked)).get_run(run_id).info.status == "RUNNING"
    electra("sync", *arguments)
    assert MlflowClient(sqlite_uri(tracked)).get_run(run_id).info.status == "KILLED"


def test_the_settings_of_a_trained_run_stay(
    tracked: Path, shared_config: Path, electra: Electra, tmp_path: Path
) -> None:
    """No command on tokenize says that something else was trained, neither when it only ships nor when it runs."""
    folder, uri = tracked / "runs/stays", f"sqlite:///{tmp_path}/other.db"
    shutil.copytree(tracked / "runs/tracked", folder)
    settings = (folder / "config.yaml").read_text().replace("name: tracked", "name: stays")
    (folder / "config.yaml").write_text(settings)
    others = [shared_config, "run.name=stays", *STEPS, "optimizer.lr=0.123", "model.dropout=0.3"]

    assert "tokenize: up to date" in electra("tokenize", *others, f"tracking.uri={uri}").stderr
    assert (folder / "config.yaml").read_text() == settings
    runs = json.loads((folder / "mlflow.json").read_text())["runs"]
    assert MlflowClient(uri).get_run(runs["pipeline"]).data.params["optimizer.lr"] == "0.0005"

    record = json.loads((folder / "tokenize/stage.json").read_text())
    (folder / "tokenize/stage.json").write_text(json.dumps(record | {"state": "stopped"}))
    resumed = electra("tokenize", *others).stderr
    for said in ("tokenize: resume", "config.yaml stays", "optimizer.lr: 0.0005 -> 0.123"):
        assert said in resumed
    assert (folder / "config.yaml").read_text() == settings

    electra("run", "--until", "tokenize", "--force", "tokenize", *others)  # what was trained is moved aside
    assert load_config(folder / "config.yaml").optimizer.lr == 0.123


def test_journals_of_earlier_versions_can_be_shipped() -> None:
    entry = {"step": 1, "tokens": 8, "flops": 1e6, "wall_s": 0.5, "train/total_loss": 2.0}
    assert _metrics_of(entry) == {
        "progress/tokens": 8.0, "progress/flops": 1e6, "progress/wall_s": 0.5, "train/total_loss": 2.0,
    }  # fmt: skip
