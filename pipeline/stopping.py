"""Being told to stop: a signal only sets a flag, and the work looks at it between two pieces."""

import math
import signal
import time
from typing import Any

from pipeline.distributed import STOP_SIGNALS


class StopRequest:
    """Whether this process was told to stop, and by what."""

    def __init__(self, after_seconds: float | None = None):
        """Installs handlers for SIGTERM, SIGUSR2 and SIGINT; ``after_seconds`` counts from now."""
        self._after_seconds = after_seconds
        self._deadline = time.monotonic() + after_seconds if after_seconds else math.inf
        self._signal: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._signal = signal.Signals(number).name

    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal:
            return self._signal
        if time.monotonic() > self._deadline:
            return f"train.stop_after_seconds={self._after_seconds:g}"
        return None
