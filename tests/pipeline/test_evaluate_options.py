"""Grids, MNLI as a start, several checkpoints, failing units, MLflow's children, and runs side by side."""

import json
from pathlib import Path
from textwrap import dedent

import pytest
from mlflow import MlflowClient

from tests.conftest import Electra

FAST = ("evaluate.epochs=2", "evaluate.lr=2e-3")
AFRESH = ("--force", "evaluate")  # other recipes have results under the same name


@pytest.fixture(scope="module")
def trained(shared_config: Path, electra: Electra) -> list[str]:
    """Arguments of a run with checkpoints at steps 5, 10 and 15."""
    arguments = [str(shared_config), "run.name=options", "train.steps=15", "train.held_out_rows=0"]
    electra("run", *arguments, "--until", "pretrain")
    return arguments


def results_of(arguments: list[str], name: str = "options") -> dict:
    return json.loads((Path(arguments[0]).parent / f"out/runs/{name}/evaluate/results.json").read_text())


def test_the_best_of_a_grid_is_reported_as_such(trained: list[str], electra: Electra, write_task) -> None:
    task = f'evaluate.tasks=["{write_task("gridded")}"]'
    electra("run", *trained, task, "evaluate.epochs=16", "evaluate.grid_lr=[1e-6,2e-3]", *AFRESH)
    results = results_of(trained)
    points = results["grid"]["gridded"]["points"]
    assert [(point["lr"], point["seeds"]) for point in points] == [(1e-6, 2), (2e-3, 2)]
    chosen = points[results["grid"]["gridded"]["chosen"]]
    assert (chosen["lr"], chosen["score"]) == (2e-3, results["tasks"]["gridded"]["accuracy"]["median"])
    assert points[0]["score"] < chosen["score"]
    folder = Path(trained[0]).parent / "out/runs/options/evaluate"
    assert "best of a grid of 2 points" in (folder / "results.md").read_text()
    assert len(list(folder.glob("step_00000015/gridded/lr_0.002-layer_decay_0.8/seed_*/result.json"))) == 2


def test_several_checkpoints_and_runs_lie_side_by_side(
    trained: list[str], electra: Electra, write_task, tmp_path: Path
) -> None:
    task = f'evaluate.tasks=["{write_task("curve")}"]'
    said = electra("run", *trained, task, *FAST, "evaluate.more_checkpoints=all", *AFRESH).stderr
    assert "step_00000005" in said
    run = Path(trained[0]).parent / "out/runs/options"
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("evaluate/step_*/results.json")}
    assert set(found) == {"step_00000005", "step_00000010", "step_00000015"}
    flops = [found[name]["flops_paper"] for name in sorted(found)]
    assert flops[0] * 3 == pytest.approx(flops[2])
    assert results_of(trained)["step"] == 15
    shown = electra("scores", run, "--out", tmp_path / "plots").stdout
    assert shown.count("| options, step ") == 3
    assert "curve accuracy" in shown
    assert (tmp_path / "plots/scores_and_flops.png").stat().st_size > 10_000
    assert "no results in it" in electra("scores", tmp_path, code=78).stderr


def test_what_cannot_start_moves_no_results_aside(trained: list[str], electra: Electra, write_task) -> None:
    task = f'evaluate.tasks=["{write_task("kept")}"]'
    electra("run", *trained, task, *FAST, *AFRESH)
    run = Path(trained[0]).parent / "out/runs/options"
    before = sorted(run.glob("evaluate*"))
    for command, forced in (("run", AFRESH), ("evaluate", ["--force"])):
        refused = electra(command, *trained, task, *FAST, "optimizer.lr=1e-3", *forced, code=78).stderr
        assert "nothing was touched" in refused
        electra(command, *trained, 'evaluate.tasks=["absent"]', *FAST, *forced, code=78)
        assert sorted(run.glob("evaluate*")) == before
    assert results_of(trained)["score"]["kept"] == "accuracy"


