"""How training shows itself: one line per log interval in the log, a live bar on a terminal."""

import sys
from typing import Any

from pipeline.journal import Entry
from pipeline.log import logger

_SHOWN = (
    ("loss", "train/total_loss", ".4f"),
    ("generator", "train/generator_mlm_loss", ".4f"),
    ("discriminator", "train/discriminator_rtd_loss", ".4f"),
    ("prediction", "train/prediction_loss", ".4f"),
    ("auc", "train/discriminator_auc", ".3f"),
    ("held-out auc", "held_out/discriminator_auc", ".3f"),
    ("lr", "train/learning_rate", ".2e"),
    ("norm", "train/grad_norm", ".2f"),
)
"""What a line shows of a journal entry, where the objective has it."""


class Progress:
    """Rank 0's view; on other ranks nothing is shown."""

    def __init__(self, total_steps: int, first_step: int, rank: int):
        self._total = total_steps
        self._bar: Any = None
        if rank == 0 and sys.stderr.isatty():
            self._bar = _make_bar()
            self._task = self._bar.add_task("pretrain", total=total_steps, completed=first_step, loss="", rate="")
            self._bar.start()

    def advance(self) -> None:
        """One step is done."""
        if self._bar:
            self._bar.advance(self._task)

    def report(self, entry: Entry, remaining_s: float) -> None:
        """Shows a journal entry."""
        loss, rate = entry.get("train/total_loss"), entry["speed/tokens_per_s"]
        if self._bar:
            shown = "" if loss is None else f"loss {loss:.3f}"
            self._bar.update(self._task, loss=shown, rate=f"{rate:,.0f} tokens/s")
        parts = [
            f"{label} {entry[name]:{form}}"
            for label, name, form in _SHOWN
            if entry.get(name) is not None
        ]  # fmt: skip
        logger.info(
            "step %d/%d  %s  %s tokens/s  MFU %.1f %%  ETA %s",
            entry["step"], self._total, "  ".join(parts), f"{rate:,.0f}", entry["speed/mfu_pct"],
            format_duration(remaining_s),
        )  # fmt: skip

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar:
            self._bar.stop()


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip


def format_duration(seconds: float) -> str:
    """``1:02:03``, with days in front when there are any."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{h}:{m:02d}:{s:02d}"
