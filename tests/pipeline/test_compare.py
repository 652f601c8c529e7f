"""Comparing runs: differences, values at equal FLOPs, thinning, permutation tests; from folders written here."""

import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import ttest_ind

from pipeline.comparison.curves import Curves, columns_of, largest_common, thin
from pipeline.comparison.differences import find_differences, list_of
from pipeline.comparison.files import write_files
from pipeline.comparison.find import find_runs
from pipeline.comparison.measures import measure, show
from pipeline.comparison.page import render_page
from pipeline.comparison.report import make_report, to_json
from pipeline.comparison.run import Run, distinct_names, settings_of
from pipeline.comparison.seeds import as_columns
from pipeline.comparison.significance import compare_scores, holm, permutation_p
from pipeline.comparison.text import format_report
from pipeline.config_file import dump_yaml, known_keys, load_config
from pipeline.errors import ConfigError, DamagedError, UsageError
from pipeline.evaluation.scores import summarize
from pipeline.journal import stream_entries
from tests.conftest import Electra, clean_environment

EMPTY = Curves({axis: np.empty(0) for axis in ("step", "tokens", "flops", "wall_s")}, {})


def run_with(settings: dict[str, str], numerics: dict[str, str] | None = None, name: str = "run") -> Run:
    return Run(name, f"/{name}", settings, numerics or {}, EMPTY, {})


def settings(config_path: Path, *overrides: str) -> dict[str, str]:
    return settings_of(load_config(config_path, overrides).flat())


def differences(config_path: Path, *of_runs: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str | None]]:
    """Own differences with their lists; following ones with their causes."""
    found = find_differences([run_with(settings(config_path, *overrides)) for overrides in of_runs])
    return {each.key: each.list for each in found.own}, {each.key: each.follows_from for each in found.following}


