"""The tables of proof.py, from folders written here."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.comparison.folder import read_folder
from tests.benchmarks import proof
from tests.pipeline.test_compare import entry, results_of, scored, write_run


def test_settings_are_told_apart_by_pretrainings_and_by_fine_tunings() -> None:
    def settings(*runs: tuple[str, list[float]]) -> list[proof.Setting]:
        return proof.settings_of([scored(name, {"cola": values}) for name, values in runs])

    low, high = settings(("low_1", [0.5, 0.52, 0.51]), ("low_2", [0.53] * 3), ("high_1", [0.6] * 3))
    assert (low.name, high.name) == ("low", "high")
    assert low.medians("cola") == pytest.approx([51, 53])
    assert low.deviation("cola") == pytest.approx((1 / 2) ** 0.5)  # variances 1 and 0
    assert proof.told_apart(low, high, "cola") and proof.told_apart(high, low, "cola")
    low, among = settings(("low_1", [0.5, 0.5]), ("low_2", [0.7, 0.7]), ("high_1", [0.69, 0.69]))
    assert not proof.told_apart(low, among, "cola") and not proof.told_apart(among, low, "cola")
    one, two = settings(("one_1", [0.5]), ("one_2", [0.5]), ("two_1", [0.9, 0.9]))
    for pair in ((one, two), (two, one)):
        assert not proof.told_apart(*pair, "cola"), "of a single fine-tuning nobody knows how far it deviates"
    one, two = settings(("a_1", [0.5, 0.51]), ("b_1", [0.6, 0.61]), ("b_2", [0.6, 0.61]))
    assert proof.told_apart(one, two, "cola")
    two.runs[1].results, two.runs[1].all_results = None, []
    assert not proof.told_apart(one, two, "cola"), "a single one of each was fine-tuned"
    low, noisy = settings(("low_1", [0.5, 0.5]), ("low_2", [0.5, 0.5]), ("high_1", [0.45, 0.6]))  # 52.5 ± 10.6
    assert not proof.told_apart(low, noisy, "cola") and not proof.told_apart(noisy, low, "cola")


def test_tables_and_files(config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for name, scores in (("electra_1", [0.5, 0.6]), ("mlm_1", [0.7, 0.72])):
        journal = [entry(step, 1 / step, **{"train/generator_mlm_loss": 1 / step}) for step in range(1, 41)]
        journal[-1]["held_out/mask_token_loss"], journal[17]["held_out/mask_token_loss"] = 3.25, 4.25
        folder = write_run(config_path, name, journal)
        (folder / "evaluate/step_10").mkdir(parents=True)
        for file in ("results.json", "step_10/results.json"):
            (folder / "evaluate" / file).write_text(json.dumps(results_of(name, {"cola": scores})))
        folders.append(str(folder))
    monkeypatch.setattr(sys, "argv", ["proof.py", *folders, "--out", str(tmp_path / "tables/tiny")])
    proof.main()
    text = (tmp_path / "tables/tiny.md").read_text()
    assert "| electra_1 | 40 | 4,000 | 4.000e07 | 4.000e06 | 0:00:20 |" in text
    assert "| mlm_1 | 3.250 | – | – |" in text
    assert "| cola | accuracy | 55.0 ± 7.1 | 71.0 ± 1.4 |" in text
    assert "(seeds of each: 2)" in text
    assert "| cola | accuracy | +16.0 |" in text
    journal = list(csv.DictReader((tmp_path / "tables/tiny_journal.csv").open()))
    assert [line["step"] for line in journal] == [*map(str, (4, 8, 12, 16, 18, *range(20, 41, 4)))] * 2
    assert journal[0]["train/generator_mlm_loss"] == "0.25"
    scored = {line["step"]: line["held_out/mask_token_loss"] for line in journal}
    assert [step for step, value in scored.items() if value] == ["18", "40"], "nothing between what was measured"
    scores = list(csv.DictReader((tmp_path / "tables/tiny_scores.csv").open()))
    assert [(line["run"], line["seed"], line["per_cent"]) for line in scores] == [
        ("electra_1", "1", "50.000"), ("electra_1", "2", "60.000"), ("mlm_1", "1", "70.000"), ("mlm_1", "2", "72.000"),
    ]  # fmt: skip


def test_lines_of_runs_whose_folders_are_gone_are_kept(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["proof.py", *arguments, "--out", str(tmp_path / "tiny")])
        proof.main()
        return [(tmp_path / f"tiny{end}").read_text() for end in (".md", "_journal.csv", "_scores.csv")]

    folders = {}
    for name, values in (("a_1", [0.5, 0.6]), ("a_2", [0.5, 0.52]), ("b_1", [0.7, 0.72])):
        folders[name] = write_run(config_path, name, [entry(step, 1 / step) for step in range(1, 41)])
        (folders[name] / "evaluate/step_10").mkdir(parents=True)
        for file in ("results.json", "step_10/results.json"):
            (folders[name] / "evaluate" / file).write_text(json.dumps(results_of(name, {"cola": values})))
    at_once = write(*(str(folders[name]) for name in ("a_2", "a_1", "b_1")))
    write(str(folders["a_2"]), str(folders["a_1"]))
    assert write(str(folders["b_1"]), "--keep") == at_once, "as if all folders had been there"
    assert write(str(folders["a_1"]), "--keep") == at_once, "a run given again replaces its own lines"
    for file in folders["b_1"].glob("evaluate/**/results.json"):
        file.write_text(json.dumps(results_of("b_1", {"sst2": [0.9, 0.91]})))
    *_, scores = write(str(folders["b_1"]), "--keep")
    assert sorted(scores.splitlines()) == sorted(
        [*at_once[2].splitlines(), "b_1,10,1e+06,sst2,accuracy,1,90.000", "b_1,10,1e+06,sst2,accuracy,2,91.000"]
    ), "a task that its folder does not have stays"
    shutil.rmtree(folders["b_1"] / "evaluate/step_10")
    assert write(str(folders["b_1"]), "--keep")[2] == scores, "and of a checkpoint whose folder is gone"
    shutil.rmtree(folders["b_1"] / "evaluate")
    assert write(str(folders["b_1"]), "--keep")[2] == scores, "and checkpoints that it does not have, all of them here"
    (tmp_path / "tiny_scores.csv").unlink()
    with pytest.raises(SystemExit, match=r"--keep: .*tiny_scores.csv is not there; leave --keep out"):
        write(str(folders["a_1"]), "--keep")


def test_a_run_that_has_just_begun_has_rows_without_values(config_path: Path) -> None:
    runs = [read_folder(write_run(config_path, name, [])) for name in ("a", "b_2")]
    tables = proof.tables(runs)
    assert "| a | – | – | – |" in tables and "Fine-tuned" not in tables
    assert len(list(proof.journal_rows(runs))) == 1


def test_against_several_settings_and_one_that_is_none() -> None:
    runs = [
        scored(name, {"cola": values}) for name, values in (("a", [0.5, 0.5]), ("b", [0.6, 0.6]), ("c", [0.8, 0.8]))
    ]
    tables = proof.tables(runs, ["c", "a"])
    assert "Against c:\n\n| task | metric | a | b |\n|---|---|---|---|\n| cola | accuracy | -30.0 | -20.0 |" in tables
    assert "Against a:\n\n| task | metric | b | c |" in tables and "Against b" not in tables
    with pytest.raises(SystemExit, match="--against d: no such setting; there are a, b, c"):
        proof.tables(runs, ["d"])


def test_a_number_at_the_end_of_a_name_is_not_enough_for_one_setting() -> None:
    runs = [scored(name, {"cola": [0.5]}) for name in ("large_400", "large_1750")]
    for run, steps in zip(runs, ("400", "1750"), strict=True):
        run.settings["train.steps"] = steps
    with pytest.raises(SystemExit, match=r"large_1750: not a second large_400, its train.steps is another; rename it"):
        proof.settings_of(runs)


def test_while_more_is_being_evaluated_the_scores_are_those_that_are_there() -> None:
    run = scored("a_1", {"cola": [0.5, 0.6]})
    assert run.results
    run.all_results, run.results = [run.results], None
    assert "| cola | accuracy | 55.0 ± 7.1 |" in proof.tables([run])
