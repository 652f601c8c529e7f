"""Fine-tuning the discriminator on one task with one seed, and predicting with it.

A step's draws depend on the seed and the step alone, the order of the examples on the seed and the epoch. So a run
that goes on from a partial state ends as one that was never stopped.

Shapes: T tokens of a batch, H hidden size.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.finetuning import Examples, FineTunedElectra
from model.keyed import seed_for
from pipeline.errors import ElectraError
from pipeline.evaluation.features import Feature, collate, split_by_tokens
from pipeline.evaluation.partial import PartialState
from pipeline.evaluation.processors import Processor
from pipeline.evaluation.recipes import Recipe
from pipeline.log import logger
from pipeline.optimizer import ElectraAdamW, group_parameters
from pipeline.schedule import linear_times_warmup

_EPS, _BETAS, _CLIP = 1e-6, (0.9, 0.999), 1.0  # as in pretraining
_TRAIN_TOKENS = 16_384  # most of one forward and backward pass; a batch that is larger takes several
_PREDICT_TOKENS = 8_192
_STEPS_BETWEEN_CHECKS = 50
_SAVE_EVERY_S = 600.0
_DROPOUT = 101  # the stream of these draws; pretraining's have other numbers


class DivergedError(ElectraError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Plan:
    """Length of a fine-tuning run."""

    examples: int
    batch_size: int
    epochs: int
    warmup_fraction: float

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return -(-self.examples // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.steps_per_epoch * self.epochs

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.steps * self.warmup_fraction)


class FineTuning:
    """One fine-tuning run, from its first step to its last.

    Attributes:
        step: Steps that are done.
    """

    def __init__(
        self,
        model: FineTunedElectra,
        processor: Processor,
        features: Sequence[Feature],
        recipe: Recipe,
        seed: int,
        device: str,
    ):
        self._model, self._processor, self._features = model, processor, features
        self._recipe, self._seed, self._device = recipe, seed, device
        self.step = 0
        self.plan = Plan(len(self._features), recipe.batch_size, recipe.epochs, recipe.warmup_fraction)
        groups = layer_learning_rates(model, recipe)
        self._optimizer = ElectraAdamW(groups, _BETAS, _EPS, recipe.weight_decay, bias_correction=False)
        self._order: tuple[int, list[int]] = (-1, [])

    def describe(self) -> dict[str, int]:
        """Its length."""
        tokens = sum(map(len, self._features)) * self.plan.epochs
        return {"features": len(self._features), "steps": self.plan.steps, "tokens": tokens}

    def run(self, partial: PartialState, should_stop: Callable[[], object]) -> bool:
        """Trains to the end; returns False when told to stop before, with everything saved.

        Raises:
            DivergedError: The gradients are not finite.
        """
        self.step = partial.load(self._model, self._optimizer)
        saved_at = time.monotonic()
        norms: list[Tensor] = []
        self._model.train()
        while self.step < self.plan.steps:
            if should_stop():
                self._save(partial)
                return False
            if time.monotonic() - saved_at > _SAVE_EVERY_S:
                self._save(partial)
                saved_at = time.monotonic()
            norms.append(self._train_step())
            if len(norms) == _STEPS_BETWEEN_CHECKS or self.step == self.plan.steps:
                self._refuse_divergence(norms)
                norms = []
        return True

    def _save(self, partial: PartialState) -> None:
        """Without room for it only a stop would lose anything, so training goes on."""
        try:
            partial.save(self._model, self._optimizer, self.step)
        except OSError as error:
            logger.warning("%s; a stop now would lose the steps since the last one", error)

    def _train_step(self) -> Tensor:
        """One update; returns the gradient's norm before it was clipped."""
        torch.manual_seed(seed_for(self._seed, self.step, 0, _DROPOUT))
        for group in self._optimizer.param_groups:
            group["lr"] = linear_times_warmup(group["peak_lr"], self.step, self.plan.warmup_steps, self.plan.steps)
        batch = self._batch()
        divisor = len(batch) if self._recipe.batch_loss == "mean" else 1
        for features in split_by_tokens(batch, _TRAIN_TOKENS):
            with autocast(self._device, self._recipe):
                loss = _loss(self._model, self._processor, features, self._device) / divisor
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return norm

    def _batch(self) -> list[Feature]:
        epoch, number = divmod(self.step, self.plan.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self._features)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        first = number * self.plan.batch_size
        return [self._features[i] for i in self._order[1][first : first + self.plan.batch_size]]

    def _refuse_divergence(self, norms: list[Tensor]) -> None:
        if not torch.isfinite(torch.stack(norms)).all():
            raise DivergedError(
                f"gradients are not finite after {self.step} steps with lr={self._recipe.lr:g}; lower evaluate.lr"
            )


def layer_learning_rates(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups with a peak rate for each layer.

    The head has ``lr``. As released the top layer has ``lr * layer_decay**2``, and so on down to the embeddings with
    ``lr * layer_decay**(layers + 2)``: one factor more than one would expect (the published scores were obtained this
    way); see ``pipeline.optimizer.layer_exponents``.
    """
    groups = group_parameters(model, recipe.weight_decay, recipe.layer_decay, recipe.layer_decay_depth)
    return [group | {"peak_lr": recipe.lr * group["lr_scale"]} for group in groups]


@torch.no_grad()
def predict(
    model: FineTunedElectra, processor: Processor, features: Sequence[Feature], recipe: Recipe, device: str
) -> list[Any]:
    """The processor's outputs for each feature, in their order; runs over them by length."""
    model.eval()
    by_length = sorted(range(len(features)), key=lambda i: -len(features[i]))
    outputs: list[Any] = [None] * len(features)
    done = 0
    for batch in split_by_tokens([features[i] for i in by_length], _PREDICT_TOKENS):
        examples = collate(batch, device)
        with autocast(device, recipe):
            batch_outputs = processor.outputs(model.head, _encode(model, processor, examples), examples, batch)
        for output in batch_outputs:
            outputs[by_length[done]] = output
            done += 1
    return outputs


def autocast(device: str, recipe: Recipe) -> AbstractContextManager[Any]:
    """Matrix products in the recipe's precision."""
    return torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16")


def _loss(model: FineTunedElectra, processor: Processor, features: Any, device: str) -> Tensor:
    examples = collate(features, device)
    return processor.loss(model.head, _encode(model, processor, examples), examples, features)


def _encode(model: FineTunedElectra, processor: Processor, examples: Examples) -> Tensor:
    return model.encode_first(examples) if processor.reads_first else model.encode(examples)
