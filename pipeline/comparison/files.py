"""A comparison as files."""

import json
from pathlib import Path

from data_shards.temporaries import publish_bytes
from pipeline.comparison.page import render_page
from pipeline.comparison.pictures import draw_pictures
from pipeline.comparison.report import Report, to_json


def write_files(report: Report, folder: Path) -> list[Path]:
    """Writes page, numbers and pictures; returns what was written, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "compare.html", folder / "compare.json"
    publish_bytes(page, render_page(report).encode("utf-8"))
    publish_bytes(numbers, json.dumps(to_json(report), allow_nan=False).encode("utf-8"))
    return [page, *draw_pictures(report.columns, folder), numbers]
