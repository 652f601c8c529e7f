"""The schema of a run: one tree of frozen sections, every key with its unit and source.

Reading files and command lines is ``pipeline.config_file``; which keys change
the result is ``pipeline.keys``; what follows from a config is ``pipeline.plan``.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, model_validator

from model.config import ModelConfig, Section
from model.flops import steps_for_flops
from model.objective import RECIPES, ObjectiveConfig, refuse_senseless
from pipeline.config_train import (
    MOST_PROFILED_STEPS,
    Auto,
    Count,
    DeepSpeedConfig,
    KernelsConfig,
    LaunchConfig,
    LayerDecayDepth,
    OptimizerConfig,
    TrainConfig,
)
from pipeline.redaction import redact

_TRACKING_URI = r"^(auto|none|(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://.+|databricks.*)$"


class RunConfig(Section):
    """Where a run lives and what it is called."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Folder under <dir>/runs.")
    variant: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="One of a file's variants; its run is called NAME-VARIANT.",
    )
    dir: Path = Field(Path("runs"), description="Root of tokenizers, shards and runs; all nodes must see it.")
    seed: int = Field(1, ge=0, lt=2**31, description="Of everything random.")
    fork_from: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*@\d+$",
        description="NAME@STEP: start from that checkpoint of another run.",
    )


