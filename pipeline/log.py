"""Log lines on stderr and, for rank 0 of a stage, in a file of the run folder."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("electra")

_FORMAT = "%(asctime)s %(rank)s%(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


class _RankFilter(logging.Filter):
    """Marks lines of other ranks, and passes only warnings of theirs."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = f"[rank {self.rank}] " if self.rank else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


class _StderrHandler(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at the moment: a live bar puts itself in between."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value


class _FileHandler(logging.FileHandler):
    """A line that a full disk does not take stands on stderr, and needs no traceback there."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def set_up_logging(rank: int = 0) -> None:
    """Sends lines to stderr; ranks other than 0 speak only to warn."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    _add(_StderrHandler(), rank)
    quiet_libraries()


def log_to_file(path: Path, rank: int = 0) -> None:
    """Also appends the lines to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _add(_FileHandler(path, encoding="utf-8"), rank)


def _add(handler: logging.Handler, rank: int) -> None:
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    handler.addFilter(_RankFilter(rank))
    logger.addHandler(handler)


def quiet_libraries() -> None:
    """Keeps the chatter of libraries out of the log; their warnings stay."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def write_whole() -> None:
    """Gives stdout and stderr a buffer where ``python -u`` took it away; each line is still written at once.

    Without one, what a signal cuts off of a write is lost (a pseudo-terminal of ``srun --unbuffered`` takes
    2,048 bytes at a time), and ``print`` writes word by word, so that the lines of two ranks mix.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(getattr(stream, "buffer", None), io.RawIOBase):
            setattr(sys, name, _with_buffer(stream))


def _with_buffer(stream: TextIO) -> TextIO:
    return open(stream.fileno(), "w", 1, encoding=stream.encoding, errors=stream.errors, closefd=False)
