"""Comparing runs from MLflow: what the mirror shipped gives the same comparison as the folders, which are gone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow import MlflowClient

from pipeline.comparison.find import find_runs
from pipeline.comparison.report import make_report, to_json
from pipeline.config_file import dump_yaml, load_config
from pipeline.errors import ConfigError, ElectraError
from pipeline.evaluation.scores import summarize
from pipeline.spikes import SkippedRows, add_skip
from pipeline.stages import StageRecord, read_record, write_record
from pipeline.tracking_mirror import Mirror
from pipeline.tracking_store import create_sqlite
from tests.conftest import TINY, free_port

DIGESTS = {"a": "0" * 64, "b": "0" * 64}
SCORES = {"a": [0.50, 0.52, 0.54, 0.61], "b": [0.60, 0.62, 0.64, 0.67]}


def write_stages(config_path: Path, name: str, *overrides: str) -> Path:
    """A finished run's folder: records, journal, results."""
    config = load_config(config_path, (f"run.name={name}", *overrides))
    folder = config.run_folder
    environment = {"host": "here", "git": {"a": "commit-of-a", "b": "commit-of-b-dirty"}[name]}
    science = {"optimizer.lr": config.optimizer.lr}
    for stage, record in {
        "tokenize": StageRecord("tokenize", "done", {}, output={"tokenizer_sha256": "feed", "corpora": []}),
        "pretrain": StageRecord(
            "pretrain", "done", {"science": science}, metrics={"held_out/mask_token_loss": 4.5}, metrics_step=30,
            numerics={"world_size": 2, "threads": 1, "kernels": {"attention": "torch"}}, attempts=3,
        ),
        "evaluate": StageRecord("evaluate", "done", {"tasks": {"rte": DIGESTS[name]}}),
    }.items():  # fmt: skip
        record.environment, record.started_unix_s, record.ended_unix_s = environment, 1e9 + (name == "b"), 1e9 + 60
        write_record(config, record)
        if stage == "evaluate":
            write_results(folder, name, record.fingerprint)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    (folder / "pretrain/journal.jsonl").write_text("".join(map(line, range(10, 40, 10))), encoding="utf-8")
    return folder


def line(step: int, loss: float | None = None, began_s: float = 1e9) -> str:
    return json.dumps({
        "step": step, "tokens": 100 * step, "flops": 1e15 * step, "flops_paper": 9e14 * step, "wall_s": step / 3,
        "train/total_loss": loss or 7 / step, "train/discriminator_auc": None if step == 20 else 0.7,
        "speed/tokens_per_s": 300.0 + step, "goodput/productive_pct": 50.0 + step, "time/unix_s": began_s + step,
    }) + "\n"  # fmt: skip


def write_results(folder: Path, name: str, fingerprint: str) -> None:
    results: dict[str, Any] = {
        "checkpoint": "/c", "run": name, "step": 30, "size": "small", "flops": 3e16, "flops_paper": 2.7e16,
        "fingerprint": fingerprint, "tasks": {"rte": {"accuracy": summarize(SCORES[name])}},
        "score": {"rte": "accuracy"}, "glue_average": None, "recipes": {"rte": {"lr": 1e-4}},
        "seeds": {"rte": [1, 2, 3, 4]}, "units": {"done": 4, "of": 4}, "complete": ["rte"], "grid": {}, "failed": [],
    }  # fmt: skip
    (folder / "evaluate/step_00000030").mkdir()
    for path in ("results.json", "results_so_far.json", "step_00000030/results.json"):
        (folder / "evaluate" / path).write_text(json.dumps(results), encoding="utf-8")


def numbers_of(wanted: list[str], uri: str | None = None) -> dict[str, Any]:
    return json.loads(json.dumps(to_json(make_report(find_runs(wanted, uri, "compared")))))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Reading sets MLflow's patience and a server's user for the whole process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's file with nothing in it, to be copied: to make one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    create_sqlite(path)
    return path


@pytest.fixture
def own_uri(database: Path, tmp_path: Path) -> str:
    """Of a test's own copy."""
    return f"sqlite:///{shutil.copy(database, tmp_path)}"


