"""results.json as Markdown: our scores beside published ones, and all of them with their spread."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.paper import GLUE_COLUMNS, OTHER_COLUMNS, PUBLISHED, Column, Published

_NOTHING = "–"
_NOT_PER_CENT = "_threshold"  # ends the name of a metric that is no share of anything


def glue_average(tasks: Mapping[str, Any]) -> float | None:
    """Mean of the medians of the paper's eight GLUE tasks, as a fraction of 1; None unless all are there.

    WNLI is not among them. Each task counts with the paper's metric, whichever others it was scored with.
    """
    medians = [_median(tasks, column) for column in GLUE_COLUMNS]
    known = [median for median in medians if median is not None]
    return sum(known) / len(known) if len(known) == len(medians) else None


def markdown_table(results: Mapping[str, Any], size: str) -> str:
    """Tables of a results.json and notes on how its scores came about.

    Args:
        results: Its content.
        size: small, base or large: which published models to set beside ours.

    Returns:
        Markdown, with scores in per cent.
    """
    published = _published_table(results, size)
    parts = [f"# {_name(results)}\n"]
    if published:
        source = "Dev sets (chunking: test set), per cent; ours: median of seeds. See `pipeline/evaluation/paper.py`."
        parts.append(f"## Beside published scores\n\n{source}\n\n{published}")
    parts.append(f"## All scores\n\nPer cent; the score of a task is in bold.\n\n{_spread_table(results)}")
    notes = list(_notes(results))
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {_one_line(note)}" for note in notes) + "\n")
    return "\n".join(parts)


def comparison_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Several results side by side: the median of each task's score, per cent, in order of run and FLOPs."""
    scores = {(task, metric): None for results in found for task, metric in results["score"].items()}
    rows = [["model", "FLOPs (paper's count)", *(f"{task} {metric}" for task, metric in scores), "GLUE"]]
    for results in sorted(found, key=lambda results: (results["run"], results.get("flops_paper") or 0.0)):
        medians = [results["tasks"].get(task, {}).get(metric, {}).get("median") for task, metric in scores]
        shown = map(_per_cent, [*medians, results.get("glue_average")])
        best_of_grid = ", best of a grid" if results.get("grid") else ""
        rows.append([_name(results) + best_of_grid, _flops(results.get("flops_paper")), *shown])
    return _markdown(rows, text_columns=1)


def _median(tasks: Mapping[str, Any], column: Column) -> float | None:
    summary = tasks.get(column.task, {}).get(column.metric)
    return summary["median"] if summary else None


def _name(results: Mapping[str, Any]) -> str:
    step = results.get("step")
    return _one_line(f"{results['run']}, step {step:,}" if step is not None else results["checkpoint"])


def _published_table(results: Mapping[str, Any], size: str) -> str:
    """Columns for GLUE if any task of it was scored, and for every other task that was; "" if none was."""
    tasks, average = results["tasks"], results.get("glue_average")
    glue = [column for column in GLUE_COLUMNS if any(other.task in tasks for other in GLUE_COLUMNS)]
    others = [column for column in OTHER_COLUMNS if column.task in tasks]
    if not glue and not others:
        return ""
    heading = ["model", "FLOPs (paper's count)", *(column.heading for column in glue), *(["GLUE"] if glue else [])]
    rows = [heading + [column.heading for column in others]]
    for model in PUBLISHED:
        if model.size == size and _is_about(model, glue, others):
            cells = [_number(model.scores.get(column.key)) for column in (*glue, *others)]
            cells[len(glue) : len(glue)] = [_number(model.glue_average)] if glue else []
            rows.append([model.model, _flops(model.flops), *cells])
    ours = [_per_cent(_median(tasks, column)) for column in (*glue, *others)]
    ours[len(glue) : len(glue)] = [_per_cent(average)] if glue else []
    rows.append([_bold(cell) for cell in (_name(results), _flops(results.get("flops_paper")), *ours)])
    return _markdown(rows, text_columns=1)


def _is_about(model: Published, glue: Sequence[Column], others: Sequence[Column]) -> bool:
    return bool(glue and model.glue_average) or any(column.key in model.scores for column in (*glue, *others))