def entry(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A line of a journal, of 100 tokens and 1e6 FLOPs a step."""
    progress = {"step": step, "tokens": 100 * step, "flops": 1e6 * step, "flops_paper": 1e5 * step, "wall_s": step / 2}
    return progress | {"train/total_loss": loss} | more


def write_run(config_path: Path, name: str, journal: list[dict[str, Any]], *overrides: str) -> Path:
    """A run's folder as the program leaves it, without stages."""
    config = load_config(config_path, (f"run.name={name}", *overrides))
    (config.run_folder / "pretrain").mkdir(parents=True)
    (config.run_folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in journal)
    (config.run_folder / "pretrain/journal.jsonl").write_text(lines, encoding="utf-8")
    return config.run_folder


def results_of(name: str, tasks: dict[str, list[float]], **recipe: Any) -> dict[str, Any]:
    return {
        "checkpoint": "/c", "run": name, "step": 10, "flops_paper": 1e6, "glue_average": None,
        "tasks": {task: {"accuracy": summarize(values), "f1": summarize(values)} for task, values in tasks.items()},
        "score": dict.fromkeys(tasks, "accuracy"), "recipes": {task: {"lr": 3e-4} | recipe for task in tasks},
    }  # fmt: skip


def scored(name: str, tasks: dict[str, list[float]], **recipe: Any) -> Run:
    run = run_with({}, name=name)
    run.results = results_of(name, tasks, **recipe)
    return run


def test_differences_are_the_keys_that_were_set_in_the_order_of_the_lists(config_path: Path) -> None:
    found = differences(
        config_path,
        ("run.name=a", "train.log_every=2"),
        ("run.name=b", "optimizer.lr=0.01", "train.micro_batch_size=4", "objective.name=electra_15"),
    )
    assert list(found[0].items()) == [
        ("objective.name", "science"), ("optimizer.lr", "science"), ("train.micro_batch_size", "numerics"),
        ("train.log_every", "execution"),
    ]  # fmt: skip
    assert found[1] == {}
    assert differences(config_path, ("run.name=a",), ("run.name=b",)) == ({}, {})


def test_what_follows_from_a_key_is_not_a_difference_of_its_own(config_path: Path) -> None:
    plain = config_path.read_text().replace("hidden_layers: 2, hidden_size: 32, attention_heads: 2,", "")
    config_path.write_text(plain.replace("feed_forward_size: 64,", "").replace("steps: 20", "flops: 1e10"))
    own, following = differences(config_path, (), ("model.size=small",))
    assert own == {"model.size": "science"}
    assert following["model.hidden_size"] == "model.size"
    assert following["train.steps"] == "train.flops"
    assert "model.embedding_size" not in following  # set in the file for both
    own, following = differences(config_path, (), ("model.size=small", "model.hidden_size=128"))
    assert "model.hidden_size" not in own | following  # as for the other size
    own, following = differences(config_path, (), ("model.size=small", "model.hidden_size=64"))
    assert own == {"model.size": "science", "model.hidden_size": "science"}
    own, following = differences(config_path, (), ("recipe=released",))
    assert own == {"recipe": "science"}
    assert following == {"objective.position_sampling": "recipe", "objective.loss_normalization": "recipe"}
    sharing = differences(config_path, (), ("objective.name=mlm",))
    assert sharing[0] == {"objective.name": "science"}
    assert sharing[1] == {"objective.sharing": "objective.name", "train.steps": "train.flops"}
    own, following = differences(config_path, ("objective.sharing=none",), ("objective.name=all_tokens_mlm",))
    assert own == {"objective.name": "science", "objective.sharing": "science"}


def test_steps_differ_by_themselves_without_a_budget(config_path: Path) -> None:
    assert differences(config_path, (), ("train.steps=30",)) == ({"train.steps": "science"}, {})


def test_corpora_are_compared_field_by_field(config_path: Path) -> None:
    corpora = [
        [{"name": "books", "path": path, "weight": weight}, {"name": "web", "path": "/web"}]
        for path, weight in (("/here", 1.0), ("/there", 2.0))
    ]
    own, _ = differences(config_path, *((f"data.corpora={json.dumps(value)}",) for value in corpora))
    assert own == {"data.corpora.books.weight": "science", "data.corpora.books.path": "execution"}


def test_automatic_keys_are_compared_by_what_was_chosen() -> None:
    auto, eight = ({"launch.processes": value, "kernels.backend": "auto"} for value in ("auto", "8"))
    chosen = {"world_size": "8", "kernels.attention": "torch"}
    found = find_differences([run_with(auto, chosen), run_with(eight, chosen)])
    assert found.own == ()
    found = find_differences([run_with(auto, chosen | {"world_size": "2"}), run_with(eight, chosen)])
    assert [(each.key, each.values) for each in found.own] == [("launch.processes", ("2", "8"))]
    found = find_differences([run_with(auto, chosen), run_with(auto, chosen | {"kernels.attention": "triton"})])
    assert [each.key for each in found.own] == ["kernels.attention"]
    backend = {"launch.processes": "8", "kernels.backend": "triton"}
    found = find_differences([run_with(eight, chosen), run_with(backend, chosen | {"kernels.attention": "triton"})])
    assert [each.key for each in found.own] == ["kernels.backend"]
    assert [each.follows_from for each in found.following] == ["kernels.backend"]
    found = find_differences([run_with(auto, chosen), run_with(eight)])  # the second has not started
    assert [each.values for each in found.own] == [("auto", "8")]


def test_deepspeed_files_are_compared_by_what_they_say(tmp_path: Path) -> None:
    def keys(*paths: object, stages: tuple[str, ...] = ("1", "1")) -> list[str]:
        runs = [run_with({"deepspeed.config": str(path)}, {"zero_stage": stage})
                for path, stage in zip(paths, stages, strict=True)]  # fmt: skip
        return [each.key for each in find_differences(runs).own]

    files = []
    for folder, text in (("a", '{"zero_optimization": {"stage": 1}}'), ("b", '{"zero_optimization":{"stage":1}}'),
                         ("c", '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 9}}')):  # fmt: skip
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "zero1.json")
        files[-1].write_text(text)
    assert keys(files[0], files[1]) == []
    assert keys(files[0], files[2]) == ["deepspeed.config"]
    assert keys("/elsewhere/zero1.json", files[0]) == []  # of another machine: by name and stage
    assert keys("/elsewhere/zero1.json", "/there/zero2.json", stages=("1", "2")) == ["deepspeed.config"]
    assert keys("/elsewhere/own.json", "/there/own.json", stages=("1", "2")) == ["deepspeed.config"]
    unknown = [run_with({"deepspeed.config": f"/{place}/zero1.json"}) for place in "ab"]
    assert [each.key for each in find_differences(unknown).own] == ["deepspeed.config"]


def test_a_key_that_one_run_did_not_record_is_no_difference_but_named() -> None:
    found = find_differences([run_with({"optimizer.lr": "1", "train.new_key": "1"}), run_with({"optimizer.lr": "1"})])
    assert (found.own, found.recorded_by_some) == ((), ("train.new_key",))


