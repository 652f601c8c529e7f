"""Tasks of an evaluation: their files, and their examples, read once and checked.

What a task file can say is ``task_file``; which files hold a split is ``locate``.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.digest import digest_file
from data_shards.keys import content_key
from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedError
from pipeline.evaluation.examples import Answer as Answer
from pipeline.evaluation.examples import AnyExample, Example, TaggedSentence, example_maker
from pipeline.evaluation.examples import Question as Question
from pipeline.evaluation.locate import find_split
from pipeline.evaluation.readers import Wanted, read_rows, shorten
from pipeline.evaluation.task_file import TaskConfig, read_task_file
from pipeline.log import logger

_SAID: set[str] = set()


class Task:
    """A task and the files of its splits.

    Attributes:
        config: Content of the task file.
        files: Split to its files, in order; train, dev, and what there is of ``also`` and ``test``.
    """

    def __init__(self, config: TaskConfig, files: dict[str, tuple[Path, ...]]):
        self.config = config
        self.files = files
        self._examples: dict[str, list[Any]] = {}
        self._num_examples: dict[str, int] = {}
        self._classes: tuple[str, ...] | None = None
        self._digest: str | None = None

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.config.name

    @property
    def kind(self) -> str:
        """Kind of the task."""
        return self.config.kind

    def parts(self) -> list[str]:
        """Labelled splits that are scored: dev, then those of ``also`` that are there."""
        return ["dev", *(name for name in self.config.also if name in self.files)]

    def tests(self) -> list[str]:
        """Unlabelled splits that are there."""
        return [name for name in self.config.test if name in self.files]

    def digest(self) -> str:
        """Changes with what the task file says and what its files hold, not with where they lie."""
        if self._digest is None:
            about = self.config.model_dump(mode="json", exclude={"train", "dev", "also", "test", "hub"})
            hub = self.config.hub
            about["hub"] = hub.model_dump(mode="json", include={"fields", "labels"}) if hub else None
            splits = {name: [digest_file(path) for path in paths] for name, paths in self.files.items()}
            self._digest = content_key({"task": about, "parts": self.parts(), "tests": self.tests(), "files": splits})
        return self._digest

    def examples(self, split: str) -> list[Any]:
        """All examples of a split in file order: ``Example``, ``TaggedSentence`` or ``Question``.

        Raises:
            ConfigError: A scored part has a class that train lacks.
            DamagedError: A file or a row is not what the task says; names file and row.
        """
        if split not in self._examples:
            examples = self._read(split)
            if split in self.parts():
                self._compare_with_train(split, examples)
            self._examples[split] = examples
            self._num_examples[split] = len(examples)
        return self._examples[split]

    def num_examples(self, split: str) -> int:
        """How many there are; raises as ``examples``."""
        return self._num_examples.get(split) or len(self.examples(split))

    def forget_examples(self) -> None:
        """Frees their memory; they are read again when they are asked for."""
        self._examples.clear()

    def classes(self) -> tuple[str, ...] | None:
        """The classes in order, of a tagging task the tags of train; None where there are none.

        Raises:
            ConfigError: ``positive`` is not one of them.
            DamagedError: As ``examples``; also fewer than two classes in train.
        """
        if self.kind not in ("classification", "pair", "tagging"):
            return None
        if self._classes is None:
            found = sorted(_count_labels(self.examples("train")))
            path, config = self.files["train"][0], self.config
            if len(found) < 2:
                raise DamagedError(f"{path}: one class only, {found[0]}; a task needs two, check the file and label")
            if config.positive is not None and config.positive not in (config.labels or found):
                raise ConfigError(f"task {self.name}: positive: {config.positive!r} is not among {shorten(found)}")
            self._classes = config.labels or tuple(found)
        return self._classes

    def check(self) -> None:
        """Reads every split.

        Raises:
            ConfigError: As ``examples`` and ``classes``; ``no_answer``, and no question of train is without one.
            DamagedError: As ``examples`` and ``classes``.
        """
        for split in self.files:
            self.examples(split)
        self.classes()
        if self.config.no_answer and all(question.answers for question in self.examples("train")):
            raise ConfigError(
                f"{self.files['train'][0]}: task {self.name} has no_answer: true, but every question has an answer, as "
                "in SQuAD 1.1; put the right file in place, or say no_answer: false"
            )

    def _read(self, split: str) -> list[AnyExample]:
        labelled = split not in self.config.test
        problems = _Problems(skip=labelled and self.config.bad_rows == "skip")
        examples = list(self._examples_of(self.files[split], labelled, problems))
        problems.report(self.name, split)
        if not examples:
            raise DamagedError(f"{self.files[split][0]}: no examples in it; fetch the task's data again")
        return examples

    def _examples_of(self, paths: tuple[Path, ...], labelled: bool, problems: "_Problems") -> Iterator[AnyExample]:
        wanted, make = self._wanted(labelled), example_maker(self.config, labelled)
        number = -1
        known: set[str] = set()
        for path in paths:
            for place, values in read_rows(path, wanted, problems):
                number += 1
                try:
                    example = make(values, number)
                    if example.id in known:
                        raise ValueError(f"id {example.id!r} occurs twice; predictions are told apart by it")
                except ValueError as error:
                    problems(path, place, str(error))
                    continue
                known.add(example.id)
                yield example

    def _wanted(self, labelled: bool) -> Wanted:
        config, hub = self.config, self.config.hub
        return Wanted(
            kind=config.kind,
            text=config.text,
            label=config.label if labelled else None,
            optional=(config.id, "is_impossible") if config.kind == "question_answering" else (config.id,),
            columns=config.columns,
            aliases={ours: theirs for theirs, ours in hub.fields.items()} if hub else {},
            classes=hub.labels if hub else (),
        )

    def _compare_with_train(self, split: str, examples: list[Any]) -> None:
        """A class that training never shows is a mistake, a tag is not: such words can only be wrong."""
        classes = self.classes()
        if classes is None or self.config.labels:
            return
        unknown = {label: count for label, count in _count_labels(examples).items() if label not in classes}
        path = self.files[split][0]
        if unknown and self.kind == "tagging":
            tags = ", ".join(f"{tag} ({count})" for tag, count in sorted(unknown.items()))
            logger.warning(f"evaluate: task {self.name}: {path} has tags that train lacks, never to be right: {tags}")
        elif unknown:
            first = next(example.id for example in examples if example.label in unknown)
            raise ConfigError(
                f"{path}: only the {split} file has {shorten(sorted(unknown))} (first: example {first}); train has "
                f"{shorten(classes)}; check both files, and label in the task file"
            )


class _Problems:
    """Bad rows: the first one is an error, or all are counted and left out."""

    def __init__(self, skip: bool):
        self._skip = skip
        self._count = 0
        self._first = ""

    def __call__(self, path: Path, place: int | str, reason: str) -> None:
        message = f"{path}:{place}: {reason}" if isinstance(place, int) else f"{path}: {place}: {reason}"
        if not self._skip:
            raise DamagedError(f"{message}; correct the file, or the task file if that is wrong")
        self._first = self._first or message
        self._count += 1

    def report(self, task: str, split: str) -> None:
        """Says how many rows were left out."""
        if self._count:
            logger.warning(
                f"evaluate: task {task}: {self._count} rows of {split} are left out (bad_rows: skip), the first is "
                f"{self._first}"
            )


def load_tasks(config: Config) -> list[Task]:
    """The tasks of ``evaluate.tasks`` and where their files are; nothing of those is read yet.

    Raises:
        ConfigError: An unknown task, a wrong task file, or data that is not there; two tasks of different datasets have
            one file.
    """
    tasks = [_locate(task, config.evaluate.data_dir, folders) for task, folders in _task_files(config)]
    _refuse_in_common(tasks)
    return tasks


def load_task_configs(config: Config) -> list[TaskConfig]:
    """The same tasks, whether or not their data is there.

    Raises:
        ConfigError: An unknown task, or a wrong task file.
    """
    return [task for task, _ in _task_files(config)]


def _task_files(config: Config) -> list[tuple[TaskConfig, tuple[Path, ...]]]:
    if not config.evaluate.tasks:
        raise ConfigError("evaluate.tasks is empty; name tasks of configs/tasks, or task files of your own")
    tasks = [read_task_file(name) for name in config.evaluate.tasks]
    names = [task.name for task, _ in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluate.tasks: two tasks have the same name among {', '.join(names)}; give one another")
    return tasks


def _locate(config: TaskConfig, data_dir: Path | None, folders: tuple[Path, ...]) -> Task:
    found = {split: find_split(config, split, data_dir, folders) for split in config.file_names()}
    for split in ("train", "dev"):
        if not found[split]:
            raise _missing(config, split, data_dir, folders)
    absent = [split for split, paths in found.items() if not paths]
    if absent:
        _say_once(f"evaluate: task {config.name}: no file for {', '.join(absent)}; scored and predicted without")
    return Task(config, {split: paths for split, paths in found.items() if paths})


def _refuse_in_common(tasks: list[Task]) -> None:
    """What stands in no folder of its own may be any dataset's."""
    readers: dict[Path, Task] = {}
    for task in tasks:
        hub = task.config.hub
        for path in (path for split, paths in task.files.items() for path in paths if hub and split in hub.splits):
            other = readers.setdefault(path, task)
            if hub and other.config.hub and other.config.hub.path != hub.path:
                raise ConfigError(
                    f"evaluate: tasks {other.name} and {task.name} would both read {path}, which cannot be both "
                    f"{other.config.hub.path} and {hub.path}; put each below evaluate.data_dir in a folder of that name"
                )


def _missing(config: TaskConfig, split: str, data_dir: Path | None, folders: tuple[Path, ...]) -> ConfigError:
    path = (data_dir or folders[0]) / config.file_names()[split]
    remedy = "put the data in place or set evaluate.data_dir"
    if config.hub and split in config.hub.splits:
        remedy += ", or fetch it by `electra evaluate CONFIG --prefetch` on a machine with internet"
    return ConfigError(f"evaluate: task {config.name!r} needs {path}, which is not there; {remedy}")


def _say_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        logger.info(message)


def _count_labels(examples: list[Any]) -> Counter[str]:
    if examples and isinstance(examples[0], TaggedSentence):
        return Counter(tag for sentence in examples for tag in sentence.tags or ())
    return Counter(example.label for example in examples if isinstance(example, Example))  # type: ignore[misc]
