"""Examples of each kind, made from rows and checked; a ``ValueError`` says what is wrong with a row."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.readers import shorten
from pipeline.evaluation.task_file import TaskConfig


@dataclass(frozen=True, slots=True)
class Example:
    """One or two texts; ``label`` is a class name, a number for regression, or None where it is not known."""

    id: str
    texts: tuple[str, ...]
    label: str | float | None


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """Words and a tag for each; None where they are not known."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of a context and the character it starts at."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a context; without answers it has none there, or they are not known."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


AnyExample = Example | TaggedSentence | Question
Maker = Callable[[tuple[Any, ...], int], AnyExample]
"""From the values of a row, in the order of the fields asked for, and its number."""


def example_maker(config: TaskConfig, labelled: bool) -> Maker:
    """What makes examples of a task's rows, with or without their label."""
    if config.kind == "tagging":
        return lambda values, number: _tagged(values, number, labelled)
    if config.kind == "question_answering":
        return lambda values, _: _question(values, config, labelled)
    return _text_maker(config, labelled)


def _text_maker(config: TaskConfig, labelled: bool) -> Maker:
    num_texts = len(config.text)
    classes = frozenset(config.labels)
    to_label = _score if config.kind == "regression" else _class_name

    def make(values: tuple[Any, ...], number: int) -> Example:
        texts = tuple([_text(value, config.text[i], labelled) for i, value in enumerate(values[:num_texts])])
        label = to_label(values[num_texts], config) if labelled else None
        if classes and labelled and label not in classes:
            raise ValueError(f"label {label!r} is not among labels: {shorten(config.labels)}")
        name = values[-1]
        return Example(str(number) if name is None else str(name), texts, label)

    return make


def _text(value: Any, name: str, labelled: bool) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not a text")
    if labelled and (not value or value.isspace()):  # an unlabelled row has to be predicted, whatever it is
        raise ValueError(f"{name} is empty")
    return value or ""


def _class_name(value: Any, config: TaskConfig) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{config.label} is {type(value).__name__}, not a class")
    name = "" if value is None else str(value)
    if not name or name.isspace():
        raise ValueError(f"the label ({config.label}) is missing")
    return name


def _score(value: Any, config: TaskConfig) -> float:
    if value is None or value == "":
        raise ValueError(f"the label ({config.label}) is missing")
    try:
        score = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"label {value!r} is not a number")
    if config.label_range and not config.label_range[0] <= score <= config.label_range[1]:
        lowest, highest = config.label_range
        raise ValueError(f"label {score:g} is outside label_range, {lowest:g} to {highest:g}")
    return score


def _tagged(values: tuple[Any, ...], number: int, labelled: bool) -> TaggedSentence:
    words = _strings(values[0], "words")
    if not words:
        raise ValueError("a sentence without words")
    tags = _strings(values[1], "tags") if labelled else None
    if tags is not None and len(tags) != len(words):
        raise ValueError(f"{len(words)} words, but {len(tags)} tags")
    name = values[-1]
    return TaggedSentence(str(number) if name is None else str(name), words, tags)


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"the {what} are {type(value).__name__}, not a list")
    for number, one in enumerate(value):
        if isinstance(one, int) and what == "tags":
            raise ValueError(f"tag number {one} has no name; give the names in order as hub.labels")
        if not isinstance(one, str) or not one.strip(" \t\r\n"):
            raise ValueError(f"number {number} of the {what} is empty or not a text: {one!r}")
    return tuple(value)


def _question(values: tuple[Any, ...], config: TaskConfig, labelled: bool) -> Question:
    *_, name, flag = values
    if name is None or name == "":
        raise ValueError("a question without id; answers are handed in by it")
    question, context = (_text(value, config.text[i], labelled) for i, value in enumerate(values[:2]))
    answers = _answers(values[2], context) if labelled else ()
    if labelled:
        _check_possible(bool(answers), flag, config.no_answer)
    return Question(str(name), question, context, answers)


def _check_possible(has_answers: bool, flag: bool | None, no_answer: bool) -> None:
    """``flag`` is None in the hub's layout, where a question without answers is an impossible one."""
    if flag and has_answers:
        raise ValueError("is_impossible, but it has answers")
    if not has_answers and not no_answer:
        raise ValueError("it has no answer, which SQuAD 1.1 does not know; no_answer: true is SQuAD 2.0")
    if not has_answers and flag is False:
        raise ValueError("it has no answer, but is not marked is_impossible")


def _answers(given: Any, context: str) -> tuple[Answer, ...]:
    """From ``{"text": [...], "answer_start": [...]}``, or a list of such pairs."""
    if given is None:
        raise ValueError("the answers are missing")
    try:
        if isinstance(given, dict):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
    except (KeyError, TypeError, ValueError):
        raise ValueError("the answers do not have a text and an answer_start each") from None
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise ValueError(f"answer {text!r} at {start!r} is not a text and a number")
        if start < 0 or not context.startswith(text, start):
            found = context[max(start, 0) : max(start, 0) + len(text)]
            raise ValueError(f"answer {text[:60]!r} is not at answer_start {start} of its context, {found[:60]!r} is")
    return tuple(Answer(text, start) for text, start in pairs)
