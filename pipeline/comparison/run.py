"""A run as it is compared, wherever it was read from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.comparison.curves import Curves
from pipeline.config import flatten
from pipeline.evaluation.stored import Results

MAX_CHARACTERS = 6000
"""What MLflow keeps of a parameter's value; values from a folder are cut alike."""


@dataclass
class Run:
    """What is known of one run.

    Attributes:
        name: Heads its column; ``find`` makes names distinct.
        source: Its folder, or its place in MLflow.
        settings: Every key of its configuration, values as text.
        numerics: What was chosen for keys that may be automatic, by the names that the stage records; values as text.
        curves: Its journal.
        facts: ``status``, ``attempts``, ``git``, ``goodput_pct``; None where it is not known.
        results: Of the configured checkpoint, see ``pipeline.evaluation.results``.
        all_results: Of every checkpoint that was evaluated.
        task_digests: Digest of a task's file and data, or its first characters, where it is known.
        notes: What could not be read.
        identity: The id that it has in its folder and in MLflow; empty where it was not written.
        is_tracked: Whether it was read from MLflow.
    """

    name: str
    source: str
    settings: dict[str, str]
    numerics: dict[str, str]
    curves: Curves
    facts: dict[str, Any]
    results: Results | None = None
    all_results: list[Results] = field(default_factory=list)
    task_digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    identity: str = ""
    is_tracked: bool = False

    def is_same_as(self, other: "Run") -> bool:
        """Whether both were read of one run; a copy of a folder is another, as it may have gone on by itself."""
        of_mlflow = self.is_tracked or other.is_tracked
        return self.source == other.source or (of_mlflow and self.identity == other.identity != "")


def as_text(value: Any) -> str:
    """A value as MLflow holds it."""
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return text[:MAX_CHARACTERS]


def settings_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Flat keys to text, a key for every field of a corpus: ``data.corpora.<name>.<field>``.

    Args:
        values: ``section.key`` to its value; ``data.corpora`` as a list or as its JSON text.
    """
    settings = {key: as_text(value) for key, value in values.items()}
    try:
        corpora = {corpus.pop("name"): corpus for corpus in json.loads(settings.pop("data.corpora", "[]"))}
    except ValueError:  # longer than MLflow keeps: compared as it is
        return settings | {"data.corpora": as_text(values["data.corpora"])}
    return settings | {key: as_text(value) for key, value in flatten({"data.corpora": corpora}).items()}


def distinct_names(names: Sequence[str]) -> list[str]:
    """The same names; of equal ones the later ones get a number."""
    distinct: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in distinct:
            number += 1
            candidate = f"{name} ({number})"
        distinct.append(candidate)
    return distinct
