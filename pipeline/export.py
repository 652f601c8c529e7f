"""Export: a checkpoint to Hugging Face folders of its networks.

    OUT/discriminator/  OUT/generator/    config.json  model.safetensors  tokenizer files  README.md

OUT appears whole or not at all: everything is written beside it and renamed.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from data_shards.errors import DataSettingError
from data_shards.tokenizer import LIBRARY_NAME, MODEL_NAME, Tokenizer
from data_shards.tokenizer_files import CONFIG_NAME
from model.config import EncoderShape
from model.hf import OTHER_WEIGHTS, write_folder
from model.weights import OTHERS, Weights, discriminator_weights, expected_shapes, generator_weights, head_of
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedError, UsageError
from pipeline.hf_folder import TOKENIZER_FILES
from pipeline.keys import science_of
from pipeline.log import logger
from pipeline.model_card import Card, read_card, write_card
from pipeline.stages import differences, load_run, locate_tokenized, read_record_file

ROLES = ("discriminator", "generator")
_IMPORTS = ("initial_discriminator", "initial_generator")


@dataclass(frozen=True)
class Source:
    """A verified checkpoint and what is known of its run.

    Attributes:
        run_folder: ``<run.dir>/runs/<run.name>``.
        config: As the run was last started.
        checkpoint: Verified.
        tokenizer: The run's.
    """

    run_folder: Path
    config: Config
    checkpoint: checkpoints.Checkpoint
    tokenizer: Tokenizer


def export_checkpoint(checkpoint: Path, out: Path, license_id: str, languages: tuple[str, ...]) -> list[str]:
    """Writes ``out``.

    Args:
        checkpoint: A checkpoint's folder, or a run's.
        out: Must not exist, or be an empty folder.
        license_id: For the model cards.
        languages: Likewise.

    Returns:
        What was written, in lines for people.

    Raises:
        UsageError: No checkpoint there; ``out`` holds something.
        DamagedError: The checkpoint is not what was written, or its run's records are unreadable or of another model.
    """
    out = out.expanduser().resolve()
    _refuse_occupied(out)
    source = find_source(checkpoint.expanduser().resolve())
    card = read_card(source.run_folder, source.config, source.checkpoint, license_id, languages)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.export.tmp"  # the same name each time: a killed export's is removed
    shutil.rmtree(temporary, ignore_errors=True)
    lines = []
    try:
        for role in ROLES:
            lines.append(_write_role(source, role, temporary / role, out / role, card))
        _sync(temporary)
        os.replace(temporary, out)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def _refuse_occupied(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise UsageError(f"{out}: {what}; name a folder that does not exist yet, or remove it")


def find_source(path: Path) -> Source:
    """The checkpoint that ``path`` names, a checkpoint's folder or a run's; raises as ``export_checkpoint``."""
    number = path.name.removeprefix("step_")
    if path.name.startswith("step_") and number.isdigit() and (path / checkpoints.MANIFEST).exists():
        run_folder, found = path.parent.parent.parent, checkpoints.load(path.parent, int(number))
    elif (path / "pretrain" / "checkpoints").is_dir():
        run_folder, found = path, _newest_intact(path / "pretrain" / "checkpoints")
    else:
        raise UsageError(
            f"{path}: no checkpoint; name a run's folder (<run.dir>/runs/<run.name>), or one of those in its "
            "pretrain/checkpoints"
        )
    if not (run_folder / "config.yaml").is_file():
        raise DamagedError(f"{run_folder}: no config.yaml, so the checkpoint's model is not known; restore that file")
    config = load_run(run_folder)
    _check_config(run_folder, config)
    return Source(run_folder, config, found, _tokenizer_of(run_folder, config))


def _newest_intact(folder: Path) -> checkpoints.Checkpoint:
    """Changes nothing: a training may be writing here."""
    tried: set[int] = set()
    while left := sorted(set(checkpoints.list_steps(folder)) - tried):  # anew each time: a training prunes and adds
        tried.add(left[-1])
        try:
            return checkpoints.load(folder, left[-1])
        except (DamagedError, ConfigError, FileNotFoundError) as error:
            logger.warning("%s; trying another one", error)
    if tried:
        raise DamagedError(f"{folder}: none of the checkpoints at steps {', '.join(map(str, sorted(tried)))} is "
                           "intact; restore one from a copy")  # fmt: skip
    raise UsageError(f"{folder}: no checkpoint yet; export after the first one")


def _check_config(run_folder: Path, config: Config) -> None:
    """The config must be the one of the training: heads and activation leave no trace in the weights' shapes."""
    record = read_record_file(run_folder / "pretrain" / "stage.json")
    if record is None:
        logger.warning("%s: no pretrain/stage.json, so config.yaml was not compared with it", run_folder)
        return
    # What was imported is in the checkpoint; its folder may be gone, or be gigabytes to read.
    train = config.train.model_copy(update=dict.fromkeys(_IMPORTS))
    here, recorded = science_of(config.model_copy(update={"train": train}), "pretrain"), record.inputs["science"]
    both = (here.keys() & recorded.keys()) - {f"train.{key}" for key in _IMPORTS}  # releases differ in their keys
    changed = differences({key: recorded[key] for key in both}, {key: here[key] for key in both})
    if changed:
        raise DamagedError(
            f"{run_folder / 'config.yaml'}: not the config that the run was trained with, as pretrain/stage.json "
            "has it:\n  " + "\n  ".join(changed) + "\nrestore it, or set these keys in it as they were"
        )