def _spread_table(results: Mapping[str, Any]) -> str:
    rows = [["task", "metric", "median", "mean ± std", "95 % interval", "seeds"]]
    for task, metrics in results["tasks"].items():
        for metric, summary in metrics.items():
            scale = 1 if _NOT_PER_CENT in metric else 100
            row = [task, metric, *_spread(summary, scale)]
            is_score = results.get("score", {}).get(task) == metric
            rows.append([_bold(cell) for cell in row] if is_score else row)
    return _markdown(rows, text_columns=2)


def _spread(summary: Mapping[str, Any], scale: float) -> list[str]:
    def shown(value: float) -> str:
        return f"{scale * value:.2f}"

    mean, interval = shown(summary["mean"]), _NOTHING
    if summary["std"] is not None:
        mean = f"{mean} ± {shown(summary['std'])}"
        interval = " to ".join(shown(bound) for bound in summary["ci95"])
    return [shown(summary["median"]), mean, interval, str(len(summary["values"]))]


def _notes(results: Mapping[str, Any]) -> Iterable[str]:
    tasks = results["tasks"]
    missing = [column.heading for column in GLUE_COLUMNS if _median(tasks, column) is None]
    if 0 < len(missing) < len(GLUE_COLUMNS):
        yield f"No GLUE average: {', '.join(missing)} missing."
    elif not missing and results.get("glue_average") is None:
        yield "No GLUE average: not all of the eight tasks' files say `in_glue_average: true`."
    if "wnli" in tasks:
        yield "WNLI is not part of the GLUE average, as in the paper."
    for task, grid in results.get("grid", {}).items():
        yield _note_on_grid(task, grid)
    for task, metrics in tasks.items():
        if {"exact", "f1", "best_exact", "best_f1"} <= metrics.keys():
            yield _note_on_thresholds(task, metrics, results.get("recipes", {}).get(task, {}))
    yield from _notes_on_seeds(tasks)
    for failure in results.get("failed", []):
        what = ", ".join(filter(None, [failure["task"], failure.get("point"), f"seed {failure['seed']}"]))
        yield f"Failed: {what}: {failure['error']}"


def _note_on_grid(task: str, grid: Mapping[str, Any]) -> str:
    points, best = grid["points"], grid["points"][grid["chosen"]]
    rates = ", ".join(f"{lr:g}" for lr in sorted({point["lr"] for point in points}))
    decays = ", ".join(f"{decay:g}" for decay in sorted({point["layer_decay"] for point in points}))
    return (
        f"{task}: best of a grid of {len(points)} points (learning rate {rates}; layer-wise decay {decays}), "
        f"{best['lr']:g} and {best['layer_decay']:g}. It was chosen by its median on dev, which is reported here, "
        "so the score is optimistic."
    )


def _note_on_thresholds(task: str, metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    fixed = recipe.get("no_answer_threshold")
    at = f" of {fixed:g}" if fixed is not None else ""
    exact, f1, best_exact, best_f1 = (
        _per_cent(metrics[name]["median"]) for name in ("exact", "f1", "best_exact", "best_f1")
    )
    where = ", ".join(
        f"{metrics[name]['median']:.2f}" for name in ("best_exact_threshold", "best_f1_threshold") if name in metrics
    )
    return (
        f"{task}: exact match {exact}, F1 {f1} at the fixed threshold{at} for no answer; {best_exact}, {best_f1} at "
        f"the thresholds that are best for each on dev{f' (median {where})' if where else ''}, as the official "
        "script reports too."
    )


def _notes_on_seeds(tasks: Mapping[str, Any]) -> Iterable[str]:
    counts = {task: len(next(iter(metrics.values()))["values"]) for task, metrics in tasks.items() if metrics}
    single = [task for task, count in counts.items() if count == 1]
    if single:
        yield f"One seed only, so no spread: {', '.join(single)}."


def _per_cent(value: float | None) -> str:
    return _number(None if value is None else 100 * value)


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f}"


def _flops(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1e}".replace("e+", "e")


def _bold(cell: str) -> str:
    return cell if cell == _NOTHING else f"**{cell}**"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A table with its first row as heading; columns after the first ``text_columns`` are aligned right."""
    ruler = ["---" if number < text_columns else "---:" for number in range(len(rows[0]))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ruler, *rows[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
