"""Fetching from the hub, with folders in the place of datasets and with a hub that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.hub import prefetch
from pipeline.evaluation.task_file import TaskConfig
from pipeline.evaluation.tasks import Task, _locate
from tests.conftest import clean_environment

SPLITS = {"train": "train", "dev": "validation", "T": "test"}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        table = pa.table({"phrase": [f"{split} {i}" for i in range(4)], "mark": [0, 1, 1, 0], "idx": [5, 6, 7, 8]})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def task_of(path: Path | str, **hub: object) -> TaskConfig:
    fields = {"phrase": "sentence", "mark": "label", "idx": "id"}
    source = {"path": str(path), "splits": SPLITS, "fields": fields, "labels": ["bad", "good"]} | hub
    about = {"name": "t", "kind": "classification", "text": ["sentence"], "hub": source}
    return TaskConfig.model_validate(about | {"train": "a/train.tsv", "dev": "a/dev.tsv", "test": {"T": "a/test.tsv"}})


def test_what_is_missing_is_fetched_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "data"
    written = prefetch([task_of(dataset)], data_dir)
    assert written == [data_dir / "reviews" / f"{split}.parquet" for split in SPLITS.values()]
    task: Task = _locate(task_of(dataset), data_dir, ())
    assert [(e.id, e.texts[0], e.label) for e in task.examples("dev")][:2] == [
        ("5", "validation 0", "bad"),
        ("6", "validation 1", "good"),
    ]
    assert [example.label for example in task.examples("T")] == [None] * 4
    assert sorted(os.listdir(data_dir / "reviews")) == ["test.parquet", "train.parquet", "validation.parquet"]

    before = written[0].stat().st_mtime_ns
    (data_dir / "reviews/test.parquet").unlink()
    assert prefetch([task_of(dataset)], data_dir) == [data_dir / "reviews/test.parquet"]
    assert written[0].stat().st_mtime_ns == before
    monkeypatch.setitem(sys.modules, "datasets", None)  # with everything there, nothing is asked for
    assert prefetch([task_of(dataset)], data_dir) == []


def test_own_files_are_not_fetched(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/train.tsv").write_text("sentence\tlabel\n")
    assert [path.name for path in prefetch([task_of(dataset)], tmp_path / "data")] == [
        "validation.parquet",
        "test.parquet",
    ]


def test_a_configuration_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "several"
    for config in ("one", "two"):
        (folder / config).mkdir(parents=True)
        rows = [{"phrase": f"{config} {i}", "mark": i, "idx": i} for i in range(2)]
        for split in ("train", "validation", "test"):
            (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = [{"config_name": name, "data_dir": name} for name in ("one", "two")]
    (folder / "README.md").write_text("---\nconfigs: " + json.dumps(about) + "\n---\n")
    task = task_of(folder, config="one", splits=SPLITS | {"T": "two/test"})
    written = [str(path.relative_to(tmp_path)) for path in prefetch([task], tmp_path / "data")]
    assert written == [f"data/several/{path}.parquet" for path in ("one/train", "one/validation", "two/test")]
    found = _locate(task, tmp_path / "data", ())
    assert [found.examples(split)[0].texts[0] for split in ("dev", "T")] == ["one 0", "two 0"]


def test_a_write_that_fails_leaves_nothing_half(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(self: object, path: str) -> None:
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.to_parquet", fill_up)
    with pytest.raises(ConfigError, match=r"train\.parquet: cannot be written .*No space left.*free space"):
        prefetch([task_of(dataset)], tmp_path / "data")
    assert os.listdir(tmp_path / "data/reviews") == []


def test_remains_of_a_killed_process_are_removed(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data/reviews"
    folder.mkdir(parents=True)
    (folder / f".train.parquet.{os.uname().nodename.partition('.')[0]}~99999999.tmp").write_bytes(b"PAR1")
    prefetch([task_of(dataset)], tmp_path / "data")
    assert sorted(os.listdir(folder)) == ["test.parquet", "train.parquet", "validation.parquet"]


def test_what_the_hub_does_not_have(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'dev'; it has .*validation.*; correct the task file's hub"):
        prefetch([task_of(dataset, splits={"dev": "dev"})], tmp_path / "data")
    with pytest.raises(ConfigError, match=r"reviews/other: cannot be read from there .*; correct path, config or rev"):
        prefetch([task_of(dataset, config="other")], tmp_path / "data")


def test_where_it_cannot_be_put(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set evaluate\.data_dir"):
        prefetch([task_of(dataset)], None)
    (tmp_path / "data").touch()
    with pytest.raises(ConfigError, match=r"data: a file, not a folder; set evaluate\.data_dir"):
        prefetch([task_of(dataset)], tmp_path / "data")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="closed: no permission to write"):
            prefetch([task_of(dataset)], tmp_path / "closed")


def test_a_hub_that_cannot_be_reached_is_known_at_once(tmp_path: Path) -> None:
    program = (
        "import atexit, time, datasets; from pathlib import Path; from pipeline.evaluation.hub import prefetch; "
        "from pipeline.evaluation.task_file import read_task_file; "
        "began = time.monotonic(); atexit.register(lambda: print(time.monotonic() - began)); "
        f"prefetch([read_task_file('cola')[0]], Path({str(tmp_path / 'data')!r}))"
    )
    changes = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment() | changes, capture_output=True, text=True, timeout=120
    )
    assert float(done.stdout) < 20
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: hub dataset nyu-mll/glue/cola: cannot be fetched" in last
    assert "on a machine with internet and copy evaluate.data_dir from there, or set HF_ENDPOINT" in last
    assert not (tmp_path / "data").exists()
