"""Fills shard folders: any number of processes on any number of nodes, without locks.

A folder is stored by content: its key hashes all that its bytes depend on, so a
finished one serves any number of runs and is never written again. Its tasks are
dealt out by arithmetic. A task writes its shards, then its completion record; a
killed process loses the tasks that it had in hand and nothing else. Whoever has
done its share goes on with what is still missing, and whoever finds all records
there writes the manifest. When two processes do the same task or the same
manifest, they write the same bytes, each by rename.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

from data_shards.corpus import Task, plan_tasks
from data_shards.documents import Counts, damage_so_far, refuse_other_encoding
from data_shards.errors import DamagedDataError
from data_shards.store import Manifest, write_manifest
from data_shards.tasks import SHARD_NAMES, FolderJob, TaskResult, finished, loaded, record_path, run_task
from data_shards.temporaries import Watch, remove_abandoned
from data_shards.workers import WorkerPool

_POLL_S = 2.0


@dataclass(frozen=True)
class Share:
    """Which of the processes that fill a folder together this is: ``part`` of ``num_parts``."""

    part: int = 0
    num_parts: int = 1

    def in_order(self, tasks: list[Task]) -> list[Task]:
        """The tasks of this share, then those of the others, each from its far end."""
        own, *others = (tasks[(self.part + k) % self.num_parts :: self.num_parts] for k in range(self.num_parts))
        return own + [task for share in others for task in reversed(share)]


@dataclass(frozen=True)
class Progress:
    """What all processes together have done on a folder, as its records tell.

    Attributes:
        tasks_done: Tasks with a record, of ``tasks``.
        input_bytes_left: Of the tasks without one, on disk; 0 when unknown.
        text_bytes: UTF-8 of the documents that were read since this process began to look.
        input_bytes: The same, on disk.
        tokens: Tokens written since then.
        elapsed_s: Time since then.
        damage: See ``documents.damage_so_far``.
    """

    tasks_done: int
    tasks: int
    input_bytes_left: int
    text_bytes: int
    input_bytes: int
    tokens: int
    elapsed_s: float
    damage: str = ""


def build_folder(
    job: FolderJob,
    inputs: dict[str, Any],
    task_bytes: int,
    num_workers: int,
    share: Share = Share(),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    interval_s: float = 10.0,
    is_unchanged: Callable[[], bool] = lambda: True,
) -> Manifest:
    """Runs the tasks that are not done, and publishes the folder's manifest.

    Args:
        job: The folder and how to fill it.
        inputs: See ``keys.shard_inputs``; stored in the manifest.
        task_bytes: Size of a task in the input.
        num_workers: Processes of this machine; the bytes do not depend on it.
        share: Which tasks to do first, when other machines fill the folder too.
        on_progress: Called about every ``interval_s`` while tasks run, and at the end.
        interval_s: See ``on_progress``.
        is_unchanged: Whether the text is still what ``inputs`` says; asked before anything is published.

    Raises:
        DamagedDataError: Text that cannot be read, or none at all, or that changed meanwhile.
        DataError: A worker process was killed.
    """
    (job.folder / "tasks").mkdir(parents=True, exist_ok=True)
    tasks = plan_tasks(job.corpus, task_bytes)
    folder = _Folder(job, tasks)
    last_report = time.monotonic()
    try:
        for _ in _fill(folder, job, share.in_order(tasks), num_workers, min(interval_s, _POLL_S)):
            if time.monotonic() - last_report > interval_s or not folder.missing(tasks):
                last_report = time.monotonic()
                on_progress(folder.progress())
    except DamagedDataError:
        if is_unchanged():
            raise
        _refuse_changed_text(job, tasks)
    if not is_unchanged():
        _refuse_changed_text(job, tasks)
    manifest = _manifest_of(job, inputs, [folder.results[task.index] for task in tasks])
    remove_abandoned(job.folder)
    write_manifest(job.folder, manifest)
    return manifest


def _refuse_changed_text(job: FolderJob, tasks: list[Task]) -> NoReturn:
    for task in tasks:  # their shards must not be taken for those of this text
        record_path(job, task).unlink(missing_ok=True)
    raise DamagedDataError(
        f"{job.corpus.path}: the text changed while it was tokenized; nothing was published: run the same command "
        "again when it no longer changes"
    )


def _manifest_of(job: FolderJob, inputs: dict[str, Any], results: list[TaskResult]) -> Manifest:
    tokenizer = loaded(job.tokenizer_folder)
    found = sum((result.counts for result in results), Counts())
    refuse_other_encoding(found)
    counts = found.to_dict()
    del counts["examples"]  # they name paths
    manifest = Manifest(
        corpus=job.corpus.name,
        key=job.key,
        inputs=inputs,
        tokenizer_sha256=tokenizer.digest,
        special=tokenizer.special,
        dtype=str(tokenizer.dtype),
        layout=job.layout,
        counts=counts,
        shards=tuple(shard for result in results for shard in result.shards),
    )
    if manifest.num_documents() == 0:
        raise DamagedDataError(
            f"{job.corpus.path}: corpus {job.corpus.name!r} has no document to train on; "
            "check the path, data.corpora's `documents` and data.held_out_fraction"
        )
    return manifest


class _Folder:
    """A folder being filled, by whomever: what is done, and what others have in hand."""

    def __init__(self, job: FolderJob, tasks: list[Task]):
        self._job, self._tasks, self._watch = job, tasks, Watch()
        self.results: dict[int, TaskResult] = {}
        self.look()
        self._first_seen = set(self.results)
        self._begin = time.monotonic()

    def look(self) -> None:
        """Reads the records that are new."""
        there = {path.name for path in (self._job.folder / "tasks").iterdir()}
        for task in self._tasks:
            if task.index not in self.results and record_path(self._job, task).name in there:
                result = finished(self._job, task)
                if result:
                    self.results[task.index] = result

    def missing(self, tasks: list[Task]) -> list[Task]:
        """Those of ``tasks`` without a record."""
        return [task for task in tasks if task.index not in self.results]

    def in_hand(self) -> set[int]:
        """Numbers of the tasks that some living process writes."""
        name, found = SHARD_NAMES["train"], set()
        for path in self._job.folder.glob(f".{name}_*.bin.*.tmp"):
            if self._watch.is_alive(path):
                found.add(int(path.name.removeprefix(f".{name}_").partition(".")[0]))
        return found

    def progress(self) -> Progress:
        """Where the folder stands."""
        new = [result for index, result in self.results.items() if index not in self._first_seen]
        return Progress(
            tasks_done=len(self.results),
            tasks=len(self._tasks),
            input_bytes_left=sum(task.input_bytes for task in self.missing(self._tasks)),
            text_bytes=sum(result.counts.text_bytes for result in new),
            input_bytes=sum(result.task.input_bytes for result in new),
            tokens=sum(result.num_tokens for result in new),
            elapsed_s=time.monotonic() - self._begin,
            damage=damage_so_far(sum((result.counts for result in self.results.values()), Counts())),
        )


def _fill(folder: _Folder, job: FolderJob, tasks: list[Task], num_workers: int, poll_s: float) -> Iterator[None]:
    """Runs tasks in order until all have a record; yields every ``poll_s`` or more often.

    What another process has in hand is left to it, as long as it is alive.
    """
    with _Workers(num_workers, job) as workers:
        while missing := folder.missing(tasks):
            busy = folder.in_hand()
            for task in missing:
                if workers.free and task.index not in busy:
                    workers.start(task)
            workers.wait(poll_s)
            folder.look()
            yield


class _Workers:
    """Runs tasks in worker processes; for one worker, in this process."""

    def __init__(self, number: int, job: FolderJob):
        self._number, self._job = number, job
        self._pool = WorkerPool(number) if number > 1 else None
        self._running: dict[int, Future[TaskResult]] = {}
        self._ran_here = False

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool:
            self._pool.__exit__(*error)

    @property
    def free(self) -> bool:
        """Whether a task can be started."""
        return not self._ran_here and len(self._running) < self._number

    def start(self, task: Task) -> None:
        """Starts a task, unless it runs already."""
        if not self._pool:
            run_task(self._job, task)
            self._ran_here = True
        elif task.index not in self._running:
            self._running[task.index] = self._pool.submit(run_task, self._job, task)

    def wait(self, most_s: float) -> None:
        """Waits until a task ends, or ``most_s``."""
        if not self._running and not self._ran_here:
            time.sleep(most_s)  # what is left is in other hands
        self._ran_here = False
        done = WorkerPool.wait(list(self._running.values()), most_s)
        self._running = {index: future for index, future in self._running.items() if future not in done}
