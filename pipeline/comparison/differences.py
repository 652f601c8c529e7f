"""Which keys differ between runs, which list each stands in, and which of them follow from others."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.config import SIZES
from model.objective import RECIPES, SHARING_FOLLOWS_FROM, default_sharing
from pipeline.comparison.run import Run, as_text
from pipeline.keys import EXECUTION, NUMERICS, SCIENCE

LISTS = ("science", "numerics", "execution", "unknown")
"""In the order of the table; unknown: keys that this version does not have."""

_IDENTITY = ("run.name", "run.variant", "run.dir")
_CHOSEN = {
    "launch.processes": "world_size",
    "launch.threads_per_process": "threads",
    "launch.device": "device",
    "train.micro_batch_size": "micro_batch_rows",
    "kernels.compile_layers": "compile_layers",
}
"""Keys that may be automatic, and under which name the stage records what was chosen."""

_SHARING_FOLLOWS = tuple(f"objective.{name}" for name in SHARING_FOLLOWS_FROM)

Settings = dict[str, str]


@dataclass(frozen=True)
class Difference:
    """A key whose values differ.

    Attributes:
        list: One of ``LISTS``.
        stage: Of a science key: whose fingerprint it enters.
        values: One for each run; None where a run did not record it.
        follows_from: The key that this one is a consequence of: one that differs as well, or a budget.
    """

    key: str
    list: str
    stage: str
    values: tuple[str | None, ...]
    follows_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Differences:
    """What differs.

    Attributes:
        own: Keys that were set otherwise, by list and name.
        following: Keys that follow from those.
        recorded_by_some: Keys that not all of the runs know.
    """

    own: tuple[Difference, ...]
    following: tuple[Difference, ...]
    recorded_by_some: tuple[str, ...]


def find_differences(runs: Sequence[Run]) -> Differences:
    """Compares the settings of runs, as resolved as all of them are."""
    all_settings = _resolve(runs)
    names = sorted(set().union(*all_settings) - set(_IDENTITY))
    shared = [key for key in names if all(key in settings for settings in all_settings)]
    changed = {key for key in shared if len({settings[key] for settings in all_settings}) > 1}
    if "deepspeed.config" in changed and _is_one_file(all_settings):
        changed.remove("deepspeed.config")
    found = []
    for key in changed:
        kind, stage = list_of(key)
        values = tuple(settings[key] for settings in all_settings)
        found.append(Difference(key, kind, stage, values, _cause(key, changed, all_settings)))
    found.sort(key=lambda difference: (LISTS.index(difference.list), difference.key))
    own = tuple(difference for difference in found if difference.follows_from is None)
    following = tuple(difference for difference in found if difference.follows_from is not None)
    return Differences(own, following, tuple(key for key in names if key not in shared))


def list_of(key: str) -> tuple[str, str]:
    """The list that a key stands in, and of a science key its stage."""
    if key.startswith("data.corpora."):
        field = key.rpartition(".")[2]
        if field in ("path", "name"):  # files enter fingerprints by content
            return "execution", ""
        return "science", "pretrain" if field == "weight" else "tokenize"
    if key == "tokenizer.sha256":
        return "science", "tokenize"
    for stage, keys in SCIENCE.items():
        if key in keys:
            return "science", stage
    if key in NUMERICS or key.startswith("kernels.") or key == "deepspeed.zero_stage":
        return "numerics", ""
    return ("execution" if key in EXECUTION else "unknown"), ""


def _resolve(runs: Sequence[Run]) -> list[Settings]:
    """Settings with what was chosen in place of ``auto``, if all runs have got so far as to choose."""
    resolved = []
    all_chosen = all(run.numerics for run in runs)
    for run in runs:
        settings = dict(run.settings)
        if all_chosen:
            settings |= {key: run.numerics[name] for key, name in _CHOSEN.items() if name in run.numerics}
            settings |= {key: value for key, value in run.numerics.items() if key.startswith("kernels.")}
            settings |= {"deepspeed.zero_stage": run.numerics["zero_stage"]} if "zero_stage" in run.numerics else {}
        resolved.append(settings)
    return resolved


def _is_one_file(all_settings: Sequence[Settings]) -> bool:
    """Whether DeepSpeed's files say the same; of files that are not here, whether name and ZeRO stage do."""
    paths = [Path(own["deepspeed.config"]) for own in all_settings]
    try:
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    except (OSError, ValueError):
        names = {path.name for path in paths}
        stages = {own.get("deepspeed.zero_stage") for own in all_settings}
        return len(names) == len(stages) == 1 and None not in stages
    return all(content == contents[0] for content in contents)


def _cause(key: str, changed: set[str], all_settings: Sequence[Settings]) -> str | None:
    """The key that this one follows from, by the table in this folder's README."""

    def everywhere(holds: Callable[[Settings], bool]) -> bool:
        return all(holds(settings) for settings in all_settings)

    section, _, name = key.partition(".")
    if section == "model" and "model.size" in changed:
        published = everywhere(lambda own: own[key] == as_text(SIZES.get(own["model.size"], {}).get(name)))
        return "model.size" if published else None
    if section == "objective" and "recipe" in changed and name in RECIPES["fixed"]:
        usual = everywhere(lambda own: own[key] == as_text(RECIPES.get(own["recipe"], {}).get(name)))
        return "recipe" if usual else None
    if key == "objective.sharing":
        return _first(_SHARING_FOLLOWS, changed) if everywhere(_has_usual_sharing) else None
    if key == "train.steps":
        return "train.flops" if everywhere(lambda own: own.get("train.flops", "None") != "None") else None
    return _first(_possible_causes(key, changed), changed - {key})


def _has_usual_sharing(own: Settings) -> bool:
    """Whether sharing is what the schema fills in where a file does not say."""
    given = {name: own[key] for name, key in zip(SHARING_FOLLOWS_FROM, _SHARING_FOLLOWS, strict=True) if key in own}
    return own["objective.sharing"] == default_sharing(given)


def _possible_causes(key: str, changed: set[str]) -> Iterable[str]:
    if key == "tokenizer.sha256":
        return sorted(other for other in changed if list_of(other) == ("science", "tokenize"))
    if key.startswith("kernels.") and key not in NUMERICS:
        return ("kernels.backend", "launch.device")
    return ("deepspeed.config",) if key == "deepspeed.zero_stage" else ()


def _first(candidates: Iterable[str], among: set[str]) -> str | None:
    return next((candidate for candidate in candidates if candidate in among), None)