@pytest.fixture(scope="module")
def shipped(database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], dict[str, str]]:
    """MLflow's URI; what the folders, which are gone, compared to; ids of the pipeline runs."""
    root = tmp_path_factory.mktemp("compared")
    config_path, uri = root / "tiny.yaml", f"sqlite:///{shutil.copy(database, root)}"
    config_path.write_text(TINY.format(run_dir=root / "out", corpus=root / "text.txt"), encoding="utf-8")
    folders = [
        write_stages(config_path, "a"),
        write_stages(config_path, "b", "optimizer.lr=1e-6", "train.log_every=2"),
    ]
    for folder in folders:
        Mirror(folder, uri, "compared").mirror(owner_alive=False)
    ids = {folder.name: json.loads((folder / "mlflow.json").read_text())["runs"] for folder in folders}
    compared = numbers_of([str(folder) for folder in folders])
    shutil.rmtree(root / "out")
    return uri, compared, {name: runs["pretrain" if name == "b" else "pipeline"] for name, runs in ids.items()}


def test_mlflow_alone_gives_the_same_comparison(shipped: tuple[str, dict[str, Any], dict[str, str]]) -> None:
    uri, from_folders, _ = shipped
    tracked = numbers_of(["a", "b"], uri)
    assert [(each["key"], each["list"], each["values"]) for each in tracked["differences"]] == [
        ("optimizer.lr", "science", ["0.0005", "1e-06"]),
        ("train.log_every", "execution", ["1", "2"]),
    ]
    measures = {row["name"]: row["values"] for row in tracked["measures"]}
    assert measures["attempts"] == [3, 3]
    assert measures["git commit"] == ["commit-of-a", "commit-of-b-dirty"]
    assert measures["goodput, % productive"] == [80.0, 80.0]
    assert measures["held_out/mask_token_loss"] == [4.5, 4.5]
    assert tracked["scores"][0]["scores"][1]["values"] == SCORES["b"]
    assert tracked["scores"][0]["tests"][0]["p"] is not None
    for part in ("differences", "following_differences", "measures", "scores", "notes", "curves"):
        assert tracked[part] == from_folders[part], part
    for ours, theirs in zip(tracked["runs"], from_folders["runs"], strict=True):
        assert ours["settings"] == theirs["settings"]


def test_kernels_are_those_of_the_last_attempt(config_path: Path, own_uri: str) -> None:
    """MLflow keeps a parameter's first value."""
    folder = write_stages(config_path, "a")
    for each in (folder, write_stages(config_path, "b")):
        Mirror(each, own_uri, "compared").mirror(owner_alive=False)
    config = load_config(config_path, ("run.name=a",))
    record = read_record(config, "pretrain")
    assert record is not None
    record.numerics |= {"kernels": {"attention": "triton"}, "world_size": 4}
    write_record(config, record)
    Mirror(folder, own_uri, "compared").mirror(owner_alive=False)
    tracked, _ = find_runs(["a", "b"], own_uri, "compared")
    assert tracked.is_tracked and tracked.numerics == {"world_size": "4", "threads": "1", "kernels.attention": "triton"}