def test_every_key_of_the_schema_stands_in_a_list() -> None:
    assert {list_of(key)[0] for key in known_keys()} == {"science", "numerics", "execution"}


def test_journal_columns_and_values_between_lines() -> None:
    curves = columns_of([entry(10, 5.0), entry(20, 4.0, **{"held_out/x": 1.5}), entry(40, None)])  # type: ignore[arg-type]
    assert curves.axes["tokens"].tolist() == [1000, 2000, 4000]
    assert np.array_equal(curves.metrics["held_out/x"], [np.nan, 1.5, np.nan], equal_nan=True)
    assert curves.last("train/total_loss") == 4.0
    assert curves.last("absent") is None
    assert curves.value_at("train/total_loss", "tokens", 1300) == pytest.approx(5.0 + 0.3 * (4.0 - 5.0))
    assert curves.value_at("train/total_loss", "flops", 2e7) == 4.0
    assert curves.value_at("train/total_loss", "tokens", 999) is None
    assert curves.value_at("train/total_loss", "tokens", 2001) is None  # beyond the last line that has it
    assert largest_common([curves, columns_of([entry(7, 1.0)])], "tokens") == 700
    assert largest_common([curves, EMPTY], "tokens") is None


def test_thinning_takes_means_of_consecutive_lines() -> None:
    draw = random.Random(1)
    losses = [draw.gauss(5, 1) for _ in range(1003)]
    curves = columns_of(entry(step, loss) for step, loss in enumerate(losses, 1))
    thinned = thin(curves, "train/total_loss", 100)
    assert (len(thinned.values), thinned.num_lines, thinned.lines_per_point) == (100, 1003, 11)
    borders = [place * 1003 // 100 for place in range(101)]
    for point, (begin, end) in enumerate(itertools.pairwise(borders)):
        assert thinned.values[point] == pytest.approx(statistics.fmean(losses[begin:end]))
        assert thinned.axes["tokens"][point] == pytest.approx(100 * statistics.fmean(range(begin + 1, end + 1)))
    whole = thin(curves, "train/total_loss", 1003)
    assert (whole.values.tolist(), whole.lines_per_point) == (losses, 1)


def test_exact_permutation_test_counts_all_splits() -> None:
    draw = random.Random(2)
    for sizes in ((3, 3), (4, 6), (7, 5)):
        values = [round(draw.random(), 2) for _ in range(sum(sizes))]
        groups = values[: sizes[0]], values[sizes[0] :]
        observed = abs(statistics.fmean(groups[0]) - statistics.fmean(groups[1]))
        far = total = 0
        for chosen in itertools.combinations(range(len(values)), sizes[0]):
            first = [values[place] for place in chosen]
            second = [values[place] for place in range(len(values)) if place not in chosen]
            far += abs(statistics.fmean(first) - statistics.fmean(second)) >= observed - 1e-12
            total += 1
        p, exact = permutation_p(*groups)
        assert exact
        assert p == pytest.approx(far / total)
    assert permutation_p([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])[0] == pytest.approx(2 / math.comb(6, 3))


def test_large_permutation_test_is_sampled_and_the_same_each_time() -> None:
    first, second = [0.800 + place / 1000 for place in range(20)], [0.804 + place / 1000 for place in range(20)]
    p, exact = permutation_p(first, second)
    assert not exact
    assert p == permutation_p(first, second)[0]
    assert p == pytest.approx(ttest_ind(first, second)[1], rel=0.1)  # which assumes more, and is near for 20


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 4, 3, 2, 1 times; rising
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_scores_are_tested_where_they_are_of_the_same_task() -> None:
    low, high = [0.50, 0.52, 0.54, 0.56], [0.60, 0.62, 0.64, 0.66]
    runs = [scored("a", {"rte": low, "cola": low, "few": low[:2]}), scored("b", {"rte": high, "cola": low, "few": low})]
    rows = {row.task: row for row in compare_scores(as_columns(runs))}
    (rte,), (cola,), (few,) = rows["rte"].tests, rows["cola"].tests, rows["few"].tests
    assert rte.difference == pytest.approx(0.1)
    assert rte.p == pytest.approx(2 / math.comb(8, 4))
    assert rte.p_holm == pytest.approx(2 * 2 / math.comb(8, 4))  # of two tests
    assert (cola.p, cola.p_holm) == (1.0, 1.0)
    assert few.p is None
    assert "fewer than 3 seeds" in few.reason
    score = rows["rte"].scores[1]
    assert score
    assert (score.median, score.std) == (pytest.approx(0.63), pytest.approx(statistics.stdev(high)))


def test_scores_of_another_recipe_or_task_file_are_not_tested() -> None:
    values = {"rte": [0.5, 0.6, 0.7]}
    (row,) = compare_scores(as_columns([scored("a", values), scored("b", values, lr=1e-4), scored("c", {})]))
    assert [test.reason for test in row.tests] == ["another recipe: lr", "not done by both"]
    runs = [scored("a", values), scored("b", values)]
    for run, digest in zip(runs, "xy", strict=True):
        run.task_digests = {"rte": digest}
    assert compare_scores(as_columns(runs))[0].tests[0].reason == "another task file or other data"


@pytest.fixture
def folders(config_path: Path) -> list[Path]:
    """Two runs that differ in two keys; the second trained half as long."""
    return [
        write_run(config_path, "long", [entry(step, 10 - step / 10) for step in range(1, 21)]),
        write_run(config_path, "short", [entry(step, 9 - step / 10) for step in range(1, 11)],
                  "optimizer.lr=0.25", "objective.name=mlm"),
    ]  # fmt: skip


def test_measures_at_the_end_and_at_equal_tokens(folders: list[Path]) -> None:
    columns = as_columns(find_runs(list(map(str, folders)), None, "electra"))
    rows = {(row.group, row.name): row.values for row in measure(columns)}
    assert rows["the runs", "tokens"] == (2000, 1000)
    assert rows["the runs", "FLOPs (paper's count)"] == (2e6, 1e6)
    assert rows["the runs", "status"] == ("not started", "not started")
    assert rows["at each run's end", "train/total_loss"] == pytest.approx((8.0, 8.0))
    assert rows["at 1,000 tokens, the most that all have", "train/total_loss"] == pytest.approx((9.0, 8.0))
    assert rows["at 1e+07 FLOPs, the most that all have", "train/total_loss"] == pytest.approx((9.0, 8.0))


def test_the_end_of_a_diverged_run_is_its_last_line(config_path: Path) -> None:
    skipped = "train/skipped_steps"
    healthy = [entry(step, 5.0 - step / 100, **{skipped: 0}) for step in range(1, 61)]
    diverged = [entry(step, 5.0 if step <= 20 else None, **{skipped: max(0, step - 20)})  # type: ignore[arg-type]
                for step in range(1, 61)]  # fmt: skip

    def rows(*journals: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, ...]]:
        folders = [str(write_run(config_path, f"{number}-{len(rows_of)}", journal))
                   for number, journal in enumerate(journals)]  # fmt: skip
        rows_of.append(make_report(find_runs(folders, None, "electra")))
        return {(row.group, row.name): row.values for row in rows_of[-1].measures}

    rows_of: list[Any] = []
    found = rows(healthy, diverged)
    assert found["at each run's end", "train/total_loss"] == (pytest.approx(4.4), None)
    assert found["the runs", "steps skipped"] == (0, 40)
    assert re.search(r"train/total_loss +4\.4 +–\n", format_report(rows_of[0]))
    assert ("the runs", "steps skipped") not in rows(healthy, healthy)


