"""Lines that a run has made again, from other rows, after a loss spike (``spikes``), while MLflow holds the first ones.

MLflow deletes no point, but of several at one step the latest is the one that counts. So such a line is shipped once
more. Which ones were stands in the times of the points, so that every mirror of the run knows it.
"""

from collections.abc import Iterable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipeline.spikes import SkippedRows, read_skips
from pipeline.tracking_store import TrackedRun


class Rollbacks:
    """Which lines are due again.

    Args:
        folder: Of the pretrain stage.
        metric: One that is in every line.
    """

    def __init__(self, folder: Path, metric: str):
        self._folder, self._metric = folder, metric
        self._skips: list[SkippedRows] = []
        self._times_ms: dict[int, set[int]] = {}  # by step: of the lines that MLflow holds

    def look(self, client: MlflowClient, run: TrackedRun) -> None:
        """Learns of new ones; asks MLflow where there are some.

        Raises:
            DamagedError: skipped_rows.json cannot be read.
        """
        skips = [skip for skip in read_skips(self._folder) if not skip.inherited]
        if skips != self._skips:
            held = client.get_metric_history(run.run_id, self._metric) if self._metric in run.metrics else []
            self._skips, self._times_ms = skips, {}
            self.note(held)

    def note(self, points: Iterable[Metric]) -> None:
        """Takes in what MLflow holds now."""
        for point in points:
            if point.key == self._metric and self._num_made(point.step) > 1:
                self._times_ms.setdefault(point.step, set()).add(point.timestamp)

    def is_due(self, step: int, at_ms: int) -> bool:
        """Whether MLflow holds older lines of the step only; a line that a kill had made again is equal, and is not."""
        held = self._times_ms.get(step, set())
        return 0 < len(held) < self._num_made(step) and at_ms > max(held)

    def _num_made(self, step: int) -> int:
        """How many different lines a step has had: one more than the run went back to before it."""
        return 1 + sum(skip.after_step < step <= skip.after_step + skip.steps for skip in self._skips)
