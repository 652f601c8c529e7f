"""Processes that are started here: how they meet, what a signal to stop does to them, and the exit code."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import launch
from pipeline.launch import Children

ANSWERS = "signal.signal(signal.SIGUSR2, lambda *_: sys.exit({})); "
IGNORES = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); "
READY = "open(os.environ['READY'] + os.environ.get('RANK', '0'), 'w').close(); time.sleep(60)"


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes processes that are started run this code in place of the pipeline."""

    def use(code: str) -> None:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\nimport os, signal, socket, sys, time\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    monkeypatch.setattr(launch, "_GRACE_S", 0.2)
    monkeypatch.setenv("READY", str(tmp_path / "ready"))
    return use


def tell_to_stop_when_ready(tmp_path: Path, count: int) -> threading.Thread:
    def tell() -> None:
        while len(list(tmp_path.glob("ready*"))) < count:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=tell)
    thread.start()
    return thread


@pytest.mark.parametrize(("handler", "code"), [
    (ANSWERS.format(0), 0), (ANSWERS.format(85), 85), (ANSWERS.format(75), 85), (ANSWERS.format(93), 93), ("", 85),
])  # fmt: skip
def test_exit_code_of_a_process_that_is_told_to_stop(
    tmp_path: Path, pretend: Callable[[str], None], handler: str, code: int
) -> None:
    """Without a handler, as while it starts, it dies by the signal: there was nothing to save."""
    pretend(handler + READY)
    thread = tell_to_stop_when_ready(tmp_path, 1)
    with Children() as children:
        assert children.run([], dict(os.environ)) == code
        assert children.told_to_stop
        thread.join()
        started = time.monotonic()
        assert children.run([], dict(os.environ)) == 85  # nothing is started any more
        assert time.monotonic() - started < 10


def test_processes_that_wait_for_one_that_was_stopped_are_stopped_too(
    tmp_path: Path, pretend: Callable[[str], None]
) -> None:
    pretend(f"if os.environ['RANK'] == '1': {IGNORES}\n{READY}")
    thread = tell_to_stop_when_ready(tmp_path, 2)
    assert launch.launch([], 2, 1) == 85
    thread.join()


def test_death_by_a_signal_that_nobody_sent_here_is_a_failure(pretend: Callable[[str], None]) -> None:
    pretend("os.kill(os.getpid(), signal.SIGUSR2)")
    assert launch.launch([], 2, 1) == 1


def test_first_process_owns_the_port_that_all_meet_at(pretend: Callable[[str], None]) -> None:
    pretend(
        "rank, given = os.environ['RANK'], os.environ.get('ELECTRA_LISTENER')\n"
        "if rank == '1': sys.exit(1 if given else 0)\n"
        "port = socket.socket(fileno=int(given)).getsockname()[1]\n"
        "sys.exit(0 if port == int(os.environ['MASTER_PORT']) else 1)"
    )
    assert launch.launch([], 2, 1) == 0


def test_one_process_needs_no_port() -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "from pipeline.distributed import Control, Process, init_process_group\n"
        "init_process_group(Process(), 'cpu')\nbox = torch.ones(1)\ndist.all_reduce(box)\n"
        "dist.barrier(dist.new_group(backend='gloo'))\nprint(box.item(), Control('cpu').gather(3))\n"
        "dist.destroy_process_group()\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    environment |= {"MASTER_PORT": "1"}  # which nobody may listen at
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1.0", "[3]"]


def test_a_process_whose_group_is_left_behind_keeps_its_exit_code() -> None:
    """Nothing of the interpreter's end is run, where gloo's threads might abort it; but what was said comes out."""
    code = (
        "import atexit, sys, torch, torch.distributed as dist\n"
        "from pipeline.distributed import Process, exit_process, init_process_group\n"
        "atexit.register(print, 'finalized')\n"
        "if 'group' in sys.argv: init_process_group(Process(), 'cpu')\n"
        "print('said'); exit_process(75)\n"
    )
    for argument, said in (("group", "said\n"), ("alone", "said\nfinalized\n")):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (75, said), done.stderr


def test_the_death_of_any_process_is_seen(pretend: Callable[[str], None]) -> None:
    """Also of one after the first, while the first one waits for it."""
    pretend(f"if os.environ['RANK'] == '1': sys.exit(78)\n{READY}")
    started = time.monotonic()
    assert launch.launch([], 2, 1) == 78
    assert time.monotonic() - started < 30
