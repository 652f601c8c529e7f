"""Signs that a training goes nowhere, or slower than it could.

A discriminator whose AUC stays at 1/2 calls tokens replaced by chance. Accuracy does not show it:
with one token in twelve replaced, "original" is right eleven times of twelve.
"""

import statistics

from pipeline.config import Config
from pipeline.journal import Entry
from pipeline.log import logger
from pipeline.two_stage import stage_at

_CHANCE = 0.02
"""How far an AUC at chance may be from 1/2; what a hundred small batches leave of noise is a tenth of that."""


class ChanceWatch:
    """Counts logged intervals with the discriminator at chance, and warns after each so many of them."""

    def __init__(self, config: Config, entries: list[Entry]):
        """``entries`` are the journal's so far: a run that resumes goes on counting."""
        self._config = config
        self._first: Entry | None = None
        self._intervals = 0
        for entry in entries:
            self._count(entry)

    def observe(self, entry: Entry) -> None:
        """Takes in a new entry; warns where it completes ``train.chance_intervals`` at chance."""
        self._count(entry)
        wanted = self._config.train.chance_intervals
        if wanted and self._intervals and self._intervals % wanted == 0:
            logger.warning("%s", self._advice(entry))

    def _count(self, entry: Entry) -> None:
        auc = entry.get("train/discriminator_auc")
        applied_steps = entry["step"] - entry.get("train/skipped_steps", 0)
        stage = stage_at(self._config, max(0, applied_steps - 1))
        warmed_up = applied_steps - stage.first_step > self._config.optimizer.warmup_steps
        if auc is None or not warmed_up or abs(auc - 0.5) > _CHANCE:
            self._first, self._intervals = None, 0
            return
        self._first = self._first or entry
        self._intervals += 1

    def _advice(self, entry: Entry) -> str:
        assert self._first
        model, objective = self._config.model, self._config.objective
        changes = [f"raise objective.discriminator_loss_weight (now {objective.discriminator_loss_weight:g})"]
        sizes_may_differ = objective.sharing != "all" and objective.training != "two_stage"
        if objective.generator == "network" and sizes_may_differ:
            changes.insert(0, (
                f"lower model.generator_width (now {model.generator_width:.2g}; 1/4 to 1/2 is best in the paper) or "
                "model.generator_depth"
            ))  # fmt: skip
        return (
            f"the discriminator is at chance (AUC {entry['train/discriminator_auc']:.3f}) since step "
            f"{self._first['step']:,}, for {self._intervals} logged intervals, while the generator is right at "
            f"{100 * entry.get('train/generator_accuracy', 0):.0f} % of the selected positions: its samples may be too "
            f"good to tell apart. What may help: {'; '.join(changes)}; if no loss falls at all, change optimizer.lr"
        )


_SLOW = 1.5
_SLOW_INTERVALS = 3


class SlowWatch:
    """Names processes that take longer than the others, logged interval after logged interval.

    All wait for the slowest in every step, so what is compared is the time that a process works by itself: rows, and
    forward passes.
    """

    def __init__(self, nodes: list[str]):
        """``nodes``: host name of each rank."""
        self._nodes, self._counts = nodes, [0] * len(nodes)

    def observe(self, seconds: list[float]) -> None:
        """Takes in the seconds of each rank; warns where it is the third time in a row."""
        usual = statistics.median_low(seconds)  # of two the faster one
        self._counts = [
            count + 1 if own > _SLOW * usual else 0 for count, own in zip(self._counts, seconds, strict=True)
        ]
        slow = [rank for rank, count in enumerate(self._counts) if count and count % _SLOW_INTERVALS == 0]
        if slow:
            names = ", ".join(
                f"rank {rank} on {self._nodes[rank]} ({seconds[rank] / max(usual, 1e-9):.1f} times the median)"
                for rank in slow[:4]
            )
            logger.warning("slow for %d logged intervals in a row: %s; all others wait for it", _SLOW_INTERVALS, names)
