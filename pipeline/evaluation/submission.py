"""Files for GLUE's server (a zip of all eleven) and for SQuAD's scripts and server."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.store import write_json
from data_shards.temporaries import publish_bytes

GLUE_FILES = ("CoLA", "SST-2", "MRPC", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "QQP", "RTE", "WNLI", "AX")
"""Names of the files that the server wants, without ``.tsv``. AX are the diagnostics, answered by MNLI's model."""

_LIMITS = {"STS-B": (0.0, 5.0)}


def write_glue(folder: Path, name: str, kind: str, rows: Sequence[str | float]) -> Path:
    """Writes the predictions on a test file as the server wants them.

    Args:
        folder: Where to write it; made if need be.
        name: The file's, without ``.tsv``; GLUE's are ``GLUE_FILES``.
        kind: The task's: a ``regression`` predicts scores, of which STS-B's are cut to 0 to 5; others class names.
        rows: Predictions in the order of the test file.

    Raises:
        ValueError: A score is not finite, or a class name would break the table.
    """
    limits = _LIMITS.get(name, (-math.inf, math.inf))
    cells = [_score(row, *limits) if kind == "regression" else str(row) for row in rows]
    broken = [cell for cell in cells if not cell or set(cell) & set("\t\r\n")]
    if broken:
        raise ValueError(
            f"{name}: {broken[0]!r} cannot stand in a table with tabs; rename the class in the task's files"
        )
    lines = ["index\tprediction", *(f"{index}\t{cell}" for index, cell in enumerate(cells))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tsv"
    publish_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def _score(value: str | float, lowest: float, highest: float) -> str:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a score of {number} was predicted; the fine-tuning run behind it diverged")
    return f"{min(max(number, lowest), highest):.3f}"


def check_complete(folder: Path) -> list[str]:
    """Names of GLUE's files that are not in the folder; the server refuses a zip without all of them."""
    return [f"{name}.tsv" for name in GLUE_FILES if not (folder / f"{name}.tsv").is_file()]


def write_squad(folder: Path, name: str, predictions: Mapping[str, str]) -> Path:
    """Writes answers by question id, "" for none, as ``<name>.json``: what the official scripts read."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, dict(predictions))
    return path
