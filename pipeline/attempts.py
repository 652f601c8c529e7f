"""What one attempt leaves for the next: how it ended, and from which step each start of a Slurm job went on.

$ELECTRA_EXIT_FILE              "93 reason", for the job script: srun's own exit code says less
<run>/pretrain/requeues.json    a Slurm job, and the newest checkpoint's step at each of its requeues
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from data_shards.store import write_json
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedError, DoNotRequeueError, StoppedByFile, StoppedEarly, UsageError
from pipeline.log import logger
from pipeline.stages import changed_since, read_record, stage_folder
from pipeline.stopping import STOP_FILE

EXIT_FILE = "ELECTRA_EXIT_FILE"
"""Environment variable: where a process that ends for good says so."""

HELD = "held: "
"""Begins the reason of a stop after which nobody is to start again."""

_GRAVE = tuple(error.exit_code for error in (UsageError, DamagedError, ConfigError, DoNotRequeueError))
_MOST_STARTS_FROM_ONE_STEP = 3


def record_exit(code: int, error: Exception) -> None:
    """Writes ``CODE REASON`` to ``$ELECTRA_EXIT_FILE`` where it is set and the code means an end for good.

    Processes of a step end together: a grave code takes the place of a stop, never the other way round, and a process
    that leaves speaking to rank 0 says nothing here either.
    """
    reason = " ".join(str(error).split())
    if EXIT_FILE not in os.environ or not reason or code not in (*_GRAVE, StoppedEarly.exit_code):
        return
    path = Path(os.environ[EXIT_FILE])
    line = f"{code} {HELD if isinstance(error, StoppedByFile) else ''}{reason}\n"
    try:
        if code in _GRAVE:
            part = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
            part.write_text(line, encoding="utf-8")
            part.replace(path)
        else:
            with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(line)
    except OSError as problem:
        logger.warning("%s: %s; the job script has only srun's exit code", path, problem.strerror)


def refuse_to_start(config: Config, rank: int = 0) -> None:
    """What keeps pretraining from starting, though its results could be read.

    Raises:
        ConfigError: A safeguard is asked for that would never do anything; what is trained on would depend on how many
            processes there are.
        StoppedByFile: The run's folder holds a file STOP.
        DoNotRequeueError: Requeues of this Slurm job get nowhere (rank 0).
    """
    check_settings(config)
    file = config.run_folder / STOP_FILE
    if file.exists():
        raise StoppedByFile(f"{file} is there: remove it to go on" if rank == 0 else "")
    if rank == 0:
        _note_requeue(config)


def check_settings(config: Config) -> None:
    """What keeps pretraining from starting whatever the text: to be known before hours are spent on that.

    Raises:
        ConfigError: As ``refuse_to_start``.
    """
    _check_safeguards(config)
    _check_normalization(config)


def _check_safeguards(config: Config) -> None:
    train, nothing = config.train, "train.held_out_rows=0"
    if train.held_out_rows:
        nothing = "data.held_out_fraction=0"
    if train.keep_best and 0 in (train.held_out_rows, config.data.held_out_fraction):
        raise ConfigError(
            f"train.keep_best=true keeps what scores best on held-out rows, and {nothing} leaves none to score; "
            "raise it, or set train.keep_best=false"
        )
    if train.spike_rollbacks and train.spike_threshold is None:
        raise ConfigError(
            f"train.spike_rollbacks={train.spike_rollbacks} goes back before a loss spike, and with "
            "train.spike_threshold=null none is found; set a threshold, or train.spike_rollbacks=0"
        )


def _check_normalization(config: Config) -> None:
    train, record = config.train, read_record(config, "pretrain")
    begun = record and "micro_batch_rows" in record.numerics and not changed_since(record, config)
    if config.objective.loss_normalization == "micro_batch" and train.micro_batch_size == "auto" and not begun:
        raise ConfigError(
            "train.micro_batch_size=auto follows from the number of processes, and with objective.loss_normalization="
            "micro_batch (recipe: released) the loss follows from it; set train.micro_batch_size to a number of rows"
        )


def _note_requeue(config: Config) -> None:
    """Counts this start of a Slurm job once, however often ranks are started in it."""
    job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    if restart == "0":
        return
    folder = stage_folder(config, "pretrain")
    path = folder / "requeues.json"
    starts = _read_starts(path, job)
    step = starts.setdefault(restart, max(checkpoints.list_steps(folder / "checkpoints"), default=0))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"job": job, "steps": starts})
    last = [starts[number] for number in sorted(starts, key=int)[-_MOST_STARTS_FROM_ONE_STEP:]]
    if last == [step] * _MOST_STARTS_FROM_ONE_STEP:
        raise DoNotRequeueError(
            f"job {job} was requeued {_MOST_STARTS_FROM_ONE_STEP} times in a row and is still at step {step:,}; look "
            f"at how its attempts ended in the job's log and {folder / 'log.txt'}, at the nodes named there, and "
            "whether the time limit leaves room for a checkpoint (train.checkpoint_every, checkpoint_seconds); then "
            "submit again, which counts from zero"
        )


def _read_starts(path: Path, job: str) -> dict[str, int]:
    """Steps by restart count, of this job alone."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["steps"]) if content["job"] == job else {}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: unreadable (%s); requeues are counted from zero", path, error)
        return {}
