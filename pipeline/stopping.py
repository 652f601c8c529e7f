"""Being told to stop: signals, clocks and a file only set a flag, and the work looks at it between two pieces."""

import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.distributed import STOP_SIGNALS

STOP_FILE = "STOP"
"""Name of the file in a run's folder that asks to stop, and not to start again while it is there."""

JOB_END = "ELECTRA_JOB_END_TIME"
"""Environment variable: when the Slurm job's time limit ends it, in unix seconds; the job scripts set it."""

_SECONDS_BETWEEN_LOOKS = 5.0


class StopRequest:
    """Whether this process was told to stop, and by what.

    Attributes:
        is_held: Whether the file asked: nobody is to start again on its own.
    """

    def __init__(
        self, after_seconds: float | None = None, before_limit_seconds: float | None = None, file: Path | None = None
    ):
        """Installs handlers for SIGTERM, SIGUSR2 and SIGINT.

        Args:
            after_seconds: Most seconds from now.
            before_limit_seconds: Least seconds to leave of a Slurm job's time; None: the limit is others' business.
            file: What asks for a stop when it is there, looked for every few seconds.
        """
        self._after_seconds = after_seconds
        self._deadline = time.monotonic() + after_seconds if after_seconds else math.inf
        self._before_limit_seconds = before_limit_seconds or 0.0
        job_end_unix_s = os.environ.get(JOB_END) if before_limit_seconds else None
        self._limit_unix_s = float(job_end_unix_s or math.inf) - self._before_limit_seconds
        self._file, self._next_look = file, -math.inf
        self._signal: str | None = None
        self.is_held = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._signal = signal.Signals(number).name

    def reason(self) -> str | None:
        """Why to stop, or None."""
        now = time.monotonic()
        if self._file and not self.is_held and now >= self._next_look:
            self._next_look = now + _SECONDS_BETWEEN_LOOKS
            with suppress(OSError):  # a file system that does not answer is no reason to stop
                self.is_held = self._file.exists()
        if self.is_held:
            return f"{self._file} is there: remove it to go on"
        if self._signal:
            return self._signal
        if now > self._deadline:
            return f"train.stop_after_seconds={self._after_seconds:g}"
        if time.time() > self._limit_unix_s:
            return f"less than {self._before_limit_seconds:g} s before the job's time limit"
        return None
