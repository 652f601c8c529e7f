"""What a run reads and writes: whether this node sees it, and its file system does what the program relies on."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_shards.corpus import corpus_files
from data_shards.store import read_manifest
from data_shards.streams import is_compressed
from pipeline.checkpoint import list_steps
from pipeline.config import Config
from pipeline.doctor.checks import Check, failure, ok, size, warning
from pipeline.plan import make_plan
from pipeline.stages import free_bytes, read_record, shard_folders, stage_folder
from pipeline.tokenize import corpora_of
from pipeline.tracking import on_network_file_system

VISIBLE_WITHIN_S = 10.0
"""A network file system may show a new file late."""

MOST_SKEW_S = 2.0
_FEW_INODES, _NO_INODES = 10_000, 100
_TEXT_BYTES_PER_TOKEN = 4  # English has some 4.5; fewer bytes make more tokens
_EXPANSION = 3.5  # bytes of text to a byte of gzip, zstd or xz
_OF_PERMISSION = "set run.dir to storage that all nodes mount and this user may write to"


def existing_parent(path: Path) -> tuple[int, Path]:
    """The nearest folder that is there, and by how many levels it lies above ``path``."""
    path = path.absolute()
    places = [path, *path.parents]
    level = next(number for number, place in enumerate(places) if place.is_dir())
    return level, places[level]


def check_run_dir(config: Config) -> Iterator[Check]:
    """The file system of run.dir: its kind, writing, renaming, locks and its clock; nothing is left behind."""
    _, folder = existing_parent(config.run.dir)
    mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    kind = "on the network" if on_network_file_system(folder, mounts) else "local to a node"
    yield ok("run.dir", f"{config.run.dir.absolute()}{'' if config.run.dir.is_dir() else ' (to be made)'}")
    yield ok("file system", f"{file_system(folder, mounts)}, {kind}", difference="warning")
    probe = folder / f".electra-doctor-{uuid.uuid4().hex}"
    try:
        probe.mkdir()
    except OSError as error:
        yield failure("writing", f"{folder}: {error.strerror}", _OF_PERMISSION)
        return
    try:
        yield from _try_file_system(probe)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system that a path lies on; ``mounts`` is the text of /proc/mounts."""
    resolved = path.resolve()
    rows = [line.split()[1:3] for line in mounts.splitlines()]
    above = [(len(mount), number, kind) for number, (mount, kind) in enumerate(rows) if resolved.is_relative_to(mount)]
    return max(above)[2] if above else "unknown"


def _try_file_system(probe: Path) -> Iterator[Check]:
    """What checkpoints, tasks and locks rely on."""
    content, file = os.urandom(1 << 16), probe / "written"
    before_s = time.time()
    try:
        with open(probe / "new", "wb") as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        file.write_bytes(b"old")
        os.replace(probe / "new", file)
        read = file.read_bytes()
    except OSError as error:
        remedy = "make room, have the quota raised, or set run.dir to other storage"
        yield failure("writing", f"{probe.parent}: {error.strerror}", remedy)
        return
    if read != content or (probe / "new").exists():
        yield failure("writing", f"{probe.parent}: another content than was written", "set run.dir to other storage")
        return
    yield ok("writing", "a file is written, synced, renamed over another and read back")
    yield _check_locks(file)
    skew_s = os.stat(file).st_mtime - before_s
    # A file's time has the coarse clock's resolution, some milliseconds; writing takes its time too.
    if not -MOST_SKEW_S < skew_s < MOST_SKEW_S + (time.time() - before_s):
        yield warning("clock", f"{skew_s:+.1f} s between this node and its files", "have the site set its clocks (NTP)")
    else:
        yield ok("clock", "agrees with the file system's")


def _check_locks(path: Path) -> Check:
    """Whole-file locks keep a run from being started twice, record locks are SQLite's."""
    remedy = "have it mounted with locks (Lustre: -o flock), or start each run only once"
    try:
        with open(path, "r+b") as first, open(path, "r+b") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return warning("locks", "two processes can hold one lock", remedy)
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return warning("locks", f"none ({errno.errorcode.get(error.errno or 0, error.strerror)})", remedy)
    return ok("locks", "flock and fcntl work", difference="warning")


