"""Ranks of an evaluation agree before any of them trains, and none waits for one that has given up."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.conftest import clean_environment, free_port

pytestmark = pytest.mark.distributed

PROGRAM = r'''
import os, sys, time
from datetime import timedelta
import torch.distributed
from pipeline.distributed import Control, Process, exit_process, init_process_group, leave_together
from pipeline.errors import DamagedError
from pipeline.evaluate import _agree

case, rank = sys.argv[1], 0 if os.fork() else 1  # what both import is imported once
init_process_group(Process(rank, rank, 2), "cpu", timedelta(days=2))
control = Control("cpu", timedelta(days=2))


def say(*words):
    """In one write, or lines of two ranks come mixed where nothing is buffered."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def plan():
    if rank == 1:
        raise DamagedError("rows.tsv:3: text is empty")
    return "planned"


if case == "agree":
    try:
        _agree(control, plan)
    except Exception as error:
        say(rank, type(error).__name__, error.exit_code, error)
elif rank == 1:
    leave_together(2.0)  # rank 0 does not come
    say(rank, "left")
else:
    time.sleep(600)
exit_process(0)
'''


@contextmanager
def started(case: str) -> Iterator[subprocess.Popen[str]]:
    """Both ranks; the process is the first of them."""
    environment = clean_environment(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1", WORLD_SIZE="2"
    )
    command = [sys.executable, "-c", PROGRAM, case]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_what_one_rank_refuses_all_refuse_and_one_says() -> None:
    with started("agree") as both:
        said = sorted(line.strip() for line in both.communicate(timeout=400)[0].splitlines())
    assert said == ["0 ElectraError 65 rows.tsv:3: text is empty", "1 ElectraError 65"]


def test_a_rank_does_not_wait_for_ever_to_leave() -> None:
    with started("leave") as first:
        assert first.stdout and first.stdout.readline().strip() == "1 left"
        assert first.poll() is None
