"""Loss spikes: noticed, logged, and if asked for left out: back to a checkpoint before, and past the rows since.

    step     … 900 ── checkpoint ── 1000 ─ spike in the line of step 1100        rows of steps 1001 to 1100
    then     … 900 ── checkpoint ── 1000 ═ rows that were meant for 1101 …       are read never more

Which rows are left out stands in ``skipped_rows.json``, and rows follow from it as from the seed: a run that is
resumed reads the same.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_shards.store import write_json
from pipeline import checkpoint as checkpoints
from pipeline.config_train import TrainConfig
from pipeline.errors import DamagedError
from pipeline.journal import Entry
from pipeline.log import logger

_HISTORY = 20
"""Lines of the journal that a line is compared with."""
_LEAST_HISTORY = 5
_LEAST_SPREAD = 0.01
"""Of the median: what small batches scatter is no spike, however steady the lines before were."""
_OF_NORMAL = 1.4826
"""Standard deviation over median absolute deviation, of normal values."""


@dataclass(frozen=True)
class SkippedRows:
    """Rows that are left out: those that ``steps`` steps after ``after_step`` would have read.

    ``inherited``: by a run that this one was forked from.
    """

    after_step: int
    steps: int
    inherited: bool = False


class SpikeWatch:
    """Compares the loss of each line of the journal with those of the lines before."""

    def __init__(self, config: TrainConfig, entries: list[Entry]):
        """``entries`` are the journal's so far."""
        self._threshold = config.spike_threshold
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._kind: tuple[str, ...] = ()
        for entry in entries:
            self.observe(entry)

    def observe(self, entry: Entry) -> str:
        """Takes in a line; says what is wrong with it, or nothing. A spike is no measure for later lines."""
        if "train/total_loss" not in entry:  # every step was skipped: nothing to judge, nothing to judge others by
            return ""
        kind = tuple(sorted(name for name in entry if name.startswith("train/") and name.endswith("_loss")))
        if kind != self._kind:  # another stage of two_stage: another loss
            self._losses.clear()
        self._kind, loss = kind, entry["train/total_loss"]
        if loss is None or not math.isfinite(loss) or self._threshold is None:
            return ""
        if len(self._losses) >= _LEAST_HISTORY:
            usual = statistics.median(self._losses)
            spread = _OF_NORMAL * statistics.median(abs(other - usual) for other in self._losses)
            excess = (loss - usual) / max(spread, _LEAST_SPREAD * abs(usual), 1e-12)
            if excess > self._threshold:
                return (
                    f"loss spike: {loss:.3f} in the line of step {entry['step']:,}, {excess:.1f} times the spread "
                    f"above the usual {usual:.3f}"
                )
        self._losses.append(loss)
        return ""


def read_skips(folder: Path) -> list[SkippedRows]:
    """Rows that a run leaves out, in the order in which that was decided.

    Raises:
        DamagedError: The file cannot be read; without it the run would read other rows.
    """
    path = folder / "skipped_rows.json"
    if not path.exists():
        return []
    try:
        return [SkippedRows(**part) for part in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path}: unreadable ({error}); restore it from a copy") from error


def add_skip(folder: Path, skip: SkippedRows) -> None:
    """Leaves out more rows from now on."""
    _write_skips(folder, [*read_skips(folder), skip])


def inherit_skips(folder: Path, parent: Path, step: int) -> None:
    """A run that goes on from another one's ``step`` leaves out the rows that this one has left out by then."""
    skips = [replace(skip, inherited=True) for skip in read_skips(parent) if skip.after_step <= step]
    if skips:
        _write_skips(folder, skips)


def _write_skips(folder: Path, skips: list[SkippedRows]) -> None:
    write_json(folder / "skipped_rows.json", [asdict(skip) for skip in skips])


def saved_by(folder: Path, step: int) -> list[int]:
    """Steps of the checkpoints of the stage's ``folder`` up to ``step``, in order."""
    return [saved for saved in checkpoints.list_steps(folder / "checkpoints") if saved <= step]


def go_back(folder: Path, step: int, good_step: int, allowed: int) -> str:
    """Moves checkpoints aside that hold a spike, and leaves out the rows since the newest that does not.

    Args:
        folder: The stage's; it has checkpoints up to ``good_step``.
        step: Of the line that showed the spike.
        good_step: Of the line before it.
        allowed: How often this may be done in a run.

    Returns:
        Why it may not be done, or nothing.
    """
    done, advice = (
        sum(not skip.inherited for skip in read_skips(folder)),
        "lower optimizer.lr and fork the run from a good checkpoint",
    )
    if done >= allowed:
        return f"another loss spike after train.spike_rollbacks={allowed} times of going back; {advice}"
    steps, good = checkpoints.list_steps(folder / "checkpoints"), saved_by(folder, good_step)
    for saved in reversed(steps[len(good) :]):  # the newest first: a kill in between leaves a run that comes back here
        checkpoints.move_aside(checkpoints.step_folder(folder / "checkpoints", saved), "spiked")
    add_skip(folder, SkippedRows(good[-1], step - good[-1]))
    logger.warning(
        "going back to step %d; the rows of steps %d to %d are left out", good[-1], good[-1] + 1, step
    )  # fmt: skip
    return ""


def step_of_rows(step: int, skips: Sequence[SkippedRows]) -> int:
    """The step whose rows, in the run's order, are those of ``step`` (both from 0)."""
    for skip in reversed(skips):  # each was decided in terms of the ones before
        step += skip.steps if step >= skip.after_step else 0
    return step
