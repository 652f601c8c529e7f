"""Question answering: the span of the context that answers, or that there is none.

A context that is too long is read in overlapping windows. A token's score is that of the window in which it has most
context; a question's best span is the best over its windows, its null score the least over them (as released).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.tokenizer import Tokenizer
from model.config import ModelConfig
from model.finetuning import Examples, JointSpanHead, SimpleSpanHead, Spans, SpanTargets
from pipeline.evaluation.features import Feature, encode_texts, join_segments
from pipeline.evaluation.processors import Outcome
from pipeline.evaluation.recipes import Recipe
from pipeline.evaluation.squad import evaluate_squad1, evaluate_squad2
from pipeline.evaluation.tasks import Answer, Question, Task
from pipeline.log import logger

_NULL_SCORE_WITHOUT_SPAN = 1e6

SpanHead = JointSpanHead | SimpleSpanHead


@dataclass(frozen=True, slots=True)
class Window(Feature):
    """A question with a window of its context.

    Attributes:
        first_token: Number of the window's first token in the context.
        start: Position of the answer's first token; 0, [CLS], where the window does not hold it all.
        end: The same for its last token.
        is_impossible: Whether the question has no answer at all.
    """

    first_token: int
    start: int = 0
    end: int = 0
    is_impossible: bool = False


@dataclass(frozen=True)
class Candidates:
    """A window's best spans, best first, as tokens of the context, and its null score."""

    scores_K: np.ndarray
    first_K: np.ndarray
    last_K: np.ndarray
    null_score: float


