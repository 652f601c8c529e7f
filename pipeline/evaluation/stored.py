"""Results that an evaluation has left, read without anything heavy."""

import json
from pathlib import Path
from typing import Any

from pipeline.log import logger

Results = dict[str, Any]
"""Content of a results.json, see ``pipeline.evaluation.results``."""


def read_results(path: Path) -> Results | None:
    """A file that was written here; None where it is absent, or damaged, which is said."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results if {"tasks", "score", "checkpoint"} <= results.keys() else None
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, OSError) as error:
        logger.warning("%s: damaged (%s); left out", path, error)
        return None
