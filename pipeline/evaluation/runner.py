"""Doing one unit: fine-tune, predict, score, write."""

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from data_shards.store import write_json
from data_shards.temporaries import publish_bytes
from model.finetuning import FineTunedElectra
from pipeline.config import Config
from pipeline.devices import choose_kernels
from pipeline.evaluation.features import Feature
from pipeline.evaluation.finetune import FineTuning, predict
from pipeline.evaluation.partial import PartialState, write_tensors
from pipeline.evaluation.pretrained import Pretrained
from pipeline.evaluation.processors import Outcome, Processor
from pipeline.evaluation.span import SpanProcessor
from pipeline.evaluation.tagging import TaggingProcessor
from pipeline.evaluation.text import TextProcessor
from pipeline.evaluation.units import Unit

_PROCESSORS: dict[str, Callable[..., Processor]] = {
    "classification": TextProcessor, "pair": TextProcessor, "regression": TextProcessor,
    "tagging": TaggingProcessor, "question_answering": SpanProcessor,
}  # fmt: skip


class Prepared:
    """A task as features; made once for all seeds."""

    def __init__(self, key: Hashable, unit: Unit):
        self.key, self.task = key, unit.task
        self.processor = _PROCESSORS[unit.task.kind](unit.task, unit.recipe, unit.pretrained.tokenizer)
        self._features: dict[str, Sequence[Feature]] = {}

    def features(self, split: str) -> Sequence[Feature]:
        """Features of a split."""
        if split not in self._features:
            self._features[split] = self.processor.features(split)
        return self._features[split]


class Runner:
    """Does units one after the other on a device."""

    def __init__(self, config: Config, device: str):
        self._config, self._device = config, device
        self._prepared: Prepared | None = None
        self._pretrained: Pretrained | None = None

    def run(self, unit: Unit, should_stop: Callable[[], object]) -> dict[str, Any] | None:
        """Writes the unit's predictions and, last, its result, which it returns; None when told to stop before.

        Raises:
            DivergedError: See ``FineTuning.run``.
        """
        begin = time.monotonic()
        prepared = self._prepare(unit)
        torch.manual_seed(unit.seed)
        model = self._model(unit, prepared.processor)
        training = FineTuning(
            model, prepared.processor, prepared.features("train"), unit.recipe, unit.seed, self._device
        )
        partial = PartialState(unit.folder / "partial.safetensors", unit.fingerprint)
        if not training.run(partial, should_stop):
            return None
        metrics = self._predict(unit, model, prepared)
        if unit.keeps_weights:
            encoder = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
            write_tensors(unit.weights_path, encoder, {"fingerprint": unit.fingerprint})
        result = {
            "fingerprint": unit.fingerprint,
            "checkpoint": str(unit.pretrained.folder),
            "task": unit.task.name,
            "seed": unit.seed,
            "recipe": unit.recipe.to_dict(),
            "metrics": metrics,
            "training": training.describe(),
            "seconds": round(time.monotonic() - begin, 3),
        }
        write_json(unit.folder / "result.json", result)
        partial.discard()
        return result

    def _prepare(self, unit: Unit) -> Prepared:
        key = (unit.task.name, unit.recipe, unit.pretrained.tokenizer.digest)
        if self._prepared is None or self._prepared.key != key:
            if self._prepared:
                self._prepared.task.forget_examples()
            self._prepared = Prepared(key, unit)
        return self._prepared

    def _model(self, unit: Unit, processor: Processor) -> FineTunedElectra:
        if self._pretrained is not unit.pretrained:
            if self._pretrained:
                self._pretrained.forget_weights()
            self._pretrained = unit.pretrained
        dropout = {"dropout": unit.recipe.dropout, "attention_dropout": unit.recipe.dropout}
        config = unit.pretrained.model.model_copy(update=dropout)
        head = processor.head(config)
        kernels = choose_kernels(self._config.model_copy(update={"model": config}), self._device)
        model = FineTunedElectra(config, unit.pretrained.vocab_size, kernels, head)
        if unit.needs:
            model.load_state_dict(load_file(unit.needs.weights_path) | _of_head(model))
        else:
            unit.pretrained.load_into(model)
        return model.to(self._device)

    def _predict(self, unit: Unit, model: FineTunedElectra, prepared: Prepared) -> dict[str, float]:
        """Predictions of every part and test file, written; the metrics of the parts."""
        metrics: dict[str, float] = {}
        for split in [*unit.task.parts(), *unit.task.tests()]:
            features = prepared.features(split)
            outputs = predict(model, prepared.processor, features, unit.recipe, self._device)
            outcome = prepared.processor.outcome(split, features, outputs)
            suffix = "" if split == "dev" else f"_{split}"
            metrics |= {f"{name}{suffix}": value for name, value in outcome.metrics.items()}
            _write_outcome(unit.folder, split, suffix, outcome, is_test=split in unit.task.tests())
        return metrics


def _write_outcome(folder: Path, split: str, suffix: str, outcome: Outcome, is_test: bool) -> None:
    for name, content in outcome.files.items():
        path = folder / name
        publish_bytes(path.with_name(f"{path.stem}{suffix}{path.suffix}"), content.encode())
    if is_test:
        write_json(folder / f"test_{split}.json", outcome.answers)


def _of_head(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
