"""Scores against FLOPs."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pipeline.evaluation import plot
from pipeline.evaluation.plot import GLUE, ScorePoint, plot_run, plot_scores, points_of, published_points
from pipeline.evaluation.scores import summarize


def write_results(folder: Path, step: int, flops_paper: float | None, run: str = "mine", **tasks: dict) -> Path:
    path = folder / f"{run}_{step}" / "results.json"
    path.parent.mkdir(parents=True)
    results = {
        "checkpoint": f"/{run}/{step}", "run": run, "step": step, "size": "small", "flops": 9e9,
        "flops_paper": flops_paper, "tasks": tasks, "score": {task: next(iter(tasks[task])) for task in tasks},
        "glue_average": 0.7 if "rte" in tasks else None,
    }  # fmt: skip
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []

    class Kept(FigureCanvasAgg):
        def __init__(self, figure):
            figures.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(plot, "FigureCanvasAgg", Kept)
    return figures


def test_points_are_in_order_and_in_the_papers_count(tmp_path):
    values = summarize([0.5, 0.6, 0.9])
    files = [
        write_results(tmp_path, 20, 2e17, cola={"matthews": values, "accuracy": summarize([0.1])}),
        write_results(tmp_path, 10, 1e17, cola={"matthews": summarize([0.4])}),
        write_results(tmp_path, 30, None, cola={"matthews": values}),
        write_results(tmp_path, 40, 4e17, rte={"accuracy": values}),
    ]
    points, left_out = points_of(files, "cola")
    assert [(point.label, point.flops, point.score) for point in points] == [
        ("step 10", 1e17, 0.4),
        ("step 20", 2e17, 0.6),
    ]
    assert (points[0].low, points[0].high) == (None, None)
    assert [points[1].low, points[1].high] == values["ci95"]
    assert left_out == ["/mine/30"]
    average, _ = points_of(files, GLUE)
    assert [(point.flops, point.score) for point in average] == [(4e17, 0.7)]


def test_labels_name_the_run_where_there_are_several(tmp_path):
    scores = {"own": {"f1": summarize([0.5])}}
    files = [write_results(tmp_path, 10, 1e17, run=run, **scores) for run in ("one", "two")]
    points, _ = points_of(files, "own")
    assert [point.label for point in points] == ["one, step 10", "two, step 10"]
    assert [point.run for point in points] == ["one", "two"]


def test_published_points():
    average = {point.label: (point.flops, point.score) for point in published_points(GLUE)}
    assert average["ELECTRA-Base"] == (6.4e19, pytest.approx(0.851))
    assert average["12.5 %"] == (1.8e17, pytest.approx(0.76))
    stopped = {point.run for point in published_points(GLUE) if point.label.endswith("%")}
    assert stopped == {"ELECTRA-Small"}
    squad = {point.label: point.score for point in published_points("squad2")}
    assert squad["ELECTRA-400K"] == pytest.approx(0.869)  # exact match
    assert "XLNet-Base" not in squad  # FLOPs not known
    # The released Large is the paper's 1.75M: one point, except where only the README has a score.
    for task in (GLUE, "squad2"):
        assert [point.label for point in published_points(task)].count("ELECTRA-1.75M") == 1
    assert "ELECTRA-1.75M" in {point.label for point in published_points("chunk")}
    assert published_points("own") == []


def test_a_plot_shows_every_point_and_what_is_counted(tmp_path, drawn):
    points = [ScorePoint("low", 1e17, 0.7, 0.65, 0.74, "mine"), ScorePoint("high", 1e18, 0.8, run="mine")]
    plot_scores(points, GLUE, tmp_path / "new/plot.png")
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert "ELECTRA paper counts" in axes.get_xlabel()
    assert (axes.get_title(), axes.get_ylabel()) == ("GLUE average", "score (dev), per cent")
    markers = {(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True) if line.get_marker() == "*"}
    assert markers == {(1e17, 70.0), (1e18, 80.0)}
    (interval,) = [path for collection in axes.collections for path in collection.get_paths()]
    assert interval.vertices.tolist() == [[1e17, 65.0], [1e17, 74.0]]
    joined = [line.get_xdata() for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert [1e17, 1e18] in [list(x) for x in joined]
    shown = {text.get_text() for text in axes.texts if text.get_visible()}
    assert {"low", "high", "ELECTRA-Base", "BERT-Base"} <= shown
    families = {text.get_text().split(" ")[0] for text in figure.legends[0].get_texts()}
    assert families == {"ELECTRA", "BERT", "RoBERTa", "XLNet", "ELMo,", "this"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plot.png"]


def test_no_label_covers_another_or_leaves_the_axes(tmp_path, drawn):
    points = [ScorePoint(f"step {n}", 1e17 * 1.6**n, 0.7 + 0.02 * n, run="mine") for n in range(6)]
    plot_scores(points, "qqp", tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    renderer = drawn[0].canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts if text.get_visible()]
    assert len(boxes) > 10
    for number, box in enumerate(boxes):
        assert axes.bbox.fully_containsx(box.x0)
        assert axes.bbox.fully_containsx(box.x1)
        assert not box.count_overlaps(boxes[:number])


def test_the_same_scores_give_the_same_picture(tmp_path):
    for name in ("a", "b"):
        plot_scores([ScorePoint("x", 1e17, 0.9)], "chunk", tmp_path / f"{name}.png")
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert np.array_equal(first, second)
    assert first.shape[1] == 6.4 * 200
    assert first.std() > 5


def test_a_run_has_a_panel_for_each_task_with_a_point(tmp_path, drawn):
    scores = {task: {"accuracy": summarize([0.5, 0.6])} for task in ("rte", "own")}
    files = [write_results(tmp_path, step, 1e15 * step, **scores) for step in (10, 20)]
    assert plot_run([json.loads(path.read_text()) for path in files], tmp_path) == tmp_path / "scores_and_flops.png"
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert titles == ["GLUE average", "RTE", "own"]
    assert plot_run([json.loads(write_results(tmp_path, 1, None, run="hub", **scores).read_text())], tmp_path) is None
    assert plot_run([], tmp_path) is None
    assert len(drawn) == 1


def test_a_single_point_of_an_unpublished_task_is_drawn_without_a_warning(tmp_path):
    found = [
        json.loads(write_results(tmp_path, 1, 156615082311680, rhymes={"accuracy": summarize([0.8, 0.9])}).read_text())
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_run(found, tmp_path)