def test_tasks_start_from_mnli_where_that_is_asked_for(
    trained: list[str], electra: Electra, write_task, tmp_path: Path
) -> None:
    """Three epochs suffice for the second task after the first, which the same word decides, and not without it."""
    mnli, rte = write_task("mnli"), write_task("rte")
    mnli.write_text(mnli.read_text() + "recipe: {epochs: 16}\n")
    rte.write_text(rte.read_text() + "mnli_init: true\nrecipe: {epochs: 3}\n")
    tasks = f'evaluate.tasks=["{rte}", "{mnli}"]'
    arguments = [
        *trained, f"run.dir={tmp_path / 'out'}", tasks, "evaluate.lr=2e-3", "evaluate.epochs=null",
        "evaluate.mnli_init=true", "launch.processes=2",
    ]  # fmt: skip
    exported = tmp_path / "exported"
    electra("export", Path(trained[0]).parent / "out/runs/options", exported)
    arguments.append(f"evaluate.checkpoint={exported}")
    alone = electra("evaluate", *arguments[:-3], f'evaluate.tasks=["{rte}"]', arguments[-1], "evaluate.mnli_init=true",
                    code=78).stderr  # fmt: skip
    assert "mnli is not in evaluate.tasks; add it" in alone
    electra("evaluate", *arguments)
    folder = tmp_path / "out/runs/options/evaluate"
    results = json.loads((folder / "results.json").read_text())
    assert results["recipes"]["rte"]["init_from"] == "mnli"
    assert len(list(folder.glob("*/mnli/seed_*/weights.safetensors"))) == 2
    assert not list(folder.glob("*/rte/seed_*/weights.safetensors"))
    with_start = results["tasks"]["rte"]
    electra("evaluate", *arguments, "evaluate.mnli_init=false", "run.name=without")
    without = json.loads((tmp_path / "out/runs/without/evaluate/results.json").read_text())["tasks"]
    assert without["mnli"] == results["tasks"]["mnli"]
    assert with_start["accuracy"]["median"] > without["rte"]["accuracy"]["median"]
    refused = electra("evaluate", *arguments, "evaluate.grid_lr=[1e-3]", "run.name=third", code=78).stderr
    assert "evaluate.mnli_init=true with a grid" in refused


def test_a_unit_that_fails_does_not_stop_the_rest(trained: list[str], electra: Electra, write_task) -> None:
    fine, wild = write_task("fine"), write_task("wild")
    wild.write_text(wild.read_text() + "recipe: {lr: 1.0e+38, warmup_fraction: 0}\n")
    arguments = [*trained, "run.name=options", f'evaluate.tasks=["{wild}", "{fine}"]', "evaluate.epochs=2"]
    failed = electra("run", *arguments, *AFRESH, code=1).stderr
    assert "2 of 4 units done, the others failed:" in failed
    assert "wild, seed 1 and 1 more: gradients are not finite after" in failed
    folder = Path(trained[0]).parent / "out/runs/options/evaluate"
    so_far = json.loads((folder / "results_so_far.json").read_text())
    assert list(so_far["tasks"]) == ["fine"]
    assert [about["task"] for about in so_far["failed"]] == ["wild", "wild"]
    status = electra("status", *arguments).stdout
    assert "2 of 4 units" in status
    wild.write_text(wild.read_text().replace("1.0e+38", "1.0e-4"))
    assert "2 of 4 units to do" in electra("evaluate", *arguments).stderr
    assert set(results_of(trained)["tasks"]) == {"fine", "wild"}


def test_the_recipe_stays_that_of_the_units_that_are_done(trained: list[str], electra: Electra, write_task) -> None:
    """Also where there are no results yet: a unit failed, or the stage was stopped."""
    fine, wild = write_task("fine"), write_task("wild")
    wild.write_text(wild.read_text() + "recipe: {lr: 1.0e+38, warmup_fraction: 0}\n")
    tasks = f'evaluate.tasks=["{wild}", "{fine}"]'
    electra("run", *trained, "run.name=options", tasks, "evaluate.epochs=2", *AFRESH, code=1)
    folder = Path(trained[0]).parent / "out/runs/options/evaluate"
    assert not (folder / "results.json").exists()
    results = {path: path.read_bytes() for path in folder.glob("*/fine/seed_*/result.json")}
    refused = electra("evaluate", *trained, "run.name=options", tasks, "evaluate.epochs=1", code=78).stderr
    assert "evaluate.epochs: 2 -> 1" in refused and "nothing was touched" in refused
    assert len(results) == 2 and all(path.read_bytes() == content for path, content in results.items())