def seeded(config_path: Path, lr: str, seeds: dict[int, float]) -> list[Path]:
    """Finished runs of one learning rate; a run's loss, and the median of its scores, by its seed."""
    folders = []
    for seed, loss in seeds.items():
        name = f"lr-{lr}-{seed}"
        folder = write_run(config_path, name, [entry(1, loss)], f"run.seed={seed}", f"optimizer.lr={lr}")
        (folder / "evaluate/step_1").mkdir(parents=True)
        results = json.dumps(results_of(name, {"rte": [loss / 10 - 0.1, loss / 10, loss / 10 + 0.02]}))
        for path in ("results.json", "step_1/results.json"):
            (folder / "evaluate" / path).write_text(results)
        folders.append(folder)
    return folders


def test_runs_that_differ_in_their_seed_alone_are_one_column(config_path: Path, tmp_path: Path) -> None:
    low = seeded(config_path, "1e-4", {1: 5.0, 2: 5.2, 3: 5.1})
    high = seeded(config_path, "2e-4", {1: 6.0, 2: 6.3, 3: 6.0})
    alone = seeded(config_path, "3e-4", {1: 7.0, 2: 7.5})  # two are no spread that could be tested
    runs = find_runs([str(folder) for folder in (alone[0], *low, high[2], alone[1], *high[:2])], None, "electra")
    report = make_report([*runs[1:], runs[0]])
    assert [(column.name, len(column.runs)) for column in report.columns] == [
        ("lr-1e-4-1 (3 seeds)", 3), ("lr-2e-4-3 (3 seeds)", 3), ("lr-3e-4-2", 1), ("lr-3e-4-1", 1),
    ]  # fmt: skip
    own = {each.key: each.values for each in report.differences.own}
    assert own["run.seed"] == ("1, 2, 3", "1, 2, 3", "2", "1")
    assert own["optimizer.lr"] == ("0.0001", "0.0002", "0.0003", "0.0003")
    loss = next(row.values for row in report.measures if row.name == "train/total_loss")
    assert loss[0].mean == pytest.approx(5.1)
    assert loss[0].std == pytest.approx(0.1)
    assert loss[2:] == (7.5, 7.0)
    (row,) = report.scores
    assert row.scores[0] and row.scores[0].values == pytest.approx((0.50, 0.52, 0.51))  # medians of three runs
    assert row.scores[2] and row.scores[2].values == pytest.approx((0.65, 0.75, 0.77))  # of fine-tuning, of one run
    of_families, of_one, _ = row.tests
    assert of_families.p == pytest.approx(2 / math.comb(6, 3))
    assert of_one.reason == "one pretraining on a side, fewer than 3"
    for shown in (format_report(report), render_page(report)):
        assert "5.1 ± 0.1" in shown
        assert "n=3 pretrainings" in shown
        assert "its spread and its tests are over pretrainings" in shown
        assert "do not cover the spread over pretraining" in shown  # of the columns of one run
    drawn = re.findall(r'"colour": "(#[0-9A-F]+)"', render_page(report))
    assert [drawn.index(colour) for colour in drawn] == [0, 0, 0, 3, 3, 3, 6, 7]
    assert len(write_files(report, tmp_path / "out")) == 5
    assert json.loads((tmp_path / "out/compare.json").read_text())["columns"][0]["runs"] == [
        "lr-1e-4-1", "lr-1e-4-2", "lr-1e-4-3",
    ]  # fmt: skip


