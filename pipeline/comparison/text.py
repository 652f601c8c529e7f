"""A comparison as aligned text for a terminal."""

from collections.abc import Sequence
from itertools import groupby

from pipeline.comparison.differences import LISTS, Difference
from pipeline.comparison.measures import show
from pipeline.comparison.report import Report
from pipeline.comparison.significance import Score, Test

_WIDEST, _BEFORE = 44, 12  # characters of a cell, and of those the ones before what differs
_AS_YAML = {"None": "null", "True": "true", "False": "false"}


def format_report(report: Report) -> str:
    """Differences, numbers, scores and notes, each with a heading."""
    parts = [_differences(report), _measures(report), _scores(report), "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(filter(None, parts))


def shown_value(value: str | None) -> str:
    """A setting as YAML has it."""
    return "–" if value is None else _AS_YAML.get(value, value)


def score_parts(score: Score | None) -> tuple[str, str]:
    """Median with the deviation over seeds, per cent; and the number of seeds."""
    if score is None:
        return "–", ""
    spread = "" if score.std is None else f" ± {100 * score.std:.2f}"
    of = " pretrainings" if score.seeds == "pretraining" else ""
    return f"{100 * score.median:.2f}{spread}", f"n={len(score.values)}{of}"


def test_parts(test: Test) -> tuple[str, str]:
    """Difference of the means, per cent; and how probable one as large is by chance."""
    if test.difference is None:
        return "–", test.reason
    difference = f"{100 * test.difference:+.2f}"
    if test.p is None or test.p_holm is None:
        return difference, f"no test: {test.reason}"
    return difference, f"p={test.p:.3g}{'' if test.exact else ' (sampled)'}, Holm {test.p_holm:.3g}"


def _names(report: Report) -> list[str]:
    return _fitted([column.name for column in report.columns])


def _differences(report: Report) -> str:
    own, following = report.differences.own, report.differences.following
    if not own and not following:
        return "No key differs."
    rows = [["key", "list", *_names(report)]]
    for kind, of_kind in groupby(own, key=lambda difference: LISTS.index(difference.list)):
        rows += [[each.key, _list(each, LISTS[kind]), *_fitted([*map(shown_value, each.values)])] for each in of_kind]
    lines = [f"{len(own)} key{'' if len(own) == 1 else 's'} differ{'s' if len(own) == 1 else ''}", *_aligned(rows, 2)]
    lines += [
        f"  follows from {each.follows_from}: {each.key} {' | '.join(map(shown_value, each.values))}"
        for each in following
    ]
    return "\n".join(lines)


def _list(difference: Difference, kind: str) -> str:
    return f"{kind}, {difference.stage}" if difference.stage else kind


def _measures(report: Report) -> str:
    rows = [["", *_names(report)]]
    for group, of_group in groupby(report.measures, key=lambda row: row.group):
        rows.append([group])
        rows += [[f"  {row.name}", *_fitted([show(value, row.kind) for value in row.values])] for row in of_group]
    return "\n".join(_aligned(rows, 1))


def _scores(report: Report) -> str:
    if not report.scores:
        return ""
    first, *others = _names(report)
    rows = [["task", "metric", first, *others, *(f"{name} against {first}" for name in others)]]
    reasons: list[str] = []
    for row in report.scores:
        tests = [_test_cell(test, reasons) for test in row.tests]
        rows.append([row.task, row.metric, *(_joined(score_parts(score)) for score in row.scores), *tests])
    heading = "scores, per cent: median ± deviation over seeds; difference of means"
    below = [f"  [{number}] no test: {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([heading, *_aligned(rows, 2), *below])


def _test_cell(test: Test, reasons: list[str]) -> str:
    """A test's cell; why there was none stands below the table, by a number."""
    if test.difference is None or test.p is not None:
        return _joined(test_parts(test))
    if test.reason not in reasons:
        reasons.append(test.reason)
    return f"{test_parts(test)[0]}  [{reasons.index(test.reason) + 1}]"


def _joined(parts: tuple[str, str]) -> str:
    return "  ".join(filter(None, parts))


def _aligned(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Columns of equal width, those after the first ``text_columns`` aligned right; a row of one cell is a heading."""
    wide = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in wide) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip() if len(row) > 1 else row[0])
    return lines


def _fitted(values: Sequence[str]) -> list[str]:
    """The values of a row, long ones cut to where they differ; as they are if values that differ would look alike."""
    lines = ["".join(each if each.isprintable() else repr(each)[1:-1] for each in value) for value in values]
    differing = (place for place, letters in enumerate(zip(*lines, strict=False)) if len(set(letters)) > 1)
    begin = next(differing, 0) - _BEFORE
    cut = [_cut(line, begin) for line in lines]
    return cut if len(set(cut)) == len(set(lines)) else lines


def _cut(line: str, begin: int) -> str:
    if len(line) <= _WIDEST:
        return line
    begin = max(0, min(begin, len(line) - _WIDEST))
    end = begin + _WIDEST
    left, right = "…" if begin else "", "…" if end < len(line) else ""
    return left + line[begin + len(left) : end - len(right)] + right
