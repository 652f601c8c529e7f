"""`electra status`: what is left of a run, when it ends, what it has saved; quick, and beside a run that writes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards import digest
from data_shards.build import Share
from pipeline.chain import run_lock
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import DamagedError
from pipeline.goodput import Attempt
from pipeline.journal import Journal
from pipeline.stages import STAGES, StageRecord, read_record, stage_folder, write_record
from pipeline.status import describe_status, estimate_rest, format_status, is_over, read_tail
from pipeline.status_cli import watch
from pipeline.tokenize import tokenize_inputs
from tests.conftest import Electra, clean_environment, command

NOW_S = 1_700_000_000.0


def entry(step: int, wall_s: float, unix_s: float) -> dict[str, Any]:
    return {
        "step": step, "tokens": step * 256, "flops": step * 1e9, "wall_s": wall_s, "train/total_loss": 6.5 - step / 100,
        "train/skipped_steps": 2, "speed/tokens_per_s": 2560.0, "speed/mfu_pct": 12.5, "time/unix_s": unix_s,
    }  # fmt: skip


def attempt(number: int, began_unix_s: float) -> Attempt:
    return Attempt(number, "job", began_unix_s, began_unix_s)


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


@pytest.fixture
def training(config: Config) -> Config:
    """A run of 20 steps that is at step 10: 0.1 s of training a step, 0.2 s by the clock."""
    folder = stage_folder(config, "pretrain")
    journal = Journal(folder / "journal.jsonl", 0)
    now = time.time()
    for step in range(1, 11):
        journal.append(entry(step, step * 0.1, now - (10 - step) * 0.2))
    environment = {"host": "n7", "slurm": {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[7-8]"}}
    write_record(config, StageRecord("pretrain", "running", {}, attempts=3, environment=environment))
    checkpoint = folder / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(bytes(3 << 20))
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": {"weights.safetensors": {"size": 3 << 20}}}))
    (folder / "requeues.json").write_text(json.dumps({"job": "42", "steps": {"1": 0, "2": 5}}))
    return config


def test_running_training_is_told_in_full(training: Config) -> None:
    with run_lock(training):
        found = describe_status(training)
    about = found["stages"]["pretrain"]
    assert found["running"] and found["process"] == {
        "stage": "pretrain", "host": "n7", "slurm_job": "42", "nodes": "n[7-8]",
    }  # fmt: skip
    assert (about["state"], about["step"], about["steps"], about["attempts"]) == ("running", 10, 20, 3)
    assert about["training_left_s"] == pytest.approx(1.0) and about["seconds_per_step"] == pytest.approx(0.1)
    assert about["ends_unix_s"] == pytest.approx(about["last_line"]["time/unix_s"] + 2.0)
    assert about["checkpoint"] == {
        "step": 5, "age_s": pytest.approx(0, abs=60), "bytes": 3 << 20, "is_whole": True,
    }  # fmt: skip
    assert (about["skipped_steps"], about["requeues"]) == (2, 2)
    text = format_status(found)
    assert "a rerun would be refused: the run goes on" in text
    assert "running pretrain on n7, Slurm job 42 (n[7-8])" in text
    assert "step 10 of 20 (50.0 %)" in text
    assert "0:00:01 of training left at the present speed; ends 20" in text
    assert "loss 6.4000, tokens 2.560e+03, FLOPs 1.000e+10, tokens/s 2,560, MFU % 12.5" in text
    assert "checkpoint of step 5, 0:00:0" in text and "3.0 MiB, verified when written" in text
    assert "started 3 times, 2 steps skipped, 2 requeues" in text


def test_nothing_is_foretold_of_a_run_that_stands_still(training: Config) -> None:
    found = describe_status(training)
    assert not found["running"] and found["stages"]["pretrain"]["state"] == "killed"
    assert "ends_unix_s" not in found["stages"]["pretrain"]
    text = format_status(found)
    assert "not running; the last was pretrain on n7" in text
    assert "0:00:01 of training left at the present speed, once it goes on (0.1 s a step)" in text


def test_checkpoint_that_has_lost_bytes_is_called_damaged(training: Config) -> None:
    folder = stage_folder(training, "pretrain") / "checkpoints" / "step_00000005"
    os.truncate(folder / "weights.safetensors", 5)
    assert "checkpoint of step 5, 0:00:0" in (text := format_status(describe_status(training))) and "damaged" in text
    (folder / "MANIFEST.json").write_text("{")
    assert "checkpoint of step 5: damaged" in format_status(describe_status(training))


def test_downtime_and_waiting_for_other_things_are_told_apart() -> None:
    """Ten steps, an hour of nothing, ten steps: 1 s a step, 1.5 s by the clock with checkpoints."""
    before = [entry(step, step, NOW_S + 1.5 * step) for step in range(1, 11)]
    after = [entry(step, step, NOW_S + 3600 + 1.5 * step) for step in range(11, 21)]
    attempts = [attempt(1, NOW_S - 9), attempt(2, NOW_S + 3000)]
    now_s = after[-1]["time/unix_s"] + 1
    rest = estimate_rest(before + after, 20, 100, attempts, now_s)
    assert rest["seconds_per_step"] == pytest.approx(1.0) and rest["training_left_s"] == pytest.approx(80.0)
    assert rest["ends_unix_s"] == pytest.approx(after[-1]["time/unix_s"] + 80 * 1.5)


def test_only_the_last_lines_count() -> None:
    slow = [entry(step, 100.0 * step, NOW_S + 100 * step) for step in range(1, 11)]
    fast = [entry(step, 1000.0 + step, NOW_S + 1000 + step) for step in range(11, 60)]
    assert estimate_rest(slow + fast, 59, 159, [], None) == {"seconds_per_step": 1.0, "training_left_s": 100.0}


@pytest.mark.parametrize(
    ("entries", "step", "now_s", "wanted"),
    [
        ([], 0, NOW_S, set()),
        ([entry(20, 20.0, NOW_S)], 20, NOW_S, set()),  # at its end
        ([entry(5, 10.0, NOW_S)], 5, NOW_S, {"seconds_per_step", "training_left_s"}),
        ([entry(4, 4.0, NOW_S), entry(5, 5.0, NOW_S + 1)], 5, NOW_S + 5000, {"seconds_per_step", "training_left_s"}),
        ([entry(4, 4.0, NOW_S), entry(5, 5.0, NOW_S + 1)], 5, NOW_S + 2,
         {"seconds_per_step", "training_left_s", "ends_unix_s"}),
    ],
    ids=["no line", "at the end", "one line", "silent for long", "writes"],
)  # fmt: skip
def test_what_is_not_known_is_not_said(entries: list, step: int, now_s: float, wanted: set[str]) -> None:
    assert estimate_rest(entries, step, 20, [], now_s).keys() == wanted


def test_tail_has_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_tail(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [found["step"] for found in read_tail(path)] == [1, 2, 3]
    assert [found["step"] for found in read_tail(path, 21)] == [3]  # begins within the second line
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(DamagedError, match="near its end is not JSON"):
        read_tail(path)


def test_tail_of_a_journal_that_is_being_written(tmp_path: Path) -> None:
    path, is_done = tmp_path / "journal.jsonl", threading.Event()
    journal = Journal(path, 0)

    def write() -> None:
        for step in range(1, 3000):
            journal.append(entry(step, step, NOW_S) | {"filling": "x" * (step % 700)})
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [0]
    while not is_done.is_set():
        steps = [found["step"] for found in read_tail(path)]
        assert steps == sorted(steps)
        seen.append(steps[-1] if steps else 0)
    writer.join()
    assert seen == sorted(seen) and read_tail(path)[-1]["step"] == 2999


def test_long_journal_takes_no_longer(training: Config) -> None:
    path = stage_folder(training, "pretrain") / "journal.jsonl"
    line = path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(line * 400_000)
    began = time.thread_time()
    found = describe_status(training)
    assert time.thread_time() - began < 3 and found["stages"]["pretrain"]["step"] == 10


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'deepspeed', 'mlflow', 'transformers', 'pandas', 'matplotlib'}"
    code = f"import sys; import pipeline.cli, pipeline.status; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=clean_environment(), check=True)


def start_watching(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("status", *arguments),
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_blocks(process: subprocess.Popen[str], count: int) -> str:
    assert process.stdout
    said = ""
    while said.count("\n\n") < count:
        line = process.stdout.readline()
        assert line, "it ended too early"
        said += line
    return said


def test_watch_ends_with_the_run_and_not_when_it_is_killed(training: Config, config_path: Path) -> None:
    with run_lock(training):
        process = start_watching(config_path, "--watch", "0.2", "run.name=tiny")
        read_blocks(process, 2)
    while "pretrain  killed" not in read_blocks(process, 1):  # or between two starts: it may go on
        pass
    record = read_record(training, "pretrain")
    assert record
    write_record(training, replace(record, state="failed"))
    said, problem = process.communicate(timeout=60)
    assert process.returncode == 0 and not problem
    assert "pretrain  failed" in said


@pytest.mark.parametrize(
    ("states", "runs", "over"),
    [
        (("done", "done", "done"), False, True),
        (("not started", "not started", "done"), False, True),  # of a folder
        (("not started", "not started", "not started"), False, False),  # its job waits
        (("done", "not started", "not started"), False, False),  # between two stages
        (("done", "killed", "not started"), False, False),
        (("done", "stopped", "not started"), False, False),
        (("done", "failed", "not started"), False, True),
        (("done", "failed", "running"), True, False),
        (("done", "running", "done"), False, False),  # ended between two looks
    ],
)
def test_a_run_is_over_when_nothing_follows(states: tuple[str, ...], runs: bool, over: bool) -> None:
    stages = {stage: {"state": state} for stage, state in zip(STAGES, states, strict=True)}
    assert is_over({"running": runs, "stages": stages, "rerun": dict.fromkeys(STAGES, "")}) is over
    assert is_over({"running": runs, "stages": stages, "rerun": {"refused": "it is damaged"}}) is not runs


def test_text_that_nobody_has_hashed_is_not_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    begins = []
    monkeypatch.setattr(digest, "_hash", lambda unit: begins.append(unit) or "0" * 64)
    found = describe_status(config)["rerun"]
    assert found["tokenize"] == "run or reuse, by the text, which was not read"
    assert found["pretrain"] == "wait: after tokenize" and not begins
    tokenize_inputs(config, Share())
    assert begins and describe_status(config)["rerun"]["tokenize"] == "run: never started under this name"
    assert len(begins) == len(config.data.corpora)
    corpus = config.data.corpora[0].model_copy(update={"path": "/no/text"})
    absent = config.model_copy(update={"data": config.data.model_copy(update={"corpora": (corpus,)})})
    assert "no file at '/no/text'" in describe_status(absent)["rerun"]["refused"]


def test_watch_is_left_quietly(training: Config, config_path: Path) -> None:
    with run_lock(training):
        process = start_watching("--watch", config_path)
        read_blocks(process, 1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_an_interrupt_that_somebody_swallows_ends_the_watch(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> str:
        with suppress(BaseException):  # as some libraries do while they are imported
            signal.raise_signal(signal.SIGINT)
        return "seen"

    before = signal.getsignal(signal.SIGINT)
    try:
        watch(look, str, lambda _: False, 0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out == "seen\n\n"


def test_watch_keeps_the_exit_code_of_an_error(electra: Electra, tmp_path: Path) -> None:
    assert "no.yaml" in electra("status", tmp_path / "no.yaml", "--watch", code=78).stderr


def test_watch_of_json_is_one_object_a_look(training: Config, electra: Electra, config_path: Path) -> None:
    record = read_record(training, "pretrain")
    assert record
    write_record(training, replace(record, state="failed"))
    found = json.loads(electra("status", config_path, "--json", "--watch").stdout)  # it is over: one look
    assert found["stages"]["pretrain"]["last_line"]["step"] == 10 and found["running"] is False