def _tokenizer_of(run_folder: Path, config: Config) -> Tokenizer:
    """The tokenizer that the run's tokenize stage names, also when its root has moved."""
    record = read_record_file(run_folder / "tokenize" / "stage.json")
    if record is None or "tokenizer" not in record.output:
        raise DamagedError(f"{run_folder / 'tokenize'}: no finished tokenize stage; restore its stage.json")
    folder, wanted = Path(locate_tokenized(config, record.output)["tokenizer"]), record.output["tokenizer_sha256"]
    remedy = f"restore the folder from a copy: {MODEL_NAME}, or else {LIBRARY_NAME}, of SHA-256 {wanted}"
    try:
        tokenizer = Tokenizer(folder)
    except DataSettingError as error:
        raise DamagedError(f"{folder}: the run's tokenizer is missing or unusable; {remedy}") from error
    if tokenizer.digest != wanted:
        raise DamagedError(f"{folder}: not the tokenizer that the run was trained with; {remedy}")
    return tokenizer


def _write_role(source: Source, role: str, folder: Path, target: Path, card: Card) -> str:
    """One network's folder; returns what to say of it."""
    config, found = source.config, source.checkpoint
    read, names = found.tensors(checkpoints.WEIGHTS), found.shapes(checkpoints.WEIGHTS)
    is_main = role == "discriminator"
    weights = (discriminator_weights if is_main else generator_weights)(read, names)
    if not weights:
        why = "objective.name=mlm trains one network" if config.objective.name == "mlm" else (
            f"objective.generator={config.objective.generator} has no weights"
        )  # fmt: skip
        return f"{target}: not written, since {why}"
    shape = config.model.discriminator if is_main else config.model.generator
    _check_shapes(source, weights, shape)
    folder.mkdir(parents=True)
    write_folder(folder, weights, config.model, shape, source.tokenizer.special.pad)
    _copy_tokenizer(source.tokenizer.folder, folder, weights["embeddings.position.weight"].shape[0])
    write_card(folder, role, weights, card)
    others = f", {OTHER_WEIGHTS}" if any(name.startswith(OTHERS) for name in weights) else ""
    return f"{target}: {sum(w.numel() for w in weights.values()):,} weights of step {found.step:,}{others}"


def _check_shapes(source: Source, weights: Weights, shape: EncoderShape) -> None:
    """The checkpoint must be of the run's config: heads and activation come from there."""
    positions, (vocab_size, width) = source.config.model.max_positions, weights["embeddings.token.weight"].shape
    wanted = expected_shapes(shape, width, vocab_size, positions, head_of(weights))
    there = {name: tuple(weight.shape) for name, weight in weights.items() if not name.startswith(OTHERS)}
    different = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if different:
        raise DamagedError(
            f"{source.checkpoint.folder}: {different[0]} is not of the shape that {source.run_folder / 'config.yaml'} "
            "gives; restore the config that the checkpoint was trained with"
        )
    if source.tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"{source.checkpoint.folder}: {vocab_size:,} rows in the token table, and {source.tokenizer.folder} has "
            f"{source.tokenizer.vocab_size:,} ids; restore the tokenizer that the run was trained with"
        )


def _copy_tokenizer(source: Path, folder: Path, num_positions: int) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {"model_max_length": num_positions}
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Brings a folder's files and names to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
