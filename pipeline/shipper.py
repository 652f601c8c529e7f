"""The process that ships a run to MLflow while it goes: ``python -m pipeline.shipper RUN_FOLDER EXPERIMENT``.

Started by ``pipeline.tracking.Shipper``, which talks to it through stdin: ``end``
asks for a last pass; a broken pipe says that the run's process was killed.
A dead server costs nothing but this process's patience: it tries again, ever
more slowly, until it is asked to end. Exit code 1 means that something is left.
"""

import os
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.distributed import ignore_stop_signals
from pipeline.tracking import first_line, redact, shipper_lock

if TYPE_CHECKING:
    from pipeline.tracking_mirror import Mirror

_INTERVAL_S = 2.0
_LONGEST_PAUSE_S = 60.0


def main() -> int:
    """Mirrors until told to end; returns the exit code."""
    folder, experiment = Path(sys.argv[1]), sys.argv[2]
    uri = os.environ["ELECTRA_TRACKING_URI"]
    os.nice(10)  # training comes first
    ignore_stop_signals()  # Slurm sends them to every process; this one ends with the pipe
    with shipper_lock(folder):  # an earlier one may still be saying that its run was killed
        return _ship(folder, uri, experiment)


def _ship(folder: Path, uri: str, experiment: str) -> int:
    mirror = None
    pause_s = _INTERVAL_S
    while True:
        word = _listen(pause_s)
        try:
            mirror = mirror or _connect(folder, uri, experiment)
            mirror.mirror(owner_alive=word is None)
            pause_s = _INTERVAL_S
        except Exception as error:
            _say(f"{redact(uri)}: {type(error).__name__}: {first_line(error, uri)}")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if word is not None:
                return 1
        else:
            if word is not None:
                return 0


def _connect(folder: Path, uri: str, experiment: str) -> "Mirror":
    from pipeline.tracking_mirror import Mirror  # takes seconds to import; the pipe is read before

    return Mirror(folder, uri, experiment)


def _listen(seconds: float) -> str | None:
    """``end``, an empty string when the pipe broke, or None when nothing was said for so long."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline() if ready else None


def _say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
