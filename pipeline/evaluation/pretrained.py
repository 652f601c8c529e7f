"""What is fine-tuned: a checkpoint of the run, or a Hugging Face folder with its own tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_shards.tokenizer import Tokenizer
from model.config import ModelConfig
from model.weights import Weights, discriminator_weights
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedError
from pipeline.hf_folder import find_folder, folder_digest, folder_tokenizer, read_network
from pipeline.keys import science_of
from pipeline.stages import read_record, stage_folder
from pipeline.tokenize import load_tokenize_output

_KEY = "evaluate.checkpoint"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained main network.

    Attributes:
        folder: Where it lies.
        label: Folder of its results.
        digest: Of its content.
        step: Optimizer steps behind it; 0 where that is not known.
        model: Its shape.
        vocab_size: Rows of its token table.
        tokenizer: Its tokenizer, of as many ids or fewer.
        read: Reads its plain weights, see ``model.weights``.
        inputs: What else a unit's fingerprint hashes.
    """

    folder: Path
    label: str
    digest: str
    step: int
    model: ModelConfig
    vocab_size: int
    tokenizer: Tokenizer
    read: Callable[[], Weights]
    inputs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Weights:
        """Its plain weights, read at first use."""
        return self.read()

    def forget_weights(self) -> None:
        """Frees their memory; they are read again at the next use."""
        self.__dict__.pop("weights", None)

    def load_into(self, model: nn.Module) -> None:
        """Copies embeddings and encoder into a model to fine-tune; the task's head stays as initialised."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("head."):
                    ours = f"encoder.{name.removeprefix('discriminator.')}"
                    parameter.copy_(self.weights[ours if name.startswith("discriminator.") else name])


def find_pretrained(config: Config, installs: bool = True) -> Pretrained:
    """What ``evaluate.checkpoint`` names, verified.

    Args:
        config: The run.
        installs: Whether a folder's tokenizer may be written to ``run.dir``.

    Raises:
        ConfigError: There is none, or it does not fit ``evaluate.max_length``.
        DamagedError: It is not what it was when it was written.
    """
    if isinstance(config.evaluate.checkpoint, Path):
        return _from_folder(config, config.evaluate.checkpoint, installs)
    found, tokenizer = find_checkpoint(config), Tokenizer(load_tokenize_output(config)["tokenizer"])
    return Pretrained(
        folder=found.folder,
        label=found.folder.name,
        digest=found.digest,
        step=found.step,
        model=config.model,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        read=lambda: discriminator_weights(found.tensors(checkpoints.WEIGHTS), found.shapes(checkpoints.WEIGHTS)),
        inputs={"pretrain": science_of(config, "pretrain")},
    )


def find_more(config: Config) -> list[Pretrained]:
    """What ``evaluate.more_checkpoints`` names, by step; those that ``evaluate.checkpoint`` names too are in it.

    Raises:
        ConfigError, DamagedError: As ``find_pretrained``.
    """
    steps = config.evaluate.more_checkpoints
    if steps == "all":
        steps = checkpoints.list_steps(stage_folder(config, "pretrain") / "checkpoints")
    chosen = [config.evaluate.model_copy(update={"checkpoint": step}) for step in sorted(set(steps))]
    return [find_pretrained(config.model_copy(update={"evaluate": evaluate})) for evaluate in chosen]


def find_checkpoint(config: Config) -> checkpoints.Checkpoint:
    """The verified checkpoint of the run that ``evaluate.checkpoint`` names; raises as ``find_pretrained``."""
    folder = stage_folder(config, "pretrain") / "checkpoints"
    step = config.evaluate.checkpoint
    if isinstance(step, int):
        return checkpoints.load(folder, step)
    pretrain = read_record(config, "pretrain")
    if pretrain is None or pretrain.state != "done":
        raise ConfigError(f"{folder}: pretraining is not finished; run `electra pretrain` first")
    found = checkpoints.load(folder, pretrain.output["checkpoint_step"])
    if found.digest != pretrain.output["checkpoint_sha256"]:
        raise DamagedError(f"{found.folder}: not the checkpoint that pretraining ended with; run it again with --force")
    return found


def _from_folder(config: Config, path: Path, installs: bool) -> Pretrained:
    folder, digest = find_folder(path, _KEY), folder_digest(path, _KEY, config.run.dir / "digests")
    network = read_network(path, _KEY)
    tokenizer = folder_tokenizer(folder, config.run.dir / "tokenizers" if installs else None)
    if tokenizer.vocab_size > network.vocab_size:
        raise ConfigError(
            f"{_KEY}={path}: its tokenizer has {tokenizer.vocab_size:,} ids and its token table "
            f"{network.vocab_size:,} rows; put the tokenizer there that it was trained with"
        )
    if (config.evaluate.max_length or 0) > network.model.max_positions:
        raise ConfigError(
            f"evaluate.max_length={config.evaluate.max_length} exceeds the {network.model.max_positions} positions of "
            f"{_KEY}={path}; lower it"
        )
    return Pretrained(
        folder=path,
        label=f"{path.name}-{digest[:8]}",
        digest=digest,
        step=0,
        model=network.model,
        vocab_size=network.vocab_size,
        tokenizer=tokenizer,
        read=lambda: network.weights,
    )
