"""The program, forked from a process that has imported all it imports: a start takes tenths of a second, not six.

    python -m tests.forking               starts as lines of JSON on stdin, their exit codes on stdout
    python -m tests.forking ARGUMENTS     the program itself; only its ranks are forked, from this very process

From the fork on it is the program as always, with its own process, environment and files; the processes that it starts
for its ranks are forked as well. What depends on the imports themselves (a backend chosen by the environment, say) is
for a start anew.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

IMPORTED = (
    "pipeline.cli", "pipeline.pretrain", "pipeline.evaluate", "pipeline.tokenize", "pipeline.tracking",
    "pipeline.config_file", "deepspeed.runtime.engine", "safetensors.torch", "sentencepiece", "tokenizers",
    "torch._dynamo", "torch.distributed.fsdp",
)  # fmt: skip
"""What the program imports sooner or later, seconds in all."""

_POLL_S = 0.01


def import_all() -> None:
    """Imports it, and has no collection of garbage copy it in each fork."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


class ForkedProgram:
    """The process that forks, seen from a test; started at the first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, arguments: list[str], environment: dict[str, str], folder: Path, timeout_s: float, first: str = ""
    ) -> tuple[int, str, str]:
        """One start of ``electra``.

        Args:
            arguments: After its name.
            environment: All of it. What a library reads when it is imported was read before.
            folder: For what it says; made.
            timeout_s: After which it is killed.
            first: Lines of Python that it executes before anything else.

        Returns:
            Its exit code as subprocess says it, what it wrote to stdout, and to stderr.
        """
        code = self._begin(arguments, environment, folder, timeout_s, first)
        return code, (folder / "out").read_text(), (folder / "err").read_text()

    def start(self, arguments: list[str], environment: dict[str, str], folder: Path) -> "Forked":
        """One that goes on beside the test, in a session of its own; arguments as of ``run``."""
        return Forked(self._begin(arguments, environment, folder, None, ""), folder, self._ask)

    def _begin(
        self, arguments: list[str], environment: dict[str, str], folder: Path, timeout_s: float | None, first: str
    ) -> Any:
        folder.mkdir(parents=True)
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking"], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return self._ask({
            "arguments": arguments, "environment": environment, "cwd": os.getcwd(), "out": str(folder / "out"),
            "err": str(folder / "err"), "timeout_s": timeout_s, "first": first,
        })  # fmt: skip

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


class Forked:
    """A start that goes on beside the test.

    Attributes:
        pid: Its process, which leads a session.
        folder: Where ``out`` and ``err`` hold what it has said so far.
    """

    def __init__(self, pid: int, folder: Path, ask: Callable[[dict[str, Any]], Any]) -> None:
        self.pid, self.folder = pid, folder
        self._ask = ask
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self._code is None:
            self._code = self._ask({"pid": self.pid})
        return self._code

    def wait(self, timeout_s: float = 600) -> int:
        """Waits for its end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, (self.folder / "err").read_text()
            time.sleep(_POLL_S)
        return code

    def kill(self) -> None:
        """Ends it, if it runs, as kill -9 does."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import_all()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(question: dict[str, Any]) -> int | None:
    """The exit code of a process; of a new one when it has ended, or its id where nobody waits for that."""
    if "pid" in question:
        ended = os.waitpid(question["pid"], os.WNOHANG)
        return os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
    pid = os.fork()
    if pid == 0:
        _become(question)
        os._exit(run_program(question["arguments"], question["environment"], question["first"]))
    return pid if question["timeout_s"] is None else _wait(pid, question["timeout_s"])


def _wait(pid: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return os.waitstatus_to_exitcode(ended[1])


def _become(job: dict) -> None:
    """What a new process would have from its parent."""
    for stream, (path, flags) in enumerate([
        (os.devnull, os.O_RDONLY), (job["out"], os.O_WRONLY | os.O_CREAT), (job["err"], os.O_WRONLY | os.O_CREAT),
    ]):  # fmt: skip
        opened = os.open(path, flags)
        os.dup2(opened, stream)
        os.close(opened)
    if job["timeout_s"] is None:
        os.setsid()
        _close_all_but(())  # the pipe for answers, which would not end while it runs
    os.chdir(job["cwd"])
    _fork_ranks()


def _fork_ranks() -> None:
    """From here on the program in this process forks its ranks instead of starting them."""
    sys.modules["pipeline.launch"].subprocess = SimpleNamespace(Popen=ForkedRank)  # pyright: ignore


class ForkedRank:
    """A process of the program that the program starts: forked too, in place of ``subprocess.Popen``."""

    def __init__(
        self, command: list[str], env: dict[str, str], preexec_fn: Callable[[], None], pass_fds: Sequence[int]
    ):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            preexec_fn()
            # From outside, its environment in /proc is that of the process that it was forked from.
            Path("/proc/self/comm").write_text(f"rank {env.get('RANK', '')}")
            _close_all_but(pass_fds)
            os._exit(run_program(command[3:], env))

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _close_all_but(inherited: Sequence[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in inherited:
            with suppress(OSError):  # the listing's own
                os.close(int(name))


def run_program(arguments: list[str], environment: dict[str, str], first: str = "") -> int:
    """``electra`` with these arguments and nothing else in its environment, in this process; returns its exit code.

    The lines ``first`` are executed before it.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["electra", *arguments]
    logging.getLogger().handlers.clear()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code = 1
    try:
        exec(first, {"__name__": "first"})
        sys.modules["pipeline.cli"].main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # pyright: ignore  # as the interpreter's end would; the rest of it takes a second
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1:]:
        import_all()
        _fork_ranks()
        os._exit(run_program(sys.argv[1:], dict(os.environ)))
    _serve()