def pretrained(name: str, seed: int, lr: str = "1", **more: str) -> Run:
    keys = {"run.seed": str(seed), "optimizer.lr": lr} | {key.replace("__", "."): value for key, value in more.items()}
    return run_with(keys, name=name)


def named_columns(*runs: Run) -> list[list[str]]:
    return [[run.name for run in column.runs] for column in as_columns(runs)]


def test_execution_keys_do_not_part_seeds(tmp_path: Path) -> None:
    other = pretrained("other", 1, "2", train__keep_checkpoints="5", tracking__uri="auto", train__flops="1e9")
    runs = [
        pretrained("a", 3, train__keep_checkpoints="9", tracking__uri="none", train__flops="1e9"),
        pretrained("b", 10, train__keep_checkpoints="5", tracking__uri="auto", train__flops="1e9"),
        pretrained("c", 2, train__keep_checkpoints="5", tracking__uri="auto", train__flops="1e9"),
    ]
    for number, run in enumerate([other, *runs]):
        run.settings["data.corpora.web.path"] = f"/{number}"
    assert named_columns(other, *runs) == [["other"], ["a", "b", "c"]]
    report = make_report([other, *runs])
    own = {each.key: each.values for each in report.differences.own}
    assert own["run.seed"] == ("1", "2, 3, 10")
    assert own["train.keep_checkpoints"] == ("5", "5, 9")
    assert own["data.corpora.web.path"] == ("/0", "/1, /2, /3")
    assert not [note for note in report.notes if "not one column" in note]
    for run in runs:
        run.settings["train.steps"] = "20"
    runs[0].settings |= {"train.flops": "2e9", "train.steps": "40"}  # steps follow from it, and they are science
    assert named_columns(other, *runs) == [["other"], ["a"], ["b"], ["c"]]