def test_a_checkpoint_whose_units_are_done_has_results_though_others_failed(
    trained: list[str], electra: Electra, write_task
) -> None:
    ill_fated = """
        from pipeline.evaluation.finetune import DivergedError
        from pipeline.evaluation.runner import Runner
        run = Runner.run
        def fail(self, unit, should_stop):
            if unit.seed in (2, 3) and unit.pretrained.step == 10:
                raise DivergedError("it diverged")
            return run(self, unit, should_stop)
        Runner.run = fail
    """
    arguments = [*trained, f'evaluate.tasks=["{write_task("some")}"]', *FAST, "evaluate.more_checkpoints=[10]"]
    failed = electra("run", *arguments, *AFRESH, code=1, first=dedent(ill_fated)).stderr
    assert "3 of 4 units done, the others failed:\n  step_00000010, some, seed 2: it diverged" in failed
    folder = Path(trained[0]).parent / "out/runs/options/evaluate"
    assert [path.parent.name for path in folder.glob("*/results.json")] == ["step_00000015"]
    electra("run", *arguments)
    assert len(list(folder.glob("*/results.json"))) == 2 and (folder / "results.json").exists()
    electra("run", *arguments, "evaluate.seeds=3", code=1, first=dedent(ill_fated))
    assert sorted(path.name for path in folder.glob("step_00000010/results*")) == [
        "results.before-1.json", "results.before-1.md",
    ]  # fmt: skip


def test_an_element_of_an_array_that_can_do_no_unit_does_not_end_well(
    trained: list[str], electra: Electra, write_task
) -> None:
    sick = """
        from pipeline.evaluation.runner import Runner
        def fail(*_):
            raise OSError("the GPU has fallen off the bus")
        Runner.run = fail
    """
    element = """
        import os
        os.environ.update(SLURM_ARRAY_TASK_COUNT="2", SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_MAX="1",
                          SLURM_ARRAY_TASK_ID="1")
    """
    arguments = [*trained, f'evaluate.tasks=["{write_task("some")}"]', *FAST, "evaluate.seeds=5", *AFRESH]
    ended = electra("run", *arguments, code=1, first=dedent(element) + dedent(sick)).stderr
    assert "0 of 5 units done, and 3 in a row failed here, as if this machine were at fault" in ended
    ended = electra("run", *arguments[:-2], first=dedent(element)).stderr
    assert "5 of 5 units to do" in ended and "evaluate: done" in ended


def test_mlflow_has_a_run_for_each_task_with_its_seeds_as_steps(
    trained: list[str], electra: Electra, write_task, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tasks = f'evaluate.tasks=["{write_task("tracked")}", "{write_task("other", "pair")}"]'
    arguments = [*trained, tasks, *FAST, f"tracking.uri={uri}", "evaluate.seeds=3"]
    electra("run", *arguments, *AFRESH)
    electra("evaluate", *arguments)  # there is nothing to do, and nothing is logged twice
    electra("sync", *arguments)
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = (found for found in client.search_experiments() if found.name == "electra")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    stage, child = runs["options evaluate"], runs["options evaluate tracked"]
    assert child.data.tags["mlflow.parentRunId"] == stage.info.run_id
    assert child.info.status == "FINISHED"
    assert child.data.params["lr"] == "0.002"
    history = client.get_metric_history(child.info.run_id, "eval/tracked_accuracy")
    summary = results_of(trained)["tasks"]["tracked"]["accuracy"]
    assert [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.step)] == list(
        zip([1, 2, 3], summary["values"], strict=True)
    )
    name = "eval/tracked_accuracy"
    assert stage.data.metrics[name] == summary["median"]
    assert stage.data.metrics[f"{name}_std"] == summary["std"]
    assert [stage.data.metrics[f"{name}_ci95_{side}"] for side in ("low", "high")] == summary["ci95"]
    assert {"options evaluate other", "options pretrain", "options"} <= set(runs)