def check_space(config: Config) -> Iterator[Check]:
    """Free space and files against what the run will still write."""
    plan = make_plan(config, world_size=1, micro_batch_rows=1)
    there = len(list_steps(stage_folder(config, "pretrain") / "checkpoints"))
    needed = max(plan.disk_bytes - there * plan.checkpoint_bytes, plan.checkpoint_bytes)
    found = f"checkpoints need {size(needed)}"
    record = read_record(config, "tokenize")
    if record is None or record.state != "done":
        shards = shard_bytes(config, plan.token_bytes)
        needed, found = needed + shards, f"{found}, shards some {size(shards)}"
    free = free_bytes(config.run.dir.absolute())
    found = f"{size(free)} free, {found}"
    if free < needed:
        yield failure("space", found, "free space, raise the quota, or lower train.keep_checkpoints")
    else:
        yield ok("space", found)
    _, folder = existing_parent(config.run.dir)
    status = os.statvfs(folder)
    if status.f_files and status.f_favail < _FEW_INODES:
        judge = failure if status.f_favail < _NO_INODES else warning
        yield judge("inodes", f"{status.f_favail:,} files can still be made", "remove files, or have the quota raised")
    else:
        yield ok("inodes", "enough for new files")


def shard_bytes(config: Config, token_bytes: int) -> int:
    """About what the shards of the corpora on disk will take; 0 for what is not seen, or on the hub."""
    total = 0.0
    for corpus in corpora_of(config):
        if corpus.format == "hub":
            continue
        with suppress(Exception):  # check_corpora says what is wrong with it
            for file in corpus_files(corpus):
                total += os.path.getsize(file) * (_EXPANSION if is_compressed(file) else 1)
    return int(total / _TEXT_BYTES_PER_TOKEN * token_bytes)


def check_shards(config: Config) -> Iterator[Check]:
    """The run's shards, if it has been tokenized."""
    record = read_record(config, "tokenize")
    if record is None or record.state != "done":
        yield ok("shards", "not tokenized yet", difference="failure")
        return
    folders, _ = shard_folders(config, record.output, local=False)
    manifests = [read_manifest(folder) for folder in folders]
    tokens = sum(manifest.num_tokens() for manifest in manifests)
    yield ok("shards", f"{sum(len(m.shards) for m in manifests):,} files with {tokens:,} tokens", difference="failure")


def count_shards(config: Config) -> int:
    """Files that a process keeps open; 0 before there are any."""
    record = read_record(config, "tokenize")
    if record is None or record.state != "done":
        return 0
    folders, _ = shard_folders(config, record.output, local=False, warns=False)
    return sum(len(read_manifest(folder).shards) for folder in folders)


def check_corpora(config: Config) -> Iterator[Check]:
    """The text; once it is tokenized nobody needs it."""
    record = read_record(config, "tokenize")
    is_done = record is not None and record.state == "done"
    for corpus in corpora_of(config):
        name = f"corpus {corpus.name}"
        if corpus.format == "hub":
            yield ok(name, f"{corpus.path} of the hub: the nodes that tokenize need internet, or a filled cache")
            continue
        try:
            files = corpus_files(corpus)
            with open(files[0], "rb") as file:
                file.read(1)
        except Exception as error:
            if not is_done:
                raise
            yield ok(name, f"not seen here ({error}), and not needed: its shards are done")
            continue
        yield ok(
            name,
            f"{len(files):,} file{'s' * (len(files) > 1)}, {size(sum(map(os.path.getsize, files)))}",
            difference="warning",
        )


def check_inputs(config: Config) -> Iterator[Check]:
    """Other files and folders that the config names."""
    initial = (config.train.initial_discriminator, config.train.initial_generator)
    checkpoint = config.evaluate.checkpoint if isinstance(config.evaluate.checkpoint, Path) else None
    named = {
        "tokenizer.path": config.tokenizer.path,
        "train.initial_discriminator": initial[0],
        "train.initial_generator": initial[1],
        "evaluate.checkpoint": checkpoint,
    }
    for key, path in named.items():
        if path is not None and not path.exists():
            yield failure(key, f"{path} is not seen from here", "correct it, or put it where all nodes see it")
        elif path is not None:
            yield ok(key, str(path))
    for key, path in (("data.shards_dir", config.data.shards_dir), ("data.local_dir", config.data.local_dir)):
        if path is None:
            continue
        try:
            tempfile.TemporaryFile(dir=existing_parent(path)[1]).close()
        except OSError as error:
            yield failure(key, f"{path}: {error.strerror}", "set it to a folder that this node sees and may write to")
        else:
            yield ok(key, str(path))


def check_tasks(config: Config) -> Iterator[Check]:
    """The data of the tasks to evaluate on."""
    if not config.evaluate.tasks:
        yield ok("tasks' data", "evaluate.tasks is empty")
        return
    from pipeline.evaluation.tasks import load_tasks

    tasks = load_tasks(config)
    for task in tasks:
        for path in (path for paths in task.files.values() for path in paths):
            with open(path, "rb") as file:
                file.read(1)
    yield ok("tasks' data", f"{len(tasks)} tasks: {', '.join(task.name for task in tasks)}", difference="failure")