def test_columns_of_the_same_settings_come_before_tolerance() -> None:
    few, more = ([pretrained(f"{keep}-{seed}", seed, train__keep_every=keep) for seed in seeds]
                 for keep, seeds in (("1", (1, 2, 3)), ("2", (4, 5, 6))))  # fmt: skip
    late = pretrained("late", 7, train__keep_every="3")
    mixed = [late, few[0], more[0], few[1], more[1], few[2], more[2]]
    assert named_columns(*mixed) == [["late", "1-1", "1-2", "1-3"], ["2-4", "2-5", "2-6"]]
    assert as_columns(mixed)[0].name == "late (4 seeds)"


def test_a_note_names_the_key_that_parts_seeds() -> None:
    def notes(*runs: Run) -> list[str]:
        report = make_report(runs)
        shown = [note for note in report.notes if "not one column" in note]
        assert all(note in format_report(report) and note in render_page(report) for note in shown)
        return shown

    base = [pretrained(f"s{seed}", seed, launch__processes="8", evaluate__seeds="5") for seed in (1, 2, 3)]
    other = [pretrained(f"t{seed}", seed, "2", launch__processes="8", evaluate__seeds="5") for seed in (1, 2, 3)]
    assert notes(*base, *other) == []  # lr is what is compared
    base[2].settings["launch.processes"] = "4"
    apart = "s1, s2, s3: pretrained alike but for the seed, and still not one column, because "
    assert notes(*base, *other) == [apart + "launch.processes differs as well."]
    base[1].settings["evaluate.seeds"] = "3"
    assert notes(*base, *other) == [apart + "evaluate.seeds and launch.processes differ as well."]
    assert notes(*base) == []  # they would be the only column, and stand beside each other


def test_seeds_of_one_run_alone_stand_beside_each_other(config_path: Path) -> None:
    report = make_report(find_runs(list(map(str, seeded(config_path, "1e-4", {1: 5.0, 2: 5.2, 3: 5.1}))), None, "e"))
    assert [column.name for column in report.columns] == ["lr-1e-4-1", "lr-1e-4-2", "lr-1e-4-3"]
    assert report.scores[0].tests[0].p is not None


def test_the_table_cuts_values_to_where_they_differ() -> None:
    tasks = '"sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "squad2"]'
    rows = {
        "evaluate.tasks": [f'["rte", {tasks}', f'["cola", {tasks}', '["rte"]'],
        "evaluate.data_dir": [f"/{'x' * 60}/{place}/{'y' * 60}" for place in ("here", "there", "where")],
        "data.local_dir": [f"/{'x' * 60}a", f"/{'x' * 60}b/{'y' * 60}1", f"/{'x' * 60}b/{'y' * 60}2"],
    }
    runs = [run_with({key: values[place] for key, values in rows.items()}, name=f"{'n' * 60}{place}")
            for place in range(3)]  # fmt: skip
    text = format_report(make_report(runs)).split("\n\n")[0].splitlines()
    shown = {line.split()[0]: line for line in text}
    assert '["rte", "sst2"' in shown["evaluate.tasks"]
    assert '["cola", "sst2"' in shown["evaluate.tasks"]
    assert [len(re.findall(f"…x+/{place}/y+…", shown["evaluate.data_dir"])) for place in ("here", "there")] == [1, 1]
    assert all(value in shown["data.local_dir"] for value in rows["data.local_dir"])  # cut they would look alike
    assert all(f"n{place}" in text[1] for place in range(3))
    assert len(set(map(len, text[1:]))) == 1


def test_the_table_of_scores_is_never_cut() -> None:
    values = [0.5, 0.6, 0.7]
    base, other, more = (scored(name, {"rte": values, "cola": values}) for name in ("base", "other", "more"))
    other.results = results_of("other", {"rte": [value - 0.0123 for value in values], "cola": values},
                               batch_size=8, epochs=3, warmup_fraction=0.5)  # fmt: skip
    more.results = results_of("more", {"rte": [value + 0.2 for value in values], "cola": values[:2]})
    base.task_digests, more.task_digests = {"rte": "x"}, {"rte": "y"}
    text = format_report(make_report([base, other, more]))
    lines = {line.split()[0]: line for line in text[text.index("scores, per cent") :].splitlines()[1:] if line}
    assert re.search(r"  -1\.23  \[1\] +\+20\.00  \[2\]$", lines["rte"])
    assert re.search(r"  \+0\.00  \[1\] +-5\.00  \[3\]$", lines["cola"])
    assert "  [1] no test: another recipe: batch_size, epochs, warmup_fraction\n" in text
    assert "  [2] no test: another task file or other data\n" in text
    assert "  [3] no test: n = 2, fewer than 3 seeds\n" in text


