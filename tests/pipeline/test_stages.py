"""Who may work in a run's folder, where file locks tell and where they do not; how a stage's end is written down."""

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from data_shards import temporaries
from pipeline import chain, sign_of_life, stages
from pipeline.comparison.folder import read_folder
from pipeline.config import Config
from pipeline.config_file import dump_yaml, load_config
from pipeline.distributed import Process
from pipeline.errors import ConfigError
from pipeline.stages import end_record, is_running, read_record, run_lock, start_record
from pipeline.status import describe_status

HERE = os.uname().nodename.partition(".")[0]


@pytest.fixture
def config(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("ELECTRA_ALLOCATION", raising=False)
    return load_config(config_path, ())


def without_locks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Locks end at the node, so each of two nodes gets one, or the file system has none."""

    def flock(*_: object) -> None:
        if kind == "absent":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def signs(config: Config) -> list[str]:
    return sorted(path.name for path in config.run_folder.glob(".at_work.*"))


def leave_sign(config: Config, host: str, pid: int, allocation: str = "", age_s: float = 0) -> None:
    """What a process leaves that is killed."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    sign = config.run_folder / f".at_work.{host}~{pid}.tmp"
    sign.write_text(allocation)
    touched = time.time() - age_s
    os.utime(sign, (touched, touched))


def seconds_to_start(config: Config) -> float:
    began = time.monotonic()
    with run_lock(config):
        seconds = time.monotonic() - began
        assert signs(config) == [f".at_work.{HERE}~{os.getpid()}.tmp"]
    assert signs(config) == []
    return seconds


@pytest.mark.parametrize("kind", ["local", "absent"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_process_on_another_node_is_seen_where_locks_do_not_tell(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, shared: bool
) -> None:
    without_locks(monkeypatch, kind)
    monkeypatch.setenv("ELECTRA_ALLOCATION", "4711-0@1")
    with run_lock(config):
        before = signs(config)
        monkeypatch.setattr(temporaries, "_host", lambda: "node08")
        monkeypatch.setenv("ELECTRA_ALLOCATION", "4712-0@1")
        seen = rf"in use by process {os.getpid()} on {HERE} \(job 4711-0\), which is seen at work, at step 0"
        with pytest.raises(ConfigError, match=seen), run_lock(config, shared=shared):
            pass
        assert signs(config) == before
    assert signs(config) == []


def test_a_dead_one_of_another_node_is_waited_for_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_of_life, "_WATCHED_S", 1.0)
    leave_sign(config, "node08", 7, "4711-0")
    assert seconds_to_start(config) >= 1.0
    monkeypatch.setattr(sign_of_life, "_WATCHED_S", 60.0)
    assert seconds_to_start(config) < 30


@pytest.mark.parametrize("left", ["nothing", "same host", "same allocation", "long ago"])
def test_nothing_else_is_waited_for(config: Config, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    pid = int(Path("/proc/sys/kernel/pid_max").read_text())  # no process has it
    if left == "same host":
        leave_sign(config, HERE, pid, "4711-0")
    elif left == "same allocation":
        monkeypatch.setenv("ELECTRA_ALLOCATION", "4711-0@1")
        leave_sign(config, "node08", 7, "4711-0")
    elif left == "long ago":
        leave_sign(config, "node08", 7, "4711-0", age_s=3600)
    monkeypatch.setattr(sign_of_life, "_WATCHED_S", 60.0)
    assert seconds_to_start(config) < 30


@pytest.mark.parametrize("kind", ["local", "absent"])
@pytest.mark.parametrize("shared", [False, True])
def test_whether_a_run_goes_on_is_known_where_locks_do_not_tell(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, shared: bool
) -> None:
    without_locks(monkeypatch, kind)
    assert not is_running(config.run_folder)
    with run_lock(config, shared):
        monkeypatch.setattr(temporaries, "_host", lambda: "node08")
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)  # this host's clock is wrong
        assert is_running(config.run_folder)
        monkeypatch.undo()
    without_locks(monkeypatch, kind)
    leave_sign(config, "node08", 7, age_s=60)
    assert not is_running(config.run_folder)
    assert signs(config) == [".at_work.node08~7.tmp"]


@pytest.mark.parametrize("is_held", [False, True])
def test_a_lock_is_seen_through_a_file_that_is_open_for_reading_on_nfs(
    config: Config, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    def flock(_: object, kind: int) -> None:
        if kind & fcntl.LOCK_EX:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if is_held:
            raise BlockingIOError

    config.run_folder.mkdir(parents=True)
    (config.run_folder / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert is_running(config.run_folder) == is_held


def test_elements_of_an_array_that_start_at_once_are_of_one_lineage(config: Config) -> None:
    lineages = []
    for inputs in ({"a": 1}, {"a": 2}, {"a": 1}):
        path = config.run_folder / "evaluate/stage.json"
        before = path.read_bytes() if path.exists() else None
        first = start_record(config, "evaluate", inputs, {}, shared="17")
        assert start_record(config, "evaluate", inputs, {}, shared="17").lineage == first.lineage  # it came after
        path.write_bytes(before) if before else path.unlink()
        assert start_record(config, "evaluate", inputs, {}, shared="17").lineage == first.lineage  # it did not see it
        lineages.append(first.lineage)
    for job in ("18", "", ""):  # another array; no array, twice, each time after the results were removed
        shutil.rmtree(config.run_folder / "evaluate")
        lineages.append(start_record(config, "evaluate", {"a": 1}, {}, shared=job).lineage)
    assert len(set(lineages)) == 6


@pytest.mark.parametrize(
    ("stage", "elements", "is_one"), [("evaluate", 2, True), ("pretrain", 2, False), ("evaluate", 1, False)]
)
def test_slurm_says_whose_lineage_is_one(
    config: Config, monkeypatch: pytest.MonkeyPatch, stage: str, elements: int, is_one: bool
) -> None:
    array = {"JOB_ID": 17, "TASK_COUNT": elements, "TASK_MIN": 0, "TASK_MAX": elements - 1, "TASK_ID": 0}
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
    monkeypatch.setitem(chain._STORIES, stage, lambda *_: True)
    lineages = set()
    for _ in range(2):
        shutil.rmtree(config.run_folder / stage, ignore_errors=True)  # the second does not see the first one's
        chain.execute_stage(config, chain.Decision(stage, "run", "", {"a": 1}), Process())
        record = read_record(config, stage)
        assert record is not None and record.state == "done"
        lineages.add(record.lineage)
    assert len(lineages) == (1 if is_one else 2)


def test_status_and_compare_agree_where_locks_do_not_tell(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, "absent")
    start_record(config, "pretrain", {}, {})
    (config.run_folder / "config.yaml").write_text(dump_yaml(config))
    for age_s, state in ((0, "running"), (60, "killed")):
        leave_sign(config, "node08", 7, age_s=age_s)
        assert describe_status(config)["stages"]["pretrain"]["state"] == state
        assert read_folder(config.run_folder).facts["status"] == f"pretrain {state}"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_run_has_one_identity(config: Config, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    identity = stages.run_identity(config)
    assert len(identity) == 32 and stages.run_identity(config) == identity
    assert [path.name for path in config.run_folder.iterdir()] == ["run_id"]


def test_those_who_share_a_stage_do_not_see_each_other(config: Config) -> None:
    with run_lock(config, shared=True), run_lock(config, shared=True):
        assert signs(config) == []
        with pytest.raises(ConfigError, match="in use"), run_lock(config):
            pass


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_json(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stages, "write_json", write_json)


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_full_disk_changes_nothing_about_how_a_run_ends(
    config: Config, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, state: stages.State
) -> None:
    record = start_record(config, "pretrain", {}, {})
    request.getfixturevalue("full_disk")
    end_record(config, record, state)
    path = config.run_folder / "pretrain" / "stage.json"
    assert f"No space left on device: '{path}'; the stage will seem to have been killed" in caplog.text
    found = read_record(config, "pretrain")
    assert found and found.state == "running"


def test_what_is_done_has_to_be_written_down(config: Config, request: pytest.FixtureRequest) -> None:
    record = start_record(config, "pretrain", {}, {})
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=r"No space left on device: '.*pretrain/stage\.json'"):
        end_record(config, record, "done")
