"""The evaluate stage by its commands: units that are done once, results.json, the options."""

import json
from pathlib import Path

import pytest

from tests.conftest import Electra


@pytest.fixture(scope="module")
def pretrained(shared_config: Path, electra: Electra) -> Path:
    electra("run", shared_config, "run.name=scored", "train.steps=4", "--until", "pretrain")
    return shared_config


def test_tasks_are_learned_scored_and_done_once(pretrained: Path, electra: Electra, write_task) -> None:
    tasks = f'evaluate.tasks=["{write_task()}", "{write_task("paired", "pair")}"]'
    recipe = ["run.name=scored", "train.steps=4", tasks, "evaluate.epochs=12", "evaluate.lr=2e-3"]
    said = electra("run", pretrained, *recipe).stderr
    assert "4 of 4 units to do" in said
    folder = pretrained.parent / "out/runs/scored/evaluate"
    results = json.loads((folder / "results.json").read_text())
    assert {"checkpoint", "tasks", "glue_average"} <= set(results)
    for task in ("first_word", "paired"):
        values = results["tasks"][task]["accuracy"]["values"]
        assert len(values) == 2
        assert min(values) > 0.9
        assert set(results["tasks"][task]) == {"accuracy", "f1"}
    predictions = [json.loads(line) for line in (folder / "step_00000004/paired/seed_2/predictions.jsonl").open()]
    assert [row["id"] for row in predictions] == [f"dev-{i}" for i in range(16)]
    assert set(predictions[0]) == {"id", "label", "prediction"}

    assert "evaluate: up to date" in electra("run", pretrained, *recipe).stderr
    assert "2 of 6 units to do" in electra("run", pretrained, *recipe, "evaluate.seeds=3").stderr
    (folder / "step_00000004/paired/seed_1/result.json").unlink()
    record = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(record | {"state": "failed"}))
    again = electra("run", pretrained, *recipe, "evaluate.seeds=3", "launch.processes=2").stderr
    assert "1 of 6 units to do" in again
    redone = json.loads((folder / "results.json").read_text())["tasks"]["paired"]["accuracy"]["values"]
    assert len(redone) == 3
    assert redone[:2] == results["tasks"]["paired"]["accuracy"]["values"]
    refused = electra("run", pretrained, *recipe, "evaluate.seeds=3", "evaluate.lr=1e-3", code=78).stderr
    assert "evaluate.lr: 0.002 -> 0.001" in refused
    assert (folder / "results.md").read_text().count("first_word") >= 1
    assert (folder / "scores_and_flops.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "step_00000004/results.json").read_text()) == json.loads(
        (folder / "results.json").read_text()
    )