def test_a_run_goes_by_the_id_of_its_pipeline_or_of_a_stage(
    shipped: tuple[str, dict[str, Any], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _, ids = shipped
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert [run.name for run in find_runs([ids["a"], ids["b"]], None, "another experiment")] == ["a", "b"]


def test_a_sqlite_file_may_be_given_from_the_current_folder(
    shipped: tuple[str, dict[str, Any], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _, ids = shipped
    monkeypatch.chdir(Path(uri.removeprefix("sqlite:///")).parent)
    runs = find_runs(["a", "b"], "sqlite:///mlflow.db", "compared")
    assert runs[0].source == f"{uri} run {ids['a']}"
    assert runs[1].results


def test_a_run_given_by_folder_and_from_mlflow_is_one(config_path: Path, own_uri: str, tmp_path: Path) -> None:
    uri, folder = own_uri, write_stages(config_path, "a")
    Mirror(folder, uri, "compared").mirror(owner_alive=False)
    for wanted in (["a", str(folder)], [str(folder), "a"]):
        with pytest.raises(ConfigError, match="named twice") as raised:
            find_runs(wanted, uri, "compared")
        assert str(folder) in str(raised.value)
        assert "leave one out" in str(raised.value)
    copy = shutil.copytree(folder, tmp_path / "copy")  # which may have gone on by itself
    assert [run.name for run in find_runs([str(folder), str(copy)], uri, "compared")] == ["a", "a (2)"]


def test_wrong_names_are_one_message(shipped: tuple[str, dict[str, Any], dict[str, str]], tmp_path: Path) -> None:
    uri, _, ids = shipped
    for name in ("c", "0" * 32):
        with pytest.raises(ConfigError, match=r"no pipeline run of that name in experiment compared .* b, a;"):
            find_runs([name, "a"], uri, "compared")
    with pytest.raises(ConfigError, match="--experiment nowhere: there is none"):
        find_runs(["a", "b"], uri, "nowhere")
    with pytest.raises(ConfigError, match="named twice"):
        find_runs(["a", ids["a"]], uri, "compared")
    dead = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(ElectraError, match="cannot be read") as raised:
        find_runs(["a", "b"], dead, "compared")
    assert "secret" not in str(raised.value)


def test_scores_on_other_data_are_not_tested(config_path: Path, own_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIGESTS, "b", "1" * 64)
    for name in ("a", "b"):
        Mirror(write_stages(config_path, name), own_uri, "compared").mirror(owner_alive=False)
    assert numbers_of(["a", "b"], own_uri)["scores"][0]["tests"][0]["reason"] == "another task file or other data"


def test_lines_that_a_loss_spike_had_made_again_are_shipped_once_more(config_path: Path, own_uri: str) -> None:
    uri, folders = own_uri, [write_stages(config_path, name) for name in ("a", "b")]
    journal = folders[0] / "pretrain/journal.jsonl"

    def ship(folder: Path) -> int:
        return Mirror(folder, uri, "compared").mirror(owner_alive=True)

    def train(*lines: str) -> None:
        """As a start does: a new file takes the place of the old one."""
        aside = journal.with_suffix(".new")
        aside.write_text("".join(lines), encoding="utf-8")
        aside.replace(journal)

    train(line(10), line(20), line(30, 8.0), line(40, 99.0))
    shipper = Mirror(folders[0], uri, "compared")
    assert [shipper.mirror(owner_alive=True), ship(folders[1])] == [4, 3]
    add_skip(folders[0] / "pretrain", SkippedRows(20, 20))
    assert [shipper.mirror(owner_alive=True), ship(folders[0])] == [0, 0]  # the journal is the old one still
    later, last = (line(30, 0.5, began_s).replace("0.7", "null") for began_s in (2e9, 3e9))
    train(line(10), line(20), later)
    assert [shipper.mirror(owner_alive=True), ship(folders[0])] == [1, 0]
    train(line(10), line(20), last, line(40, 0.4, 3e9), line(50, 0.3, 3e9))  # after a kill
    assert [ship(folders[0]), shipper.mirror(owner_alive=True), ship(folders[0])] == [2, 2, 0]
    tracked, from_folders = numbers_of(["a", "b"], uri), numbers_of(list(map(str, folders)))
    assert tracked["curves"]["train/total_loss"][0]["values"] == [0.7, 0.35, 0.5, 0.4, 0.3]
    for part in ("measures", "curves"):
        assert tracked[part] == from_folders[part], part
    assert numbers_of([str(folders[0]), "b"], uri)["scores"][0]["tests"][0]["p"]  # a digest, and how that one begins
    pretrain = json.loads((folders[0] / "mlflow.json").read_text())["runs"]["pretrain"]
    assert len(MlflowClient(uri).get_metric_history(pretrain, "train/total_loss")) == 7  # five, and two that stay


def test_a_store_of_artifacts_that_is_away_costs_the_scores_only(
    shipped: tuple[str, dict[str, Any], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "results.json")  # which MLflow's message has
    uri = shipped[0]
    copy = tmp_path / "mlflow.db"
    shutil.copy(uri.removeprefix("sqlite:///"), copy)
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    aside = artifacts.rename(artifacts.with_name("aside"))
    try:
        tracked = numbers_of(["a", "b"], f"sqlite:///{copy}")
    finally:
        aside.rename(artifacts)
    assert tracked["scores"] == []
    assert sum("no scores" in note for note in tracked["notes"]) == 2
    assert all("'***'" in note for note in tracked["notes"] if "no scores" in note)
    assert len(tracked["differences"]) == 2
