"""Worker processes that end with the program, however it ends, and at once when it stops.

A task that is cut off costs nothing but its time: what it writes is whole or absent.
"""

import os
import signal
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from data_shards.errors import DataError

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class WorkerPool:
    """Some worker processes. Leaving the context by an exception, such as a stop, kills them."""

    def __init__(self, number: int):
        """Starts a fork server, and Python's tracker of semaphores, with stop signals blocked, which children inherit.

        Slurm and terminals signal every process of a job; here this process alone decides what follows.
        """
        context = get_context("forkserver")
        context.set_forkserver_preload(["data_shards.tasks"])  # imported once for all workers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        self._pool = ProcessPoolExecutor(number, context, initializer=_end_with_parent)
        try:
            self._pool.submit(int).result()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # one that came meanwhile is handled here
        except BaseException as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.__exit__(type(error))
            raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, error_type: type | None, *error: object) -> None:
        if error_type:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        # Waited for in any case: a pool still closing when the interpreter ends is woken through a closed pipe there.
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Has a worker call a function of a module."""
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:
            raise _worker_lost() from error

    @staticmethod
    def wait(futures: Collection[Future[Any]], most_s: float | None = None) -> set[Future[Any]]:
        """Those that have ended, once one has or after ``most_s``.

        Raises:
            DataError: A worker process was killed; or whatever one of the functions raised.
        """
        done, _ = wait(futures, most_s, FIRST_COMPLETED)
        try:
            for future in done:
                future.result()
        except BrokenProcessPool as error:
            raise _worker_lost() from error
        return done


def _worker_lost() -> DataError:
    return DataError(
        "a worker process was killed, perhaps for want of memory; finished tasks are kept: give the job more memory "
        "or lower data.num_workers, and run the same command again"
    )


def _end_with_parent() -> None:
    """A worker ends with the program: the fork server would keep it."""

    def watch() -> None:
        parent = parent_process()
        assert parent
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=watch, daemon=True).start()
