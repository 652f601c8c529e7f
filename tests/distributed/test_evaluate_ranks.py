"""Ranks of an evaluation agree before any of them trains, and none waits for one that has given up."""

import subprocess
import sys

import pytest

from tests.conftest import clean_environment, free_port

pytestmark = pytest.mark.distributed

PROGRAM = """
import sys
from datetime import timedelta
from pipeline.distributed import Control, Process, exit_process, init_process_group, leave_together
from pipeline.errors import DamagedError
from pipeline.evaluate import _agree

rank, case = int(sys.argv[1]), sys.argv[2]
init_process_group(Process(rank, rank, 2), "cpu", timedelta(days=2))
control = Control("cpu", timedelta(days=2))


def plan():
    if rank == 1:
        raise DamagedError("rows.tsv:3: text is empty")
    return "planned"


if case == "agree":
    try:
        _agree(control, plan)
    except Exception as error:
        print(type(error).__name__, error.exit_code, error)
elif rank == 1:
    leave_together(2.0)  # rank 0 does not come
    print("left")
else:
    import time

    time.sleep(600)
exit_process(0)
"""


def start(case: str) -> list[subprocess.Popen[str]]:
    environment = clean_environment(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1", WORLD_SIZE="2"
    )
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), case], env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_what_one_rank_refuses_all_refuse_and_one_says() -> None:
    said = [process.communicate(timeout=400)[0].strip() for process in start("agree")]
    assert said == ["ElectraError 65 rows.tsv:3: text is empty", "ElectraError 65"]


def test_a_rank_does_not_wait_for_ever_to_leave() -> None:
    first, second = start("leave")
    try:
        assert second.communicate(timeout=60)[0].strip() == "left"
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
