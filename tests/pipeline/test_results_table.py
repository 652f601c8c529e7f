"""Published rows, the GLUE average, and results.json as Markdown."""

import pytest

from pipeline.evaluation.paper import GLUE_COLUMNS, PUBLISHED
from pipeline.evaluation.scores import summarize
from pipeline.evaluation.table import glue_average, markdown_table


def glue_tasks(value: float = 0.5) -> dict:
    return {
        column.task: {column.metric: summarize([value + 0.01 * number + shift for shift in (0.0, 0.1, 0.5)])}
        for number, column in enumerate(GLUE_COLUMNS)
    }


def results_of(tasks: dict, **more) -> dict:
    about = {"checkpoint": "/runs/x/step_4", "step": 1200, "size": "small", "run": "mine", "flops": 1e15}
    score = {task: next(iter(metrics)) for task, metrics in tasks.items()}
    about |= {"flops_paper": 1.3e18, "tasks": tasks, "score": score, "glue_average": glue_average(tasks)}
    return about | {"recipes": {}, "grid": {}, "failed": []} | more


def rows(table: str, section: str) -> list[list[str]]:
    text = table.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in lines]


def row_of(table: str, name: str, section: str = "Beside published scores") -> dict[str, str]:
    heading, _, *body = rows(table, section)
    assert all(len(row) == len(heading) for row in body)
    (found,) = [row for row in body if row[0] == name]
    return dict(zip(heading, found, strict=True))


def test_printed_averages_are_those_of_the_rows():
    compared = 0
    for model in PUBLISHED:
        cells = [model.scores.get(column.key) for column in GLUE_COLUMNS]
        if model.printed_average is not None and None not in cells:
            assert sum(cells) / 8 == pytest.approx(model.printed_average, abs=0.051), model.model
            compared += 1
    assert compared == 7
    (owt,) = [model for model in PUBLISHED if model.model == "ELECTRA-Small-OWT"]
    assert owt.glue_average == pytest.approx(80.3625)


def test_published_rows_are_whole():
    assert len({model.model for model in PUBLISHED}) == len(PUBLISHED)
    for model in PUBLISHED:
        assert model.scores or model.glue_average
        assert model.source
        assert all(50 < value < 100 for value in model.scores.values())
        for task in ("squad1", "squad2"):
            if f"{task}/exact" in model.scores and f"{task}/f1" in model.scores:
                assert model.scores[f"{task}/exact"] < model.scores[f"{task}/f1"]
        assert model.flops is None or 1e16 < model.flops < 1e23


def test_glue_average_is_of_all_eight_medians():
    tasks = glue_tasks()
    assert glue_average(tasks) == pytest.approx(0.6 + 0.01 * 3.5)
    with_wnli = tasks | {"wnli": {"accuracy": summarize([0.0])}, "squad1": {"exact": summarize([0.0])}}
    assert glue_average(with_wnli) == glue_average(tasks)
    for column in GLUE_COLUMNS:
        assert glue_average({name: metrics for name, metrics in tasks.items() if name != column.task}) is None
    assert glue_average(tasks | {"cola": {"accuracy": summarize([0.5])}}) is None  # not the paper's metric


def test_ours_stands_beside_the_published_models_of_the_size():
    table = markdown_table(results_of(glue_tasks()), "small")
    ours = row_of(table, "**mine, step 1,200**")
    assert ours["CoLA"] == "**60.0**"
    assert ours["RTE"] == "**67.0**"
    assert ours["GLUE"] == "**63.5**"
    assert ours["FLOPs (paper's count)"] == "**1.3e18**"
    released = row_of(table, "ELECTRA-Small++ (released)")
    assert (released["CoLA"], released["GLUE"], released["FLOPs (paper's count)"]) == ("57.0", "81.1", "3.6e19")
    assert row_of(table, "ELECTRA-Small, 25 % of the steps")["GLUE"] == "77.7"
    assert row_of(table, "BERT-Small")["CoLA"] == "–"
    assert "SQuAD" not in table
    assert "BERT-Base" not in table

    large = markdown_table(results_of(glue_tasks()), "large")
    for model, average in {"RoBERTa-500K": "88.9", "XLNet-Large": "89.1", "ELECTRA-1.75M": "89.5"}.items():
        assert row_of(large, model)["GLUE"] == average
    assert not [row for row in rows(large, "Beside published scores") if row[0] == "ALBERT"]  # has SQuAD only