def test_numbers_as_people_read_them() -> None:
    shown = [show(None, "number"), show(1234567.0, "count"), show(7.1e20, "flops"), show(3723.4, "seconds")]
    assert shown == ["–", "1,234,567", "7.100e20", "1:02:03"]


def test_command_shows_and_writes_everything(folders: list[Path], electra: Electra, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    text = electra("compare", *folders, "--out", out).stdout
    table = text.split("\n\n")[0].splitlines()
    assert table[0] == "2 keys differ"
    assert table[4].split() == ["follows", "from", "objective.name:", "objective.sharing", "embeddings", "|", "none"]
    assert [line.split() for line in table[2:4]] == [
        ["objective.name", "science,", "pretrain", "electra", "mlm"],
        ["optimizer.lr", "science,", "pretrain", "0.0005", "0.25"],
    ]
    numbers = json.loads((out / "compare.json").read_text())
    assert [each["key"] for each in numbers["differences"]] == ["objective.name", "optimizer.lr"]
    assert numbers["curves"]["train/total_loss"][1]["values"] == [9 - step / 10 for step in range(1, 11)]
    for name in ("loss_against_flops.png", "loss_against_tokens.png"):
        pixels = imread(out / name)[..., :3]
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both curves are there
            assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 100, name
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "<code>optimizer.lr</code>" in page
    assert not (out / "scores_and_flops.png").exists()
    assert json.loads(electra("compare", *folders, "--json").stdout) == numbers


def test_scores_are_drawn_where_there_are_some(folders: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(folders):
        (folder / "evaluate/step_00000010").mkdir(parents=True)
        text = json.dumps(results_of("x", {"rte": [0.5 + number / 10, 0.6, 0.7]}))
        for path in (folder / "evaluate/results.json", folder / "evaluate/step_00000010/results.json"):
            path.write_text(text)
    report = make_report(find_runs(list(map(str, folders)), None, "electra"))
    assert tmp_path / "out/scores_and_flops.png" in write_files(report, tmp_path / "out")
    assert "do not cover the spread over pretraining" in format_report(report)
    assert "do not cover the spread over pretraining" in render_page(report)
    assert "n=3" in render_page(report)


def test_nothing_of_a_name_becomes_markup(folders: list[Path]) -> None:
    runs = find_runs(list(map(str, folders)), None, "electra")
    name = '</script><script>alert(1)</script><img src=x onerror="y">'
    runs[0].name = runs[0].source = runs[0].facts["status"] = name
    runs[0].settings["optimizer.lr"] = "<b>1</b>"
    page = render_page(make_report(runs))
    assert "alert(1)</script>" not in page
    assert "<img" not in page[: page.index("<script>")]  # plotly's own text comes after
    assert "<b>1</b>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_folders_need_no_mlflow(folders: list[Path]) -> None:
    code = (
        "import sys; from pipeline.comparison.find import find_runs;"
        "from pipeline.comparison.report import make_report;"
        "make_report(find_runs(sys.argv[1:], None, 'electra'));"
        "print([name for name in ('mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], env=clean_environment(),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_wrong_runs_are_one_message(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    good = str(folders[0])
    wrong = {
        "no/such/folder": "no such folder; give the folder of a run",
        "a_name": "no MLflow to look it up in",
        str(tmp_path): "no config.yaml in it",
        f"{good}/../long": "named twice",
    }
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            find_runs([good, name], None, "electra")
    with pytest.raises(UsageError, match="two or more"):
        find_runs([good], None, "electra")
    with pytest.raises(ConfigError, match=r"none\.db: no such file"):
        find_runs([good, "a_name"], f"sqlite:///{tmp_path}/none.db", "electra")
    assert not (tmp_path / "none.db").exists()


def test_a_journal_that_was_cut_short_and_one_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in stream_entries(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DamagedError, match="line 2 is not JSON"):
        list(stream_entries(path))


def test_a_run_without_a_journal_is_compared_all_the_same(config_path: Path) -> None:
    runs = find_runs([str(write_run(config_path, name, [])) for name in ("a", "b")], None, "electra")
    report = make_report(runs)
    assert report.curves == {}
    assert "a has no journal" in " ".join(report.notes)
    assert "No key differs." in format_report(report)
    assert 'id="chart"' not in render_page(report)
    json.dumps(to_json(report), allow_nan=False)


def test_names_become_distinct() -> None:
    assert distinct_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
