"""Where the time of a short pretraining run goes: the program's own loop, with clocks around its parts."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import deepspeed

from pipeline import engine, pretrain
from pipeline.batches import MicroBatches
from pipeline.chain import decide, execute_stage
from pipeline.config import Config
from pipeline.distributed import Process
from pipeline.training import Training

LOOP, STEP, SAVE = "loop", ("forward", "backward", "update"), "checkpoint"
_PARTS: tuple[tuple[str, Any, str], ...] = (
    (LOOP, pretrain, "_train"),
    ("forward", deepspeed.DeepSpeedEngine, "forward"),
    ("backward", deepspeed.DeepSpeedEngine, "backward"),
    ("update", engine.Engine, "_update"),
    ("rows and masks", MicroBatches, "of_step"),
    ("norms for the journal", engine, "measure_norms"),
    ("journal", Training, "log"),
    (SAVE, Training, "save"),
    (SAVE, Training, "settle"),  # at the loop's end it waits for the whole write, which else goes on beside the steps
)


def loop_seconds(config: Config) -> dict[str, float]:
    """Tokenizes, then pretrains from the start; wall-clock seconds of ``LOOP`` and of the parts of it, by name.

    The run has one process, this one. Held-out rows are scored after the loop, and do not count.
    """
    assert config.train.held_out_every is None
    seconds, in_loop = {name: 0.0 for name, _, _ in _PARTS}, Event()
    execute_stage(config, decide(config, "tokenize"), Process())
    with ExitStack() as stack:
        for name, owner, attribute in _PARTS:
            timed = _timed(getattr(owner, attribute), name, seconds, in_loop)
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        execute_stage(config, decide(config, "pretrain"), Process())
    return seconds


def overhead(seconds: dict[str, float], steps: int, checkpoint_every: int) -> float:
    """Share of a step's time that is neither forward, nor backward, nor update; a checkpoint's stall is shared out.

    Args:
        seconds: From ``loop_seconds``.
        steps: Of the run, which wrote one checkpoint.
        checkpoint_every: Steps that share a checkpoint.
    """
    inside = sum(seconds[name] for name in STEP)
    others = seconds[LOOP] - seconds[SAVE] - inside + seconds[SAVE] * steps / checkpoint_every
    return others / (inside + others)


def write_documents(path: Path, texts: Iterable[str]) -> None:
    """A text file with blank lines between documents."""
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def fill_vocabulary(path: Path, vocab_size: int) -> Path:
    """Adds unused entries to a ``vocab.txt`` up to a size, so that the model has its published head."""
    entries = path.read_text(encoding="utf-8").splitlines()
    entries += [f"[unused{number}]" for number in range(vocab_size - len(entries))]
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    return path


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float], in_loop: Event) -> Callable[..., Any]:
    """The function, its time in the loop added to ``seconds[name]``; of a generator the time that its items take."""

    @contextmanager
    def clock() -> Iterator[None]:
        if name == LOOP:
            in_loop.set()
        begin = time.perf_counter()
        try:
            yield
        finally:
            if in_loop.is_set():
                seconds[name] += time.perf_counter() - begin
            if name == LOOP:
                in_loop.clear()

    def timed(*arguments: Any, **options: Any) -> Any:
        with clock():
            result = function(*arguments, **options)
            return iter(list(result)) if isinstance(result, Iterator) else result

    return timed
