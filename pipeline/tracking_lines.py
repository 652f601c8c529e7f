"""Lines of a file that grows, each shipped once, at a bounded cost in memory."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from pipeline.errors import DamagedError

MOST_METRICS = 1000
"""Of one call of MLflow's log_batch."""

_MOST_LINES = 1000
"""Of one batch: a long journal whose lines are all held already would else be in memory as a whole."""

Line = dict[str, Any]


class Tail:
    """What a file of JSON lines has gained; a file that was replaced by another is read from its begin."""

    def __init__(self, path: Path):
        self._path = path
        self._inode, self._offset = 0, 0

    def batches(self, points_of: Callable[[Line], list[Metric]]) -> Iterator[tuple[list[Line], list[Metric]]]:
        """New lines with their points, of as many lines as one call takes; read when the next ones are asked for.

        A line that a kill cut short is left for later.

        Args:
            points_of: The points of a line; none where it is not to be shipped.

        Raises:
            DamagedError: A line is not JSON.
        """
        lines: list[Line] = []
        points: list[Metric] = []
        offset = self._offset
        for line, end in self._lines():
            more = points_of(line)
            if len(lines) == _MOST_LINES or (points and len(points) + len(more) > MOST_METRICS):
                yield lines, points
                lines, points, self._offset = [], [], offset
            lines.append(line)
            points += more
            offset = end
        if lines:
            yield lines, points
            self._offset = offset

    def _lines(self) -> Iterator[tuple[Line, int]]:
        """Whole lines beyond those read, each with the place where it ends."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:
                self._inode, self._offset = about.st_ino, 0
            place = file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place += len(line)
                try:
                    yield json.loads(line), place
                except ValueError as error:
                    self._inode = 0  # another file of the same number, perhaps: all of it is looked at next time
                    raise DamagedError(f"{self._path}: a line is not JSON ({error})") from error
