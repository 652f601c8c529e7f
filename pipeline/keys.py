"""What a key does to the result. Every key stands in exactly one list; a test holds this.

- *Science* keys change the result. They enter the fingerprint of the stage named here.
- *Numerics* keys change rounding and random draws only. They are recorded, and a change is announced.
- *Execution* keys change neither weights nor scores; some decide what is reported, and how often.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.log import logger

SCIENCE: dict[str, tuple[str, ...]] = {
    "tokenize": (
        "data.corpora", "data.held_out_fraction", "data.task_bytes", "tokenizer.kind", "tokenizer.path",
        "tokenizer.vocab_size", "tokenizer.lowercase", "tokenizer.character_coverage", "tokenizer.sample_bytes",
        "tokenizer.sample_seed",
    ),
    "pretrain": (
        "recipe", "run.seed", "run.fork_from", "data.sequence_length", "data.layout",
        "data.shuffle_window_gib",
        "model.size", "model.hidden_layers", "model.hidden_size", "model.attention_heads", "model.feed_forward_size",
        "model.embedding_size", "model.generator_width", "model.generator_depth", "model.generator_dropout",
        "model.generator_embedding_size", "model.glorot_projections", "model.max_positions",
        "model.dropout", "model.attention_dropout", "model.layer_norm_eps", "model.initializer_range",
        "model.activation", "objective.name", "objective.training", "objective.sharing", "objective.shared_tables",
        "objective.generator", "objective.generator_steps", "objective.mask_fraction", "objective.position_sampling",
        "objective.mask_token_share", "objective.random_token_share", "objective.select_unknown",
        "objective.label_rule", "objective.score_special_tokens", "objective.loss_normalization",
        "objective.generator_loss_weight", "objective.discriminator_loss_weight", "objective.prediction_loss_weight",
        "objective.temperature", "objective.disallow_correct", "train.steps",
        "train.initial_discriminator", "train.initial_generator", "train.global_batch_size",
        "train.precision", "optimizer.name", "optimizer.lr", "optimizer.betas", "optimizer.eps",
        "optimizer.weight_decay", "optimizer.bias_correction", "optimizer.schedule", "optimizer.warmup_steps",
        "optimizer.decay_power", "optimizer.decay_fraction", "optimizer.final_lr_fraction", "optimizer.layer_decay",
        "optimizer.layer_decay_depth", "optimizer.gradient_clip",
    ),
    "evaluate": (
        "evaluate.tasks", "evaluate.seeds", "evaluate.checkpoint", "evaluate.more_checkpoints", "evaluate.grid_lr",
        "evaluate.grid_layer_decay", "evaluate.lr", "evaluate.layer_decay", "evaluate.layer_decay_depth",
        "evaluate.epochs", "evaluate.batch_size", "evaluate.batch_loss", "evaluate.warmup_fraction",
        "evaluate.weight_decay", "evaluate.max_length", "evaluate.dropout", "evaluate.both_orders",
        "evaluate.span_head", "evaluate.max_question_length", "evaluate.stride", "evaluate.max_answer_length",
        "evaluate.beam_size", "evaluate.answerable_weight", "evaluate.no_answer_threshold", "evaluate.precision",
        "evaluate.mnli_init",
    ),
}  # fmt: skip

NUMERICS: tuple[str, ...] = (
    "launch.processes", "launch.threads_per_process", "launch.device", "train.micro_batch_size",
    "train.deterministic", "deepspeed.config", "kernels.backend", "kernels.compile_layers",
)  # fmt: skip

EXECUTION: tuple[str, ...] = (
    "run.name", "run.variant", "run.dir", "data.shards_dir", "data.local_dir", "data.num_workers",
    "launch.restarts", "launch.peer_timeout_seconds", "launch.hang_timeout_seconds",
    "train.stop_after_seconds", "train.stop_before_limit_seconds", "train.checkpoint_every",
    "train.checkpoint_seconds", "train.keep_checkpoints", "train.keep_every", "train.keep_best", "train.log_every",
    "train.held_out_rows", "train.flops", "train.held_out_every", "train.chance_intervals", "train.max_skipped_steps",
    "train.activation_checkpointing", "train.profile_steps", "train.spike_threshold", "train.spike_rollbacks",
    "train.check_replicas_every", "evaluate.data_dir", "tracking.uri", "tracking.experiment",
)  # fmt: skip

EVALUATE_SELECTION = (
    "evaluate.tasks", "evaluate.seeds", "evaluate.checkpoint", "evaluate.more_checkpoints", "evaluate.grid_lr",
    "evaluate.grid_layer_decay",
)  # fmt: skip
"""Science keys that choose which units to evaluate; units done under others stay valid."""

_FOLDERS = ("train.initial_discriminator", "train.initial_generator", "evaluate.checkpoint")


def science_of(config: Config, stage: str) -> dict[str, Any]:
    """The science keys of a stage and their values, as JSON types.

    Corpora enter the tokenize stage by what they are; their weights belong to pretraining, and to
    tokenize where they share out the text that a tokenizer is trained on. Files enter by content, so
    paths and names do not appear here.
    """
    flat = config.flat()
    science = {key: flat[key] for key in SCIENCE[stage] if key not in ("data.corpora", "tokenizer.path")}
    science |= {key: _content_of(config, key) for key in _FOLDERS if key in science}
    if stage == "tokenize":
        for corpus in config.data.corpora:
            about = corpus.model_dump(mode="json", exclude={"name", "path", "weight"})
            science |= {f"data.corpora.{corpus.name}.{key}": value for key, value in about.items()}
        science |= weights_of_training_text(config)
        science["tokenizer.path"] = config.tokenizer.path is not None
        if config.data.layout == "paper":  # its rows are made by tokenize
            paper = ("data.layout", "data.sequence_length", "run.seed")
            science |= {key: flat[key] for key in paper}
    if stage == "pretrain":
        science |= _weights(config)
        if config.objective.loss_normalization == "micro_batch":  # what is averaged within
            science["train.micro_batch_size"] = config.train.micro_batch_size
    return science


def weights_of_training_text(config: Config) -> dict[str, Any]:
    """The weights as science of tokenize: none where no tokenizer is trained, or on one corpus alone."""
    return {} if config.tokenizer.path or len(config.data.corpora) == 1 else _weights(config)


def _weights(config: Config) -> dict[str, Any]:
    return {f"data.corpora.{corpus.name}.weight": corpus.weight for corpus in config.data.corpora}


def _content_of(config: Config, key: str) -> Any:
    """A key whose value may be a Hugging Face folder: the digest of what is read there; any other value as it is."""
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    if not isinstance(value, Path):
        return value
    from pipeline.hf_folder import folder_digest

    if section == "train" and not value.exists() and (known := _recorded_digest(config, key)):
        _log_absent(key, value)
        return known
    return f"sha256:{folder_digest(value, key, config.run.dir / 'digests')}"


def _recorded_digest(config: Config, key: str) -> str | None:
    """What the run's pretrain stage recorded: its first checkpoint holds the weights, and the folder may go."""
    from pipeline.stages import read_record

    record = read_record(config, "pretrain")
    known = record.inputs.get("science", {}).get(key) if record else None
    return known if isinstance(known, str) and known.startswith("sha256:") else None


@lru_cache
def _log_absent(key: str, path: Path) -> None:
    logger.info("%s=%s: no such folder; taken to be the one that the run started from", key, path)
