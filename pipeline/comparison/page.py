"""A comparison as one HTML file that loads nothing: plotly's script, the data and the tables are in it.

``page.css`` and ``page.js`` are its style and its behaviour. Whatever comes from runs is escaped: in the tables as
HTML, in the data as JSON without ``<``, for the chart, which understands some tags, as HTML once more.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from pipeline import __version__
from pipeline.comparison.colours import line_of
from pipeline.comparison.curves import AXES, Thinned
from pipeline.comparison.differences import Difference
from pipeline.comparison.measures import show
from pipeline.comparison.report import Report
from pipeline.comparison.text import score_parts, shown_value, test_parts

_HERE = Path(__file__).parent

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>Comparison of {count} runs</h1>{heads}</header>
<main>
{sections}
</main>
<footer>electra {version}. All numbers, also those of the curves: compare.json beside this page.</footer>
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>
{script}</script>
</body>
</html>
"""

_CONTROLS = """<form id="controls">
<label>Metric <select name="metric"></select></label>
<label>Against <select name="axis"></select></label>
<label><input type="checkbox" name="log_x"> log x</label>
<label><input type="checkbox" name="log_y"> log y</label>
</form>
<div id="chart"></div>
<p id="caption"></p>"""


def render_page(report: Report) -> str:
    """The whole page."""
    names = ", ".join(run.name for run in report.runs)
    return _PAGE.format(
        title=escape(f"Comparison: {names}"), style=(_HERE / "page.css").read_text(encoding="utf-8"),
        count=len(report.runs), heads=_heads(report), sections="\n".join(filter(None, _sections(report))),
        version=__version__, data=_as_script(_data(report)), plotly=get_plotlyjs(),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )  # fmt: skip


def _sections(report: Report) -> Iterable[str]:
    yield _section("notes", "To bear in mind", f"<ul>{''.join(f'<li>{escape(note)}' for note in report.notes)}</ul>"
                   if report.notes else "")  # fmt: skip
    yield _section("differences", "What differs", _differences(report))
    yield _section("curves", "Curves", _CONTROLS if report.curves else "")
    yield _section("scores", "Scores", _scores(report))
    yield _section("measures", "Numbers", _measures(report))


def _section(name: str, heading: str, content: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{content}</section>' if content else ""


def _heads(report: Report) -> str:
    runs = (
        f"<li>{_swatch(number)}<strong>{escape(run.name)}</strong> "
        f"<span>{escape(str(run.facts.get('status') or ''))}</span><code>{escape(run.source)}</code>"
        for number, column in enumerate(report.columns)
        for run in column.runs
    )
    return f'<ul id="runs">{"".join(runs)}</ul>'


def _swatch(number: int) -> str:
    line = line_of(number)
    style = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "double"}[line.plotly_dash]
    return f'<i style="border-top: 3px {style} {line.colour}"></i>'


def _run_headings(report: Report) -> list[str]:
    return [f"{_swatch(number)}{escape(column.name)}" for number, column in enumerate(report.columns)]


def _differences(report: Report) -> str:
    own, following = report.differences.own, report.differences.following
    if not own and not following:
        return "<p>No key differs.</p>"
    body = []
    for kind, of_kind in groupby(own, key=lambda difference: difference.list):
        body.append(_group(kind, len(report.columns) + 2))
        body += [_row([_code(each.key), escape(each.stage or "–"), *_values(each)], 2) for each in of_kind]
    shown = _table(["key", "stage", *_run_headings(report)], body, 2) if own else "<p>No key was set otherwise.</p>"
    if following:
        rows = [_row([_code(each.key), _code(str(each.follows_from)), *_values(each)], 2) for each in following]
        table = _table(["key", "follows from", *_run_headings(report)], rows, 2)
        shown += f"<details><summary>What follows from these ({len(following)})</summary>{table}</details>"
    return shown


def _values(difference: Difference) -> list[str]:
    return [_code(shown_value(value)) for value in difference.values]


def _measures(report: Report) -> str:
    body = []
    for group, rows in groupby(report.measures, key=lambda row: row.group):
        body.append(_group(group, len(report.columns) + 1))
        body += [_row([_code(row.name) if "/" in row.name and " " not in row.name else escape(row.name),
                       *(escape(show(value, row.kind)) for value in row.values)], 1) for row in rows]  # fmt: skip
    return _table(["", *_run_headings(report)], body, 1)


def _scores(report: Report) -> str:
    if not report.scores:
        return ""
    headings = _run_headings(report)
    against = [f"{heading} less {headings[0]}" for heading in headings[1:]]
    body = []
    for row in report.scores:
        parts = (*map(score_parts, row.scores), *map(test_parts, row.tests))
        cells = (f"{escape(number)}<br><small>{escape(detail)}</small>" for number, detail in parts)
        body.append(_row([escape(row.task), escape(row.metric), *cells], 2))
    about = (
        "Per cent: median ± standard deviation over n seeds, of fine-tuning where nothing else is said; difference of "
        "the means with the two-sided p-value of a permutation test, alone and after Holm's correction over all tests "
        "of the table. With three seeds each p cannot be below 0.1."
    )
    return f"{_table(['task', 'metric', *headings, *against], body, 2)}<p>{about}</p>"


def _table(headings: Sequence[str], body: Iterable[str], text_columns: int) -> str:
    head = "".join(f"<th{_align(column, text_columns)}>{cell}</th>" for column, cell in enumerate(headings))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _row(cells: Sequence[str], text_columns: int) -> str:
    shown = "".join(f"<td{_align(column, text_columns)}>{cell}</td>" for column, cell in enumerate(cells))
    return f"<tr>{shown}</tr>"


def _align(column: int, text_columns: int) -> str:
    return "" if column < text_columns else ' class="value"'


def _group(name: str, columns: int) -> str:
    return f'<tr class="group"><th colspan="{columns}">{escape(name)}</th></tr>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _data(report: Report) -> dict[str, Any]:
    """What the script draws: for each metric and run the values, and which arrays of abscissae they go with."""
    places: list[dict[str, Any]] = []
    known: dict[bytes, int] = {}

    def place_of(curve: Thinned) -> int:
        """Metrics of the same logged lines share their abscissae."""
        key = b"".join(curve.axes[axis].tobytes() for axis in AXES)
        if key not in known:
            known[key] = len(places)
            places.append({axis: _packed(curve.axes[axis]) for axis in AXES})
        return known[key]

    curves = {
        name: [
            curve and {"places": place_of(curve), "values": _packed(curve.values), "lines": curve.num_lines,
                       "per_point": curve.lines_per_point}
            for curve in of_runs
        ]
        for name, of_runs in report.curves.items()
    }  # fmt: skip
    lines = [line_of(number) for number, column in enumerate(report.columns) for _ in column.runs]
    runs = [
        {"name": escape(run.name, quote=False), "colour": line.colour, "dash": line.plotly_dash}
        for run, line in zip(report.runs, lines, strict=True)
    ]
    return {"axes": AXES, "runs": runs, "places": places, "curves": curves}


def _packed(column: np.ndarray) -> dict[str, str]:
    """Full-precision numbers as plotly reads them."""
    return {"dtype": "f8", "bdata": base64.b64encode(column.astype("<f8").tobytes()).decode()}


def _as_script(content: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(content).replace("<", "\\u003c")
