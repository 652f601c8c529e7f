"""How a task is fine-tuned: what the config says, else the task's file, else the published values for the size.

Sources: table 7 of the paper and ``configure_finetuning.py`` of google-research/electra, which agree but for weight
decay (paper: 0) and Small's learning rate (paper: 3e-4).
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from model.config import ModelConfig
from pipeline.config import EvaluateConfig, FineTuning
from pipeline.config_train import LayerDecayDepth
from pipeline.errors import ConfigError
from pipeline.evaluation.task_file import TaskConfig

Size = Literal["small", "base", "large"]

_BY_SIZE: dict[Size, dict[str, Any]] = {
    "small": {"lr": 3e-4, "layer_decay": 0.8},
    "base": {"lr": 1e-4, "layer_decay": 0.8},
    "large": {"lr": 5e-5, "layer_decay": 0.9},
}
_COMMON: dict[str, Any] = {
    "layer_decay_depth": "released", "epochs": 3, "batch_size": 32, "batch_loss": "sum", "warmup_fraction": 0.1,
    "weight_decay": 0.0, "dropout": 0.1, "both_orders": True, "span_head": "joint", "stride": 128,
    "max_answer_length": 30, "beam_size": 20, "answerable_weight": 0.5,
}  # fmt: skip
_MAX_LENGTH = {"tagging": 256, "question_answering": 512}  # all others 128
_MAX_QUESTION_LENGTH = 64
_NO_ANSWER_THRESHOLD = {"joint": -2.75, "simple": 0.0}
_SPAN_KEYS = (
    "span_head", "max_question_length", "stride", "max_answer_length", "beam_size", "answerable_weight",
    "no_answer_threshold",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """What only question answering needs; see ``pipeline.config.FineTuning``."""

    span_head: Literal["joint", "simple"]
    max_question_length: int
    stride: int
    max_answer_length: int
    beam_size: int
    answerable_weight: float
    no_answer_threshold: float


@dataclass(frozen=True)
class Recipe:
    """Every value that a fine-tuning run needs; see ``pipeline.config.FineTuning``.

    Attributes:
        init_from: Task whose fine-tuned encoder this one starts from.
        span: Of question answering, else None.
    """

    lr: float
    layer_decay: float
    layer_decay_depth: LayerDecayDepth
    epochs: int
    batch_size: int
    batch_loss: Literal["sum", "mean"]
    warmup_fraction: float
    weight_decay: float
    max_length: int
    dropout: float
    both_orders: bool
    precision: Literal["fp32", "bf16"]
    init_from: str | None
    span: Span | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without what does not apply."""
        about = asdict(self)
        return {**{k: v for k, v in about.items() if k != "span" and v is not None}, **(about["span"] or {})}


def size_of(model: ModelConfig) -> Size:
    """The published size that a model is nearest to from above, by its width."""
    if model.hidden_size < 768:
        return "small"
    return "base" if model.hidden_size < 1024 else "large"


def recipes_for(config: EvaluateConfig, task: TaskConfig, model: ModelConfig) -> dict[str, Recipe]:
    """The recipe of a task, or one for each point of the grid, by label; the label is empty without a grid.

    Raises:
        ConfigError: Inputs longer than the model has positions, or a question that leaves no room for its context.
    """
    given = {**_given(task.recipe), **_given(config)}
    resolved: dict[str, Any] = {**_COMMON, **_BY_SIZE[size_of(model)], **given}
    resolved.setdefault("max_length", min(_MAX_LENGTH.get(task.kind, 128), model.max_positions))
    resolved.setdefault("max_question_length", min(_MAX_QUESTION_LENGTH, resolved["max_length"] // 2))
    resolved.setdefault("no_answer_threshold", _NO_ANSWER_THRESHOLD[resolved["span_head"]])
    _check_lengths(task, resolved, model)
    span = Span(**{key: resolved[key] for key in _SPAN_KEYS}) if task.kind == "question_answering" else None
    rest = {key: value for key, value in resolved.items() if key not in _SPAN_KEYS}
    rest["both_orders"] = task.symmetric and rest["both_orders"]
    init_from = "mnli" if config.mnli_init and task.mnli_init else None
    points = list(product(config.grid_lr or (rest["lr"],), config.grid_layer_decay or (rest["layer_decay"],)))
    has_grid = bool(config.grid_lr or config.grid_layer_decay)
    recipes = {}
    for lr, layer_decay in points:
        label = f"lr_{lr:g}-layer_decay_{layer_decay:g}" if has_grid else ""
        changed: dict[str, Any] = rest | {"lr": lr, "layer_decay": layer_decay}
        recipes[label] = Recipe(**changed, precision=config.precision, init_from=init_from, span=span)
    return recipes


def _given(values: FineTuning) -> dict[str, Any]:
    return {key: value for key in FineTuning.model_fields if (value := getattr(values, key)) is not None}


def _check_lengths(task: TaskConfig, resolved: dict[str, Any], model: ModelConfig) -> None:
    longest = resolved["max_length"]
    if longest > model.max_positions:
        raise ConfigError(
            f"task {task.name!r}: max_length={longest} exceeds the model's {model.max_positions} positions; lower it"
        )
    if task.kind == "question_answering" and longest < resolved["max_question_length"] + 4:
        raise ConfigError(
            f"task {task.name!r}: max_length={longest} leaves no room for a context beside "
            f"max_question_length={resolved['max_question_length']}; lower evaluate.max_question_length"
        )
