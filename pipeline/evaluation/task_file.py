"""Schema of a task file, which says what a downstream task is, where its examples lie and how it is scored.

A task is a YAML file, so a new one needs no code:

    name: reviews
    kind: classification        # pair, regression, tagging, question_answering
    train: reviews/train.tsv
    dev: reviews/dev.tsv
    text: [sentence]            # fields of an example
    label: label
    metrics: [accuracy]         # the first one is the task's score

``like: NAME`` starts from a bundled task, or another file, over whose keys this file's go.
"""

import os
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from model.config import Section
from pipeline.config import FineTuning
from pipeline.config_file import parse_yaml
from pipeline.errors import ConfigError

BUNDLED = Path(__file__).resolve().parents[2] / "configs" / "tasks"

Kind = Literal["classification", "pair", "regression", "tagging", "question_answering"]
Metric = Literal[
    "accuracy", "f1", "matthews", "pearson", "spearman", "span_f1", "exact", "best_exact", "best_f1"
]  # fmt: skip

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "pair": ("accuracy", "f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "tagging": ("accuracy", "span_f1"),
    "question_answering": ("exact", "f1", "best_exact", "best_f1"),
}
"""Metrics that a kind of task can have."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "regression": {"metrics": ["spearman", "pearson"]},
    "question_answering": {"text": ["question", "context"], "label": "answers", "metrics": ["exact", "f1"]},
}
_NUM_TEXTS = {"classification": (1, 2), "pair": (2, 2), "regression": (1, 2), "tagging": (1, 1)}
_ONLY_FOR = {
    "labels": ("classification", "pair"),
    "positive": ("classification", "pair"),
    "label_range": ("regression",),
    "symmetric": ("pair", "regression"),
    "no_answer": ("question_answering",),
}
_MERGED = ("recipe", "hub")


class HubSource(Section):
    """A dataset of the Hugging Face hub with the same examples."""

    path: str = Field(min_length=1, description="Name on the hub, or a folder.")
    config: str | None = Field(None, description="Configuration of the dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    splits: dict[str, str] = Field(
        default_factory=dict, description="Our split to the hub's; CONFIG/SPLIT for one of another configuration."
    )
    fields: dict[str, str] = Field(default_factory=dict, description="Column of the hub to our field.")
    labels: tuple[str, ...] = Field((), description="Our class names in the order of the hub's numbers.")


class TaskConfig(Section):
    """Content of a task file; relative file names start at evaluate.data_dir, or else at the file's folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names folders and metrics.")
    kind: Kind = Field(description="One text, two, a score, a tag for each word, or a span of a text.")
    train: str = Field(min_length=1, description="File of the training examples.")
    dev: str = Field(min_length=1, description="File of the examples that are scored.")
    also: dict[str, str] = Field(default_factory=dict, description="Further labelled parts, scored where they are.")
    test: dict[str, str] = Field(default_factory=dict, description="Unlabelled parts by their name in a submission.")
    text: tuple[str, ...] = Field(min_length=1, max_length=2, description="Fields with the text or texts.")
    label: str = Field("label", description="Field with the label, score, tags or answers.")
    id: str = Field("id", description="Field with the id; where there is none, rows are numbered from 0.")
    columns: tuple[str, ...] = Field((), description="Columns of a text file whose first line does not name them.")
    labels: tuple[str, ...] = Field((), description="The classes in order; by default those of train, sorted.")
    positive: str | None = Field(None, description="Class that F1 counts; by default the last one.")
    label_range: tuple[float, float] | None = Field(
        None, description="Lowest and highest score, trained as 0 and 1; of train."
    )
    metrics: tuple[Metric, ...] = Field(("accuracy",), min_length=1, description="The first one is the task's score.")
    symmetric: bool = Field(False, description="Whether the two texts can change places.")
    mnli_init: bool = Field(False, description="Whether evaluate.mnli_init is for this task.")
    in_glue_average: bool = Field(False, description="Whether a task of the eight counts in the GLUE average.")
    bad_rows: Literal["error", "skip"] = Field("error", description="What to do with a labelled row that is broken.")
    tag_scheme: Literal["as_given", "bioes"] = Field("as_given", description="Tags that are trained.")
    no_answer: bool = Field(False, description="Whether questions may have no answer, as in SQuAD 2.0.")
    recipe: FineTuning = Field(
        default_factory=FineTuning,  # type: ignore[arg-type]
        description="What this task's fine-tuning does otherwise.",
    )
    hub: HubSource | None = Field(None, description="Where `electra evaluate CONFIG --prefetch` gets the files.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_kind(cls, given: Any) -> Any:
        return _DEFAULTS.get(str(given.get("kind")), {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "TaskConfig":
        least, most = _NUM_TEXTS.get(self.kind, (2, 2))
        if not least <= len(self.text) <= most:
            raise ValueError(f"kind {self.kind} needs {most} text field{'s' * (most > 1)}, not {len(self.text)}")
        foreign = [key for key, kinds in _ONLY_FOR.items() if getattr(self, key) and self.kind not in kinds]
        if foreign:
            raise ValueError(f"{foreign[0]} is only for kind {' or '.join(_ONLY_FOR[foreign[0]])}, not {self.kind}")
        if self.tag_scheme != "as_given" and self.kind != "tagging":
            raise ValueError(f"tag_scheme is only for kind tagging, not {self.kind}")
        if self.symmetric and len(self.text) != 2:
            raise ValueError("symmetric needs two text fields")
        return self

    @model_validator(mode="after")
    def _metrics_can_be_had(self) -> "TaskConfig":
        wrong = [metric for metric in self.metrics if metric not in METRICS[self.kind]]
        if wrong:
            raise ValueError(f"kind {self.kind} has no metric {wrong[0]}; it has {', '.join(METRICS[self.kind])}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics names one twice: {', '.join(self.metrics)}")
        if not self.no_answer and {"best_exact", "best_f1"} & set(self.metrics):
            raise ValueError("best_exact and best_f1 choose when to give no answer; they need no_answer: true")
        return self

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> "TaskConfig":
        if self.labels and len(set(self.labels)) != max(len(self.labels), 2):
            raise ValueError(f"labels must be two or more different classes, not {', '.join(self.labels)}")
        if self.labels and self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"positive: {self.positive!r} is not one of labels: {', '.join(self.labels)}")
        if self.label_range and self.label_range[0] >= self.label_range[1]:
            raise ValueError(f"label_range: {self.label_range[0]:g} is not below {self.label_range[1]:g}")
        return self

    @model_validator(mode="after")
    def _names_are_consistent(self) -> "TaskConfig":
        names = ["train", "dev", *self.also, *self.test]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two parts are called {twice[0]}; train, dev, also and test need different names")
        if any(not name or "/" in name or name.startswith(".") for name in names):
            raise ValueError("the names in also and test become file names: no slash, and no dot at the begin")
        if self.kind == "question_answering" and "answered" in names:
            raise ValueError("no part can be called answered: predictions_answered.json is a file of dev")
        absent = [name for name in (*self.text, self.label) if self.columns and name not in self.columns]
        if absent:
            raise ValueError(f"columns has no {absent[0]}, which text or label names")
        unknown = [name for name in (self.hub.splits if self.hub else ()) if name not in names]
        if unknown:
            raise ValueError(f"hub.splits: there is no {unknown[0]} among {', '.join(names)}")
        return self

    def file_names(self) -> dict[str, str]:
        """File of each split: train, dev, further labelled parts, unlabelled parts."""
        return {"train": self.train, "dev": self.dev, **self.also, **self.test}


def read_task_file(name: str) -> tuple[TaskConfig, tuple[Path, ...]]:
    """A task by its bundled name or its file's path, and the folders that its relative file names start at.

    Raises:
        ConfigError: No such task, or a file that is not one.
    """
    values, folders = _read_values(name, ())
    path = _path_of(name, Path())
    try:
        return TaskConfig.model_validate(values), folders
    except ValidationError as error:
        _refuse(path, error)


def _path_of(name: str, folder: Path) -> Path:
    own = name.endswith((".yaml", ".yml"))
    return Path(os.path.normpath(folder / name)) if own else BUNDLED / f"{name}.yaml"


def _read_values(name: str, inside: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """A file's keys over those of the one it is like, and the folders of both."""
    path = _path_of(name, inside[-1].parent if inside else Path())
    if path in inside:
        raise ConfigError(f"{path}: like: {name} leads back to this file; name another task")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.yaml")))
        asked = f"{inside[-1]}: like" if inside else "evaluate.tasks"
        raise ConfigError(f"{asked}: no task {name!r} ({path}); bundled are {known}, or give a task file")
    values = _parse(path)
    other = values.pop("like", None)
    if other is None:
        return values, (path.parent,)
    if not isinstance(other, str):
        raise ConfigError(f"{path}: like: {other!r} is not a name; give a bundled task or a task file")
    below, folders = _read_values(other, (*inside, path))
    return _over(below, values), tuple(dict.fromkeys((path.parent, *folders)))


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        problem = str((isinstance(error, MarkedYAMLError) and error.problem) or error)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML ({' '.join(problem.split())[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: content: a task file is a mapping of keys, not {type(values).__name__}")
    return values


def _over(below: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Own keys go over the others; of recipe and hub, key by key. An own file is not to be had from the hub."""
    merged = below | values
    for key in _MERGED:
        if isinstance(below.get(key), dict) and isinstance(values.get(key), dict):
            merged[key] = below[key] | values[key]
    hub = merged.get("hub")
    if isinstance(hub, dict) and "splits" not in (values.get("hub") or {}):
        replaced = {key for key in ("train", "dev") if key in values}
        for key in ("also", "test"):
            replaced |= set(below.get(key) or ()) if key in values else set()
        merged["hub"] = hub | {
            "splits": {key: split for key, split in (hub.get("splits") or {}).items() if key not in replaced}
        }
    return merged


def _refuse(path: Path, error: ValidationError) -> NoReturn:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "content"
    if first["type"] == "extra_forbidden":
        where, problem = f"unknown key {where}", f"a task has {', '.join(['like', *TaskConfig.model_fields])}"
    elif first["type"] == "missing":
        problem = "missing; add it to the task file"
    else:
        problem = str(first["msg"]).removeprefix("Value error, ")
    value = first.get("input")
    shown = f"={value!r}" if isinstance(value, str | int | float | bool) and first["loc"] else ""
    raise ConfigError(f"{path}: {where}{shown if where[:7] != 'unknown' else ''}: {problem}") from None