class CorpusConfig(Section):
    """One corpus: files, or a dataset of the Hugging Face hub."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$", description="Names the shard folder.")
    path: str | None = Field(None, description="File, folder or glob; .gz, .zst and .xz are read as they are.")
    hub: str | None = Field(None, description="Dataset name on the hub, streamed.")
    hub_config: str | None = Field(None, description="Configuration of the hub dataset.")
    hub_split: str = Field("train", description="Split of the hub dataset.")
    hub_revision: str | None = Field(None, description="Branch, tag or commit of the hub dataset.")
    format: Literal["text", "jsonl", "parquet", "arrow"] = Field("text", description="Format of the files.")
    text_column: str = Field("text", description="Field with the text, unless the format is text.")
    documents: Literal["line", "blank_line", "file"] = Field("blank_line", description="What ends a document.")
    weight: float = Field(
        1.0, gt=0, description="Share of training rows and of a trained tokenizer's text, relative to other corpora."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"corpus {self.name!r} needs either path or hub")
        return self


class DataConfig(Section):
    """Text, shards and rows."""

    corpora: tuple[CorpusConfig, ...] = Field(min_length=1, description="What to train on.")
    shards_dir: Path | None = Field(None, description="Folder of shard folders; default <run.dir>/shards.")
    local_dir: Path | None = Field(
        None, description="Node-local folder with copies by `electra shards stage`, read in place of the originals."
    )
    task_bytes: int = Field(256 * 2**20, ge=1024, description="Input bytes of one unit of tokenisation.")
    held_out_fraction: float = Field(
        0.005, ge=0, lt=1, description="Share of documents kept from training, by the hash of their text."
    )
    sequence_length: int = Field(128, ge=8, description="Tokens of a row: 128 for Small, 512 else.")
    shuffle_window_gib: float | None = Field(
        None, gt=0, description="GiB of shards that rows are mixed within, for parallel file systems; null: all."
    )
    layout: Literal["packed", "paper"] = Field(
        "packed", description="packed: rows are windows of the token stream; paper: the official builder's padded rows."
    )
    num_workers: Auto | Count = Field("auto", description="Processes that tokenize; auto: one a core.")

    @model_validator(mode="after")
    def _distinct_names(self) -> "DataConfig":
        names = [corpus.name for corpus in self.corpora]
        if len(set(names)) < len(names):
            raise ValueError(f"corpora must have different names, not {', '.join(names)}")
        return self


class TokenizerConfig(Section):
    """A tokenizer to train, or one to use as it is."""

    kind: Literal["sentencepiece_unigram", "sentencepiece_bpe", "wordpiece"] = Field(
        "sentencepiece_unigram", description="Algorithm that is trained; wordpiece takes BERT's vocabulary by path."
    )
    path: Path | None = Field(
        None, description="A sentencepiece .model, BERT's vocab.txt or a tokenizer.json; nothing is trained then."
    )
    vocab_size: int = Field(30522, ge=32, description="Ids, special pieces included; 30,522 as BERT's uncased one.")
    lowercase: bool = Field(True, description="Fold case; for a vocab.txt also drop accents, as BERT's uncased one.")
    character_coverage: float = Field(0.9995, gt=0, le=1, description="Share of characters with a piece of their own.")
    sample_bytes: int = Field(256 * 2**20, ge=1, description="Most text to train on.")
    sample_seed: int = Field(0, ge=0, description="Chooses that text.")

    @model_validator(mode="after")
    def _kind_fits_path(self) -> "TokenizerConfig":
        ending = self.path.suffix if self.path else None
        if self.kind == "wordpiece" and ending not in (".txt", ".json"):
            raise ValueError("tokenizer.kind=wordpiece is not trained here: set tokenizer.path to BERT's vocab.txt")
        if self.kind != "wordpiece" and ending == ".txt":
            raise ValueError(f"tokenizer.path={self.path} is a WordPiece vocabulary: set tokenizer.kind=wordpiece")
        return self


class FineTuning(Section):
    """What a fine-tuning run can be told; what is None follows from the task's file, else from the model's size.

    ``pipeline.evaluation.recipes`` has those values.
    """

    lr: float | None = Field(None, gt=0, description="Peak learning rate of the head; by size 3e-4, 1e-4, 5e-5.")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="Learning rate of a layer over that of the one above; 0.8, for Large 0.9."
    )
    layer_decay_depth: LayerDecayDepth | None = Field(
        None, description="released (default): one power too many below the head, as published scores had; fixed."
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the training examples; 3, RTE and STS-B 10, QA 2.")
    batch_size: int | None = Field(None, ge=1, description="Examples per step; 32.")
    batch_loss: Literal["sum", "mean"] | None = Field(
        None, description="Whose gradient is clipped to norm 1: sum over the batch (default, released), or mean."
    )
    warmup_fraction: float | None = Field(None, ge=0, le=1, description="Share of the steps that warm up; 0.1.")
    weight_decay: float | None = Field(None, ge=0, description="Paper: 0 (default); released code: 0.01.")
    max_length: int | None = Field(
        None, ge=8, description="Longest input in tokens; 128, tagging 256, QA 512, or the model's positions if fewer."
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="In the encoder and before the head; 0.1.")
    both_orders: bool | None = Field(
        None, description="Whether symmetric pairs (MRPC, STS-B) train in both orders, as released; true."
    )
    span_head: Literal["joint", "simple"] | None = Field(
        None, description="QA: end given start with a beam and an answerability classifier (default), or two logits."
    )
    max_question_length: int | None = Field(None, ge=1, description="QA: tokens of the question; 64.")
    stride: int | None = Field(None, ge=1, description="QA: tokens from a window's begin to the next one's; 128.")
    max_answer_length: int | None = Field(None, ge=1, description="QA: tokens of an answer; 30.")
    beam_size: int | None = Field(None, ge=1, description="QA: starts, and ends of each, that are tried; 20.")
    answerable_weight: float | None = Field(None, ge=0, description="QA, joint: weight of answerability; 0.5.")
    no_answer_threshold: float | None = Field(
        None, description="QA: a question whose null score is higher has no answer; joint -2.75 (released), simple 0."
    )


class EvaluateConfig(FineTuning):
    """Fine-tuning as in the paper's table 7, by the model's size. A key that is set here holds for every task."""

    tasks: tuple[str, ...] = Field((), description="Names under configs/tasks, or paths of task files.")
    seeds: int = Field(3, ge=1, description="Fine-tuning runs per task; medians are reported (paper: 10).")
    data_dir: Path | None = Field(None, description="Root of the tasks' files.")
    checkpoint: Literal["last"] | Count | Path = Field(
        "last", description="Step of the checkpoint to fine-tune, or a Hugging Face folder with its own tokenizer."
    )
    more_checkpoints: tuple[Count, ...] | Literal["all"] = Field(
        (), description="Steps of further checkpoints of the run to evaluate alike; all: those that are kept."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the matrix products; weights stay in fp32.")
    mnli_init: bool = Field(
        False,
        description="Start RTE, STS-B and MRPC from the MNLI model of the same seed; mnli must be among the tasks.",
    )
    grid_lr: tuple[float, ...] = Field((), description="Learning rates to try; the best on dev is reported as such.")
    grid_layer_decay: tuple[float, ...] = Field((), description="Layer-wise decays to try, with each learning rate.")


class TrackingConfig(Section):
    """MLflow."""

    uri: str = Field(
        "auto",
        pattern=_TRACKING_URI,
        description="auto: MLFLOW_TRACKING_URI, else SQLite in run.dir; none: no tracking.",
    )
    experiment: str = Field("electra", description="MLflow experiment.")

    @field_serializer("uri")
    def _without_password(self, uri: str) -> str:
        """Whatever writes a config down, writes it without."""
        return redact(uri)


class Config(Section):
    """One run."""

    recipe: Literal["fixed", "released"] = Field(
        "fixed",
        description="Sets objective.position_sampling and objective.loss_normalization where they are not given: "
        "fixed, or what google-research/electra does.",
    )
    run: RunConfig = Field(default_factory=RunConfig)  # type: ignore[arg-type]
    launch: LaunchConfig = Field(default_factory=LaunchConfig)  # type: ignore[arg-type]
    data: DataConfig
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)  # type: ignore[arg-type]
    model: ModelConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)  # type: ignore[arg-type]
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)  # type: ignore[arg-type]
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)  # type: ignore[arg-type]
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)  # type: ignore[arg-type]
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)  # type: ignore[arg-type]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, given: Any) -> Any:
        objective = given.get("objective", {}) if isinstance(given, dict) else None
        if not isinstance(objective, dict):
            return given
        return given | {"objective": RECIPES.get(given.get("recipe", "fixed"), {}) | objective}

    @model_validator(mode="after")
    def _check_relations(self) -> "Config":
        refuse_senseless(self.model, self.objective)
        self._check_budget()
        train = self.train
        if train.micro_batch_size != "auto" and train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size}; choose a divisor, or auto"
            )
        generator_steps = self.objective.generator_steps
        if generator_steps is not None and generator_steps >= train.steps:
            raise ValueError(
                f"objective.generator_steps={generator_steps} leaves no step of train.steps={train.steps} to the "
                "discriminator; lower it"
            )
        self._check_scores()
        begin, end = train.profile_steps or (1, 2)
        if not begin < end <= train.steps + 1:
            raise ValueError(
                f"train.profile_steps=[{begin}, {end}] must rise, to train.steps + 1 = {train.steps + 1} at most: "
                "the second number is the first step that is not recorded; correct it, or raise train.steps"
            )
        if end - begin > MOST_PROFILED_STEPS:
            raise ValueError(
                f"train.profile_steps=[{begin}, {end}] are {end - begin} steps, and the profiler keeps all it records "
                f"in memory: {MOST_PROFILED_STEPS} at most; choose a shorter window"
            )
        if self.data.sequence_length > self.model.max_positions:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds "
                f"model.max_positions={self.model.max_positions}; lower the one or raise the other"
            )
        initial = train.initial_discriminator or train.initial_generator
        if self.run.fork_from and initial:
            raise ValueError(
                f"run.fork_from={self.run.fork_from} and {initial} both say what training starts from; remove one"
            )
        own_model = not isinstance(self.evaluate.checkpoint, Path)  # a folder has its own number of positions
        longest = self.evaluate.max_length or 0
        if self.evaluate.tasks and own_model and longest > self.model.max_positions:
            raise ValueError(
                f"evaluate.max_length={longest} exceeds "
                f"model.max_positions={self.model.max_positions}; lower the one or raise the other"
            )
        return self

    def _check_scores(self) -> None:
        """Held-out scores are taken when they can be written down, and kept with a checkpoint."""
        train = self.train
        if train.held_out_every is not None and train.held_out_every % train.log_every:
            raise ValueError(
                f"train.held_out_every={train.held_out_every} is not a multiple of train.log_every={train.log_every}; "
                "the scores join a logged step"
            )
        if train.keep_best and (train.held_out_every is None or train.checkpoint_every % train.held_out_every):
            raise ValueError(
                f"train.keep_best=true keeps checkpoints of steps that were scored: train.held_out_every="
                f"{train.held_out_every} must divide train.checkpoint_every={train.checkpoint_every}"
            )

    def _check_budget(self) -> None:
        if self.train.flops is None:
            return
        steps = self.steps_of_budget(self.train.flops)
        if steps != self.train.steps:
            raise ValueError(
                f"train.steps={self.train.steps} is not what train.flops={self.train.flops:g} pays for, {steps} steps; "
                "set train.flops=null to choose the steps, or leave train.steps out"
            )

    def steps_of_budget(self, flops: float) -> int:
        """Steps that reach so many nominal FLOPs, at the configured vocabulary."""
        length, rows = self.data.sequence_length, self.train.global_batch_size
        return steps_for_flops(self.model, self.objective, self.tokenizer.vocab_size, length, rows, flops)

    @property
    def run_folder(self) -> Path:
        """<run.dir>/runs/<run.name>."""
        return self.run.dir / "runs" / self.run.name

    @property
    def shards_dir(self) -> Path:
        """Where shard folders are."""
        return self.data.shards_dir or self.run.dir / "shards"

    def flat(self) -> dict[str, Any]:
        """Every key as ``section.key``, values as JSON types."""
        return flatten(self.model_dump(mode="json"))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
