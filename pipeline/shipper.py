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
from pipeline.errors import ElectraError
from pipeline.redaction import redact, without_secrets
from pipeline.sign_of_life import is_at_work
from pipeline.stages import STAGES, read_record_file
from pipeline.tracking import first_line, shipper_lock

if TYPE_CHECKING:
    from pipeline.tracking_mirror import Mirror
    from pipeline.tracking_system import Sampler

_INTERVAL_S = 2.0
_LONGEST_PAUSE_S = 60.0


def main() -> int:
    """Mirrors until told to end; returns the exit code."""
    folder, experiment = Path(sys.argv[1]), sys.argv[2]
    uri = os.environ["ELECTRA_TRACKING_URI"]
    owner = os.getppid()
    os.nice(10)  # training comes first
    ignore_stop_signals()  # Slurm sends them to every process; this one ends with the pipe
    while True:
        try:
            with shipper_lock(folder):  # an earlier one may still be saying that its run was killed
                return _ship(folder, uri, experiment, owner)
        except ElectraError as error:
            _say(str(error))
            if _listen(0) is not None:
                return 1


def _ship(folder: Path, uri: str, experiment: str, owner: int) -> int:
    mirror, pause_s = None, _INTERVAL_S
    word = _listen(pause_s)
    sampler = _start_sampler(folder) if word is None else None
    while True:
        if sampler and word is not None:
            sampler.end()
        try:
            mirror = mirror or _connect(folder, uri, experiment)
            mirror.mirror(owner_alive=word is None or _is_left_to_others(folder, owner))
            pause_s = _INTERVAL_S
        except Exception as error:
            _say(f"{redact(uri)}: {type(error).__name__}: {first_line(error, uri)}")
            mirror = None  # what is known of the store may be wrong; it is asked again
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if word is not None:
            return 0 if mirror else 1
        word = _listen(pause_s)


def _is_left_to_others(folder: Path, owner: int) -> bool:
    """Whether a stage goes on after its owner's end: other elements of an array do it, or the run's next start."""
    records = [read_record_file(folder / stage / "stage.json") for stage in STAGES]
    return any(record and record.state == "running" for record in records) and is_at_work(folder, but=owner)


def _connect(folder: Path, uri: str, experiment: str) -> "Mirror":
    from pipeline.tracking_mirror import Mirror  # takes seconds to import; the pipe is read before

    return Mirror(folder, uri, experiment, _say)


def _start_sampler(folder: Path) -> "Sampler | None":
    """System metrics, unless MLflow's own variable says no."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        return None
    from pipeline.tracking_system import Sampler

    sampler = Sampler(folder, _say)
    sampler.start()
    return sampler


def _listen(seconds: float) -> str | None:
    """``end``, an empty string when the pipe broke, or None when nothing was said for so long."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.readline() if ready else None


def _say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), without_secrets(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
