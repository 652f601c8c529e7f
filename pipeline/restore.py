"""Where a training starts: its newest checkpoint, another run's, imported weights, or nothing."""

from pathlib import Path

import torch

from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.distributed import Control
from pipeline.engine import MOMENTS, Engine
from pipeline.errors import ConfigError
from pipeline.fork import load_parent, read_by_parent
from pipeline.initial_weights import initial_weights
from pipeline.log import logger
from pipeline.training import TrainingState


def restore(config: Config, folder: Path, engine: Engine, control: Control, vocab_size: int) -> TrainingState:
    """The newest intact checkpoint's state; else the one forked from; else a fresh one."""
    folder = folder / "checkpoints"
    # Rank 0 verifies and moves aside what is damaged; the others read what it found.
    step = control.broadcast(_step_of(checkpoints.load_newest(folder)) if control.is_first else None)
    if step is not None:
        found = checkpoints.load(folder, step, verify=False)
    elif config.run.fork_from:
        found = load_parent(config, control.is_first)
    else:
        logger.info("no checkpoint in %s: training starts from the beginning", folder)
        imported = initial_weights(config, vocab_size)
        if imported is not None:
            engine.set_weights(imported)
        return TrainingState()
    _check_shapes(found, engine)
    weights, moments = found.tensors(checkpoints.WEIGHTS), found.tensors(checkpoints.OPTIMIZER)
    state = TrainingState(**found.state)
    if step is None:
        state.score = state.scored_rows = None  # of another loss, or of other rows
        state.rows_before = control.broadcast(read_by_parent(config, found.state) if control.is_first else None)

    def read(kind: str, name: str) -> torch.Tensor:
        return moments(f"{kind}/{name}") if kind in MOMENTS else weights(name)

    engine.load_full_state(read, state.applied_steps)
    engine.loss_scale = state.loss_scale
    logger.info("restored step %d from %s", state.step, found.folder)
    return state


def _step_of(found: checkpoints.Checkpoint | None) -> int | None:
    return found.step if found else None


def _check_shapes(found: checkpoints.Checkpoint, engine: Engine) -> None:
    """A forked checkpoint must be of this very model."""
    stored, wanted = found.shapes(checkpoints.WEIGHTS), engine.shapes()
    different = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise ConfigError(
            f"{found.folder} is of another model: {name} is {stored.get(name, 'absent')} there and "
            f"{wanted.get(name, 'absent')} here; set model.* and the tokenizer as they were"
        )
