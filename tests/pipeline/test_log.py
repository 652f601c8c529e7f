"""What is written to stdout arrives whole, also from an interpreter that buffers nothing."""

from __future__ import annotations

import array
import fcntl
import signal
import subprocess
import sys
import termios
import time

_NUM_BYTES = 300_000  # more than a pipe holds
_WRITER = f"""
import signal, sys
from pipeline.log import write_whole
signal.signal(signal.SIGUSR1, lambda *_: None)
write_whole()
sys.stdout.write("x" * {_NUM_BYTES - 1} + chr(10))
"""


def _num_waiting(descriptor: int) -> int:
    """Bytes that a pipe holds."""
    answer = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, answer)
    return answer[0]


def test_nothing_of_a_write_that_a_signal_cuts_is_lost():
    with subprocess.Popen([sys.executable, "-u", "-c", _WRITER], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        waiting = -1
        while waiting != (waiting := _num_waiting(writer.stdout.fileno())) or not waiting:  # until the pipe is full
            assert writer.poll() is None
            time.sleep(0.1)
        writer.send_signal(signal.SIGUSR1)
        time.sleep(0.2)  # for the signal to arrive; if it comes later the test sees nothing, and passes
        assert len(writer.stdout.read()) == _NUM_BYTES
    assert writer.returncode == 0


def test_a_line_is_one_write_and_comes_at_once():
    """The writer waits to be told before it goes on: what it has not written by then never comes."""
    code = "from pipeline.log import write_whole; write_whole(); print('a', 1, 'b'); input(); print('c', end='')"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as writer:
        assert writer.stdin and writer.stdout
        assert writer.stdout.read(100) == b"a 1 b\n"
        writer.stdin.write(b"\n")
        assert writer.stdout.read(100) == b"c"
