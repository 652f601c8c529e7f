"""What a command would do and why; refused changes and the three ways on."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import chain, shipper
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.errors import ElectraError, StoppedEarly
from pipeline.goodput import Ledger, read_attempts
from pipeline.stages import read_record, run_lock, stage_folder
from tests.conftest import TINY, Electra, make_text, read_journal

STEPS = ["train.steps=4", "train.checkpoint_every=2"]


def plan_of(electra: Electra, *arguments: object) -> dict[str, str]:
    lines = electra("run", *arguments, "--plan").stdout.splitlines()
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


@pytest.fixture(scope="module")
def done(shared_config: Path, electra: Electra) -> Path:
    """A finished run named `chain`."""
    electra("run", shared_config, "run.name=chain", *STEPS)
    return shared_config


def test_plan_says_what_and_why_and_changes_nothing(config_path: Path, electra: Electra) -> None:
    assert plan_of(electra, config_path) == {
        "tokenize": "run     never started under this name", "pretrain": "wait    after tokenize",
    }  # fmt: skip
    electra("status", config_path)
    assert not (config_path.parent / "out").exists()


def test_finished_stages_are_up_to_date(done: Path, electra: Electra) -> None:
    again = electra("run", done, "run.name=chain", *STEPS).stderr
    assert "tokenize: up to date" in again
    assert "pretrain: up to date, at step 4" in again
    assert "training from step" not in again


def test_another_name_uses_the_same_shards(done: Path, electra: Electra) -> None:
    said = electra("tokenize", done, "run.name=other").stderr
    assert "tokens are there already" in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr: 0.0005 -> 0.001"),
        ("model.hidden_layers=1", "model.hidden_layers: 2 -> 1"),
        ("tokenizer.vocab_size=200", "tokenizer.vocab_size: 300 -> 200"),
        ("run.seed=2", "run.seed: 1 -> 2"),
    ],
)
def test_changed_science_is_refused_with_the_ways_on(done: Path, electra: Electra, override: str, named: str) -> None:
    before = read_journal(done.parent / "out", "chain")
    refused = electra("run", done, "run.name=chain", *STEPS, override, code=78).stderr
    for text in (named, "nothing was touched", "run.name=NEW", "run.fork_from=chain@STEP", "--force"):
        assert text in refused
    assert read_journal(done.parent / "out", "chain") == before
    assert "up to date" in electra("run", done, "run.name=chain", *STEPS).stderr


def test_pretrain_alone_sees_what_changed_for_tokenize(done: Path, electra: Electra) -> None:
    """Before its first checkpoint it waits for tokenize; after it, it refuses as `run` does. config.yaml stays."""
    electra("tokenize", done, "run.name=alone", *STEPS)
    config = done.parent / "out/runs/alone/config.yaml"
    before = config.read_text()
    alone = ["run.name=alone", *STEPS, "tokenizer.vocab_size=200"]
    refused = electra("pretrain", done, *alone, code=78).stderr
    assert "pretrain cannot start: after tokenize, as these changed: tokenizer.vocab_size: 300 -> 200" in refused
    electra("pretrain", done, *alone[:-1])
    refused = electra("pretrain", done, *alone, code=78).stderr
    assert "tokenizer.vocab_size: 300 -> 200" in refused and "--force tokenize" in refused
    assert config.read_text() == before


def test_changed_text_is_refused(config_path: Path, corpus_path: Path, electra: Electra, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_bytes(corpus_path.read_bytes())
    corpora = f'data.corpora=[{{"name": "own", "path": "{text}"}}]'
    electra("run", config_path, corpora, *STEPS)
    text.write_bytes(corpus_path.read_bytes() + b"\nOne more.\n")
    assert "text.own" in electra("run", config_path, corpora, *STEPS, code=78).stderr


def test_what_pretraining_refuses_is_known_before_text_is_tokenized(config_path: Path, electra: Electra) -> None:
    said = electra(
        "run", config_path, "run.name=early", "train.spike_rollbacks=2", "train.spike_threshold=null", code=78
    )
    assert "train.spike_threshold=null none is found; set a" in said.stderr and "tokenize: " not in said.stderr
    assert not (config_path.parent / "out/runs/early/tokenize/stage.json").exists()


def test_execution_keys_change_nothing(done: Path, electra: Electra) -> None:
    said = electra("run", done, "run.name=chain", *STEPS, "train.log_every=3", "data.num_workers=2").stderr
    assert "pretrain: up to date" in said


def test_force_moves_old_outputs_aside(done: Path, electra: Electra) -> None:
    electra("run", done, "run.name=forced", *STEPS)
    electra("run", done, "run.name=forced", *STEPS, "optimizer.lr=1e-3", "--force", "pretrain")
    folder = done.parent / "out" / "runs" / "forced"
    rates = [[entry["train/learning_rate"] for entry in map(json.loads, path.read_text().splitlines())]
             for path in (folder / "pretrain.aside-1/journal.jsonl", folder / "pretrain/journal.jsonl")]  # fmt: skip
    assert rates[1] == [2 * rate for rate in rates[0]]


def test_fork_starts_from_the_parents_checkpoint(done: Path, electra: Electra) -> None:
    fork = ["run.name=fork", "run.fork_from=chain@2", "optimizer.lr=1e-4"]
    said = electra("run", done, *fork, *STEPS).stderr
    assert "restored step 2 from" in said
    parent, child = (read_journal(done.parent / "out", name) for name in ("chain", "fork"))
    assert [entry["step"] for entry in child] == [1, 2, 3, 4]
    assert child[:2] == parent[:2]
    assert child[3]["train/learning_rate"] == pytest.approx(parent[3]["train/learning_rate"] / 5)
    record = json.loads((done.parent / "out/runs/fork/pretrain/stage.json").read_text())
    assert record["inputs"]["science"]["run.fork_from"] == "chain@2"


def test_a_fork_counts_its_parents_steps_as_they_were(
    done: Path, electra: Electra, write_task: Callable[[str], Path]
) -> None:
    """With rows half as long and half as many of them: a quarter of the tokens a step, also in evaluation."""
    out = done.parent / "out"
    parent = read_journal(out, "chain")
    rows = ["data.sequence_length=16", "train.global_batch_size=4", "train.micro_batch_size=4"]
    task = [f'evaluate.tasks=["{write_task("forked")}"]', "evaluate.epochs=1"]
    electra("run", done, "run.name=fork4", "run.fork_from=chain@2", *STEPS, *rows, *task)
    child = read_journal(out, "fork4")
    assert child[:2] == parent[:2]
    for count in ("tokens", "flops", "flops_paper"):
        steps = [b[count] - a[count] for a, b in pairwise(child[1:])]
        assert steps == pytest.approx([steps[0]] * len(steps))
        assert 0 < steps[0] < parent[0][count] / 2, count
    results = json.loads((out / "runs/fork4/evaluate/results.json").read_text())
    assert (results["flops"], results["flops_paper"]) == (child[-1]["flops"], child[-1]["flops_paper"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_layers=1"], "is of another model: discriminator.layers.1"),
        (["model.hidden_size=16", "model.feed_forward_size=32"], "is of another model"),
        (["train.steps=2"], "leaves nothing to train"),
    ],
)
def test_fork_of_another_model_is_refused(done: Path, electra: Electra, overrides: list[str], message: str) -> None:
    name = f"run.name=fork-{overrides[0].replace('.', '-').replace('=', '-')}"
    refused = electra("run", done, name, "run.fork_from=chain@2", *STEPS, *overrides, code=78).stderr
    assert message in refused


def test_fork_with_another_tokenizer_is_refused_before_its_text_is_tokenized(done: Path, electra: Electra) -> None:
    """The message names what to set: with that the same command goes on."""
    fork = ["run", done, "run.name=fork-tokenizer", "run.fork_from=chain@2", *STEPS, "tokenizer.lowercase=false"]
    refused = electra(*fork, code=78).stderr
    assert "run.fork_from=chain@2: that run has another tokenizer" in refused
    assert len(list((done.parent / "out/shards").iterdir())) == 1
    remedy = next(word for word in refused.split() if word.startswith("tokenizer.path="))
    assert "restored step 2 from" in electra(*fork, remedy).stderr


def test_evaluating_another_model_than_was_pretrained_is_refused(done: Path, electra: Electra, write_task) -> None:
    task = f'evaluate.tasks=["{write_task()}"]'
    refused = electra("evaluate", done, "run.name=chain", *STEPS, task, "model.hidden_layers=1", code=78).stderr
    assert "model.hidden_layers: 2 -> 1" in refused


def test_lost_final_checkpoint_is_trained_again(done: Path, electra: Electra) -> None:
    import shutil

    electra("run", done, "run.name=lost", *STEPS)
    shutil.rmtree(done.parent / "out/runs/lost/pretrain/checkpoints/step_00000004")
    assert plan_of(electra, done, "run.name=lost", *STEPS)["pretrain"] == "resume  from step 2 of 4"
    electra("run", done, "run.name=lost", *STEPS)
    assert len(read_journal(done.parent / "out", "lost")) == 4


def test_checkpoints_that_have_vanished_are_no_fresh_start(done: Path, electra: Electra) -> None:
    arguments = ["pretrain", done, "run.name=vanished", *STEPS]
    electra("run", *arguments[1:])
    folder = done.parent / "out/runs/vanished/pretrain"
    journal = (folder / "journal.jsonl").read_bytes()
    (folder / "checkpoints").rename(folder / "elsewhere")
    refused = electra(*arguments, code=65).stderr
    assert "holds no checkpoint although this run has had some" in refused and "--force pretrain" in refused
    (folder / "stage.json").write_text((folder / "stage.json").read_text().replace('"done"', '"stopped"'))
    assert "holds no checkpoint" in electra(*arguments, code=65).stderr  # nor of a run that was under way
    assert (folder / "journal.jsonl").read_bytes() == journal
    (folder / "elsewhere").rename(folder / "checkpoints")
    electra(*arguments)
    assert len(read_journal(done.parent / "out", "vanished")) == 4


def test_force_of_a_stage_that_does_not_run(done: Path, electra: Electra) -> None:
    refused = electra(
        "run", done, "run.name=chain", *STEPS, "--until", "tokenize", "--force", "pretrain", code=64
    ).stderr
    assert "not among those to run" in refused
    assert "forced" in plan_of(electra, done, "run.name=chain", *STEPS, "--force", "pretrain")["pretrain"]


def test_status_of_a_killed_run(done: Path, electra: Electra) -> None:
    electra("run", done, "run.name=status", *STEPS)
    record = done.parent / "out/runs/status/pretrain/stage.json"
    record.write_text(record.read_text().replace('"state": "done"', '"state": "running"'))
    (done.parent / "out/runs/status/mlflow.json").write_text("{")
    status = json.loads(electra("status", done, "run.name=status", *STEPS, "--json").stdout)
    assert status["stages"]["pretrain"]["state"] == "killed"
    assert "evaluate" not in status["rerun"]
    assert "pretrain  killed" in electra("status", done, "run.name=status", *STEPS).stdout


def test_fork_from_a_step_without_checkpoint(done: Path, electra: Electra) -> None:
    refused = electra("run", done, "run.name=fork3", "run.fork_from=chain@3", *STEPS, code=78).stderr
    assert "no checkpoint of step 3; there are: 2, 4" in refused


def test_single_stages_in_separate_commands(config_path: Path, electra: Electra) -> None:
    assert "no finished tokenize stage" in electra("pretrain", config_path, "--check", code=78).stderr
    assert "pretrain cannot start" in electra("pretrain", config_path, *STEPS, code=78).stderr
    electra("tokenize", config_path)
    electra("pretrain", config_path, "--check")
    electra("pretrain", config_path, *STEPS)
    status = json.loads(electra("status", config_path, *STEPS, "--json").stdout)
    assert status["stages"]["pretrain"]["state"] == "done"
    assert status["stages"]["pretrain"]["step"] == 4
    assert status["rerun"]["pretrain"] == "reuse: up to date, at step 4"


def test_two_commands_on_one_run(done: Path, electra: Electra) -> None:
    with run_lock(load_config(done, ("run.name=chain",))):
        assert "in use by another process" in electra("run", done, "run.name=chain", *STEPS, code=78).stderr


def test_finished_shards_serve_when_the_text_is_gone(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    text = tmp_path / "gone.txt"
    text.write_text((config_path.parent / "tiny.yaml").read_text() * 40)
    text.write_text("\n\n".join(f"line {i} some words here and there {i * 7}" for i in range(3000)))
    corpora = f'data.corpora=[{{"name": "gone", "path": "{text}"}}]'
    electra("tokenize", config_path, corpora, "tokenizer.vocab_size=60")
    text.unlink()
    said = electra("run", config_path, corpora, "tokenizer.vocab_size=60", *STEPS).stderr
    assert "the text was not compared" in said
    assert "pretrain: done" in said


def test_a_run_goes_on_at_another_path_without_its_text(electra: Electra, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    steps = ["train.steps=6", "train.checkpoint_every=2"]  # what is saved at step 4 waits for the first one's write
    here.mkdir()
    (here / "text.txt").write_text(make_text(300))
    (here / "tiny.yaml").write_text(TINY.format(run_dir="out", corpus="text.txt"))
    electra("tokenize", here / "tiny.yaml")
    lost = {"ELECTRA_FAULT": "kill@step=5"}
    electra("pretrain", here / "tiny.yaml", *steps, "launch.restarts=0", code=1, **lost)
    here.rename(there)
    (there / "text.txt").unlink()
    electra("sync", there / "tiny.yaml", *steps, "tracking.uri=auto")
    plan = plan_of(electra, there / "tiny.yaml", *steps)
    assert plan["pretrain"].startswith("resume  from step")
    assert plan["tokenize"].startswith("reuse   up to date; the text was not compared")
    electra("export", there / "out/runs/tiny", tmp_path / "exported", "--license", "mit")
    assert " documents, " in (tmp_path / "exported/discriminator/README.md").read_text()
    assert not here.exists()


def test_the_last_seconds_of_a_lost_run_went_into_the_failure(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_path)
    monkeypatch.setenv("ELECTRA_ALLOCATION", f"4711-0@{time.time()}")

    def launch(*_: object) -> int:
        Ledger(stage_folder(config, "pretrain"), 1).write()
        return 7

    monkeypatch.setattr(chain, "launch", launch)
    with pytest.raises(ElectraError):
        chain._run_here(config, "pretrain", chain.Decision("pretrain", "run", "", {}), [], 0.0)
    (attempt,) = read_attempts(stage_folder(config, "pretrain"))
    assert attempt.seconds["down"] > 0 and attempt.seconds["drain"] == 0


class Element:
    """One of the elements of an array that evaluate: what `execute_stage` sees of the others is their signs of life."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch):
        self._config, self._monkeypatch = config, monkeypatch

    def ends(self, how: bool | Exception) -> str:
        """The state in the record after this element's end."""

        def story(*_: object) -> bool:
            if isinstance(how, Exception):
                raise how
            return how

        self._monkeypatch.setitem(chain._STORIES, "evaluate", story)
        with run_lock(self._config, shared=True), suppress(ElectraError):
            chain.execute_stage(self._config, chain.Decision("evaluate", "run", "", {}), Process())
        record = read_record(self._config, "evaluate")
        assert record
        return record.state

    def is_alive_to_mlflow(self) -> bool:
        """What the shipper's last pass says when this element has left."""
        said: list[bool] = []
        mirror = SimpleNamespace(mirror=lambda owner_alive: said.append(owner_alive))
        self._monkeypatch.setattr(shipper, "_connect", lambda *_: mirror)
        self._monkeypatch.setattr(shipper, "_listen", lambda _: "end")
        with run_lock(self._config, shared=True):
            assert shipper._ship(self._config.run_folder, "", "", os.getpid()) == 0
        return said[0]


@pytest.mark.parametrize("how", [StoppedEarly(""), ElectraError(""), False])
def test_the_last_element_of_an_array_ends_the_record(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, how: bool | Exception
) -> None:
    config = load_config(config_path)
    element = Element(config, monkeypatch)
    config.run_folder.mkdir(parents=True)
    other = config.run_folder / ".at_work_shared.node08~7.tmp"
    other.touch()
    assert element.ends(how) == "running"
    assert element.is_alive_to_mlflow()
    other.unlink()
    assert not element.is_alive_to_mlflow()
    assert element.ends(how) == ("failed" if type(how) is ElectraError else "stopped")
    other.touch()  # in another stage of the run, or on its way out
    assert not element.is_alive_to_mlflow()
