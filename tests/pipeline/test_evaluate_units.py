"""Units through kills, stops and failures: each done once, with the results of a run that nothing happened to."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Electra
from tests.forking import Forked

TASKS, SEEDS = ("first_word", "paired", "tags"), 3


def write_tagging_task(folder: Path) -> Path:
    """Words whose tag their first letter decides."""
    draw = random.Random(5)
    for split, count in (("train", 40), ("dev", 12)):
        sentences = []
        for _ in range(count):
            words = draw.choices(["bada", "zozo", "fi", "ku", "mere"], k=draw.randint(2, 9))
            sentences.append("".join(f"{word} {'B-Z' if word[0] == 'z' else 'O'}\n" for word in words))
        (folder / f"tags_{split}.txt").write_text("\n".join(sentences))
    path = folder / "tags.yaml"
    path.write_text(
        "name: tags\nkind: tagging\ntrain: tags_train.txt\ndev: tags_dev.txt\ntext: ['0']\nlabel: '-1'\n"
        "metrics: [span_f1, accuracy]\ntag_scheme: bioes\n"
    )
    return path


@pytest.fixture
def matrix(shared_config: Path, electra: Electra, write_task, tmp_path: Path) -> list[str]:
    """Arguments of an evaluation of three tasks with three seeds."""
    electra("run", shared_config, "run.name=source", "train.steps=2", "train.held_out_rows=0", "--until", "pretrain")
    exported = tmp_path / "exported"
    electra("export", shared_config.parent / "out/runs/source", exported)
    tasks = [write_task(), write_task("paired", "pair"), write_tagging_task(tmp_path)]
    return [
        str(shared_config), f"run.dir={tmp_path / 'out'}", f"evaluate.checkpoint={exported}",
        f"evaluate.tasks={json.dumps(list(map(str, tasks)))}", f"evaluate.seeds={SEEDS}", "evaluate.epochs=6",
        "evaluate.lr=2e-3",
    ]  # fmt: skip


def results_of(run: Path) -> dict:
    return json.loads((run / "evaluate/results.json").read_text())


def done(run: Path) -> dict[Path, int]:
    """Finished units and when they were finished."""
    return {path: path.stat().st_mtime_ns for path in run.glob("evaluate/*/*/seed_*/result.json")}


def test_a_matrix_that_is_killed_twice_does_every_unit_once(
    matrix: list[str], electra: Electra, start_electra: Callable[..., Forked], tmp_path: Path
) -> None:
    electra("evaluate", *matrix, "run.name=unbroken")
    run, killed = tmp_path / "out/runs/killed", ("evaluate", *matrix, "run.name=killed", "launch.processes=2")
    finished: dict[Path, int] = {}
    draw = random.Random(5)
    for number in sorted(draw.sample(range(1, 5), 2)):
        process = start_electra(*killed)
        while len(done(run)) < number:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(draw.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert number <= len(done(run)) < len(TASKS) * SEEDS
        assert finished.items() <= done(run).items()
        finished = done(run)
    electra(*killed)
    assert finished.items() <= done(run).items()
    assert len(done(run)) == len(TASKS) * SEEDS
    log = (run / "evaluate/log.txt").read_text()
    for task in TASKS:
        for seed in range(1, SEEDS + 1):
            assert log.count(f"{task}, seed {seed}: ") <= 1  # 0 where the kill came between the result and the line
    unbroken, ours = results_of(tmp_path / "out/runs/unbroken"), results_of(run)
    assert ours["tasks"] == unbroken["tasks"]
    assert set(ours["tasks"]) == set(TASKS)
    for task in TASKS:
        lines = [
            (path / "evaluate").glob(f"*/{task}/seed_2/predictions.jsonl")
            for path in (run, tmp_path / "out/runs/unbroken")
        ]
        ours_lines, unbroken_lines = (next(files).read_text() for files in lines)
        assert ours_lines == unbroken_lines
    assert not [path for path in run.glob("evaluate/**/*") if path.name == "claim" or path.name.endswith(".tmp")]