class SpanProcessor:
    """See ``pipeline.evaluation.processors.Processor``."""

    reads_first = False

    def __init__(self, task: Task, recipe: Recipe, tokenizer: Tokenizer):
        assert recipe.span
        self._task, self._tokenizer = task, tokenizer
        self._recipe, self._span = recipe, recipe.span
        self._contexts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def head(self, model: ModelConfig) -> SpanHead:
        """The head that the recipe names."""
        if self._span.span_head == "simple":
            return SimpleSpanHead(model)
        return JointSpanHead(model, self._span.answerable_weight)

    def features(self, split: str) -> list[Window]:
        """The windows of every question."""
        questions = self._task.examples(split)
        ids = encode_texts([question.question for question in questions], self._tokenizer)
        windows, unspoken = [], 0
        for number, (question, question_ids) in enumerate(zip(questions, ids, strict=True)):
            cut = question_ids[: self._span.max_question_length]
            answer = self._answer_tokens(question) if split == "train" and question.answers else None
            if split == "train" and question.answers and answer is None:
                unspoken += 1
                continue
            windows += self._windows(number, question, cut, answer)
        if unspoken:
            logger.warning("%s: %d answers are nothing to the tokenizer; left out", self._task.name, unspoken)
        return windows

    def _context(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a context, and the characters ``[begin, end)`` of each token, ``(tokens, 2)``."""
        if text not in self._contexts:
            ids, offsets = self._tokenizer.encode_with_offsets(text)
            self._contexts[text] = np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)
        return self._contexts[text]

    def _answer_tokens(self, question: Question) -> tuple[int, int] | None:
        """First and last token of the first answer; None where no token stands for any of it."""
        answer: Answer = question.answers[0]
        _, offsets = self._context(question.context)
        begins, ends = offsets[:, 0], offsets[:, 1]
        overlaps = (begins < answer.start + len(answer.text)) & (ends > answer.start) & (ends > begins)
        tokens = np.flatnonzero(overlaps)
        return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None

    def _windows(
        self, number: int, question: Question, question_ids: np.ndarray, answer: tuple[int, int] | None
    ) -> list[Window]:
        ids, _ = self._context(question.context)
        room = self._recipe.max_length - 3 - len(question_ids)
        windows = []
        for first, last in _ranges(len(ids), room, self._span.stride):
            token_ids, num_first = join_segments(self._tokenizer, question_ids, ids[first:last])
            start = end = 0
            if answer and first <= answer[0] and answer[1] < last:
                start, end = (num_first + token - first for token in answer)
            windows.append(Window(token_ids, num_first, number, first, start, end, not question.answers))
        return windows

    def loss(self, head: SpanHead, hidden_TH: Tensor, examples: Examples, features: Sequence[Window]) -> Tensor:
        """The head's loss, summed over windows."""
        targets = SpanTargets(
            torch.tensor([window.start for window in features], device=hidden_TH.device),
            torch.tensor([window.end for window in features], device=hidden_TH.device),
            torch.tensor([float(window.is_impossible) for window in features], device=hidden_TH.device),
        )
        return head.loss(hidden_TH, examples, targets).sum()

    def outputs(
        self, head: SpanHead, hidden_TH: Tensor, examples: Examples, features: Sequence[Window]
    ) -> list[Candidates]:
        """The best spans of each window that can be answers."""
        spans = head.spans(hidden_TH, examples, self._span.beam_size)
        return [self._candidates(spans, number, window) for number, window in enumerate(features)]

    def _candidates(self, spans: Spans, number: int, window: Window) -> Candidates:
        start_K1 = spans.start_PK[number].cpu().numpy()[:, None]
        end_KK = spans.end_PKK[number].cpu().numpy()
        scores_KK = spans.start_score_PK[number, :, None].cpu().numpy() + spans.end_score_PKK[number].cpu().numpy()
        can_answer = (start_K1 >= window.num_first) & (end_KK >= start_K1) & (end_KK < len(window) - 1)
        can_answer &= (end_KK - start_K1 < self._span.max_answer_length) & np.isfinite(scores_KK)
        starts, ends = np.nonzero(can_answer)
        best = np.argsort(-scores_KK[starts, ends], kind="stable")
        in_context = window.first_token - window.num_first
        return Candidates(
            scores_KK[starts, ends][best],
            start_K1[starts, 0][best] + in_context,
            end_KK[starts, ends][best] + in_context,
            float(spans.null_score_P[number]),
        )

    def outcome(self, split: str, features: Sequence[Window], outputs: list[Candidates]) -> Outcome:
        """The official scripts' files, and their scores for a labelled split.

        ``predictions.json`` has no answer where the null score is above the threshold; what the question would have
        been answered with stands in ``predictions_answered.json``.
        """
        questions = self._task.examples(split)
        grouped: list[list[tuple[Window, Candidates]]] = [[] for _ in questions]
        for window, candidates in zip(features, outputs, strict=True):
            grouped[window.example].append((window, candidates))
        best = {q.id: self._best_answer(q, windows) for q, windows in zip(questions, grouped, strict=True)}
        answered = {name: text for name, (text, _) in best.items()}
        null_scores = {name: null for name, (_, null) in best.items()}
        is_labelled = split not in self._task.tests()
        answers = {q.id: [answer.text for answer in q.answers] for q in questions}
        if not self._task.config.no_answer:
            metrics = evaluate_squad1(answers, answered) if is_labelled else {}
            return Outcome(metrics, answered, {"predictions.json": _json(answered)})
        threshold = self._span.no_answer_threshold
        predictions = {name: "" if null_scores[name] > threshold else text for name, text in answered.items()}
        metrics = evaluate_squad2(answers, answered, null_scores, threshold) if is_labelled else {}
        files = {
            "predictions.json": _json(predictions),
            "null_odds.json": _json(null_scores),
            "predictions_answered.json": _json(answered),
        }
        return Outcome(metrics, predictions, files)

    def _best_answer(self, question: Question, windows: list[tuple[Window, Candidates]]) -> tuple[str, float]:
        """The text of the best span, "" where there is none, and the null score."""
        ids, offsets = self._context(question.context)
        home = _window_with_most_context([(w.first_token, len(w) - w.num_first - 1) for w, _ in windows], len(ids))
        best_score, best_text = -np.inf, ""
        null_score = np.inf
        for number, (_, candidates) in enumerate(windows):
            null_score = min(null_score, candidates.null_score)
            for score, first, last in zip(candidates.scores_K, candidates.first_K, candidates.last_K, strict=True):
                text = question.context[offsets[first, 0] : offsets[last, 1]] if home[first] == number else ""
                if text:
                    if score > best_score:
                        best_score, best_text = float(score), text
                    break  # the rest of this window scores less
        if self._span.span_head == "simple":
            null_score = null_score - best_score if best_text else _NULL_SCORE_WITHOUT_SPAN
        return best_text, float(null_score)


def _ranges(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Windows of a context: each begins ``stride`` tokens after the one before, until one reaches the end."""
    ranges, first = [], 0
    while True:
        ranges.append((first, min(first + room, num_tokens)))
        if first + room >= num_tokens:
            return ranges
        first += min(room, stride)


def _window_with_most_context(windows: list[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """For each token the number of the window in which it has most context on its poorer side, ``(tokens,)``.

    Args:
        windows: First token and number of tokens of each.
        num_tokens: Of the context.
    """
    context_WT = np.full((len(windows), num_tokens), -np.inf)
    for number, (first, length) in enumerate(windows):
        inside = np.arange(length)
        context_WT[number, first : first + length] = np.minimum(inside, length - 1 - inside) + 0.01 * length
    return context_WT.argmax(0)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