def test_question_answering_and_chunking_have_columns_when_scored():
    tasks = {
        "squad1": {"exact": summarize([0.8]), "f1": summarize([0.9])},
        "chunk": {"span_f1": summarize([0.971, 0.973])},
    }
    table = markdown_table(results_of(tasks), "base")
    heading = rows(table, "Beside published scores")[0]
    assert heading == ["model", "FLOPs (paper's count)", "SQuAD 1.1 EM", "SQuAD 1.1 F1", "Chunking F1"]
    assert row_of(table, "ELECTRA-Base")["SQuAD 1.1 F1"] == "90.8"
    assert row_of(table, "**mine, step 1,200**")["Chunking F1"] == "**97.2**"
    assert "No GLUE average" not in table
    assert "- One seed only, so no spread: squad1." in table


def test_a_task_of_ones_own_is_in_the_second_table_only():
    tasks = {"mine": {"f1": summarize([0.5, 0.7]), "accuracy": summarize([0.25])}}
    table = markdown_table(results_of(tasks, step=None, checkpoint="/some|where"), "base")
    assert "Beside published scores" not in table
    body = rows(table, "All scores")[2:]
    assert body[0][:4] == ["**mine**", "**f1**", "**60.00**", "**60.00 ± 14.14**"]
    assert body[0][4:] == ["**-67.06 to 187.06**", "**2**"]
    assert body[1] == ["mine", "accuracy", "25.00", "25.00", "–", "1"]
    assert table.startswith("# /some|where\n")


def test_notes_say_how_scores_came_about():
    tasks = glue_tasks() | {"wnli": {"accuracy": summarize([0.5])}}
    del tasks["rte"], tasks["qqp"]
    metrics = {"exact": 0.701, "f1": 0.732, "best_exact": 0.712, "best_f1": 0.741}
    thresholds = {"best_exact_threshold": -1.5, "best_f1_threshold": -3.25}
    tasks["squad2"] = {name: summarize([value]) for name, value in (metrics | thresholds).items()}
    points = [{"lr": lr, "layer_decay": 0.8, "score": 0.5} for lr in (1e-4, 3e-4)]
    table = markdown_table(
        results_of(
            tasks,
            grid={"cola": {"points": points, "chosen": 1}},
            recipes={"squad2": {"no_answer_threshold": -2.75}},
            failed=[{"task": "mrpc", "seed": 3, "error": "loss is\nnot finite"}],
        ),
        "small",
    )
    notes = table.split("## Notes\n")[1]
    assert "No GLUE average: QQP, RTE missing." in notes
    assert "WNLI is not part of the GLUE average" in notes
    assert (
        "cola: best of a grid of 2 points (learning rate 0.0001, 0.0003; layer-wise decay 0.8), 0.0003 and 0.8" in notes
    )
    assert "optimistic" in notes
    assert "squad2: exact match 70.1, F1 73.2 at the fixed threshold of -2.75" in notes
    assert "71.2, 74.1 at the thresholds that are best for each on dev (median -1.50, -3.25)" in notes
    assert "- Failed: mrpc, seed 3: loss is not finite" in notes
    second = {row[1]: row[2] for row in rows(table, "All scores") if row[0] == "squad2"}
    assert second["best_exact_threshold"] == "-1.50"  # not per cent
    assert second["best_exact"] == "71.20"


def test_a_whole_and_plain_result_needs_no_notes():
    assert "Notes" not in markdown_table(results_of(glue_tasks()), "small")
