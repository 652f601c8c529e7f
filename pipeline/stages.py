"""What is known of each stage of a run; ``pipeline.chain`` decides what follows from it.

    <run.dir>/runs/<run.name>/<stage>/stage.json

A stage's fingerprint hashes its inputs: its science keys and the digests of
what the stage before made. Equal inputs and state ``done`` mean: nothing to do.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from data_shards.checks import check_key, check_same_tokenizer, check_sizes
from data_shards.keys import content_key
from data_shards.staging import why_not_staged
from data_shards.store import read_manifest, write_json
from pipeline.config import Config, flatten
from pipeline.errors import ConfigError, DamagedError
from pipeline.log import logger

STAGES = ("tokenize", "pretrain", "evaluate")
State = Literal["running", "done", "stopped", "failed"]


@dataclass
class StageRecord:
    """Content of stage.json.

    Attributes:
        inputs: What the fingerprint hashes, in full, so that a difference can be named.
        output: What the next stage needs, with digests.
        numerics: Resolved numerics keys; an automatic choice is kept when the stage resumes.
        metrics: Results to be shown, by metric name, with the step they belong to.
        attempts: How often it was started.
        lineage: Id of this series of attempts; a new one begins when inputs change or outputs are moved aside.
    """

    stage: str
    state: State
    inputs: dict[str, Any]
    output: dict[str, Any] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_step: int = 0
    attempts: int = 1
    lineage: str = field(default_factory=lambda: uuid.uuid4().hex)
    environment: dict[str, Any] = field(default_factory=dict)
    started_unix_s: float = 0.0
    ended_unix_s: float | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the inputs."""
        return content_key(self.inputs)


def stage_folder(config: Config, stage: str) -> Path:
    """Folder of a stage's record and outputs."""
    return config.run_folder / stage


def read_record(config: Config, stage: str) -> StageRecord | None:
    """The stage's record, None when it was never started."""
    return read_record_file(stage_folder(config, stage) / "stage.json")


def read_record_file(path: Path) -> StageRecord | None:
    """A stage.json.

    Raises:
        DamagedError: It cannot be read.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("fingerprint")
        return StageRecord(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path}: unreadable ({error}); restore it from a copy, or move the stage aside "
                           "with --force") from error  # fmt: skip


def write_record(config: Config, record: StageRecord) -> None:
    """Publishes a stage's record."""
    folder = stage_folder(config, record.stage)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stage.json", asdict(record) | {"fingerprint": record.fingerprint})


def start_record(config: Config, stage: str, inputs: dict[str, Any], environment: dict[str, Any]) -> StageRecord:
    """Marks a stage as running; an earlier attempt with the same inputs is continued."""
    record = read_record(config, stage)
    if record is None or record.inputs != inputs:
        record = StageRecord(stage, "running", inputs, started_unix_s=time.time(), attempts=0)
    record.state, record.environment, record.ended_unix_s = "running", environment, None
    record.attempts += 1
    write_record(config, record)
    return record


def end_record(config: Config, record: StageRecord, state: State) -> None:
    """Marks a stage as done, stopped or failed."""
    record.state, record.ended_unix_s = state, time.time()
    write_record(config, record)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for inputs that differ."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key.removeprefix('science.')}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def refuse_changed_science(config: Config, changed: list[str], force_stage: str) -> ConfigError:
    """The error for science keys that changed under a name that already has results, with the ways on."""
    name = config.run.name
    return ConfigError(
        f"run {name!r} already has results, and these keys changed under it:\n  "
        + "\n  ".join(changed)
        + f"\nnothing was touched. Three ways on: run.name=NEW for a new run; run.name=NEW run.fork_from={name}@STEP "
        f"for a new run that starts from a checkpoint; --force {force_stage} to move the old outputs aside"
    )


def refuse_changed_recipe(config: Config, changed: list[str]) -> ConfigError:
    """The error for another way of fine-tuning under a name that has results of one already."""
    return ConfigError(
        f"run {config.run.name!r} already has results, and these keys changed under it:\n  "
        + "\n  ".join(changed)
        + "\nnothing was touched. Two ways on: `electra evaluate … --force` to move the old results aside; another "
        "run.name, for which evaluate.checkpoint=FOLDER is all that has to be there (`electra export` makes one)"
    )


def move_aside(config: Config, stage: str) -> None:
    """Moves a stage's outputs, and those of the stages after it, aside; deletes nothing."""
    for name in STAGES[STAGES.index(stage) :]:
        folder = stage_folder(config, name)
        if not folder.exists():
            continue
        number = 1
        while (aside := folder.with_name(f"{name}.aside-{number}")).exists():
            number += 1
        os.replace(folder, aside)
        logger.info("%s: old outputs moved to %s", name, aside)


def run_identity(config: Config) -> str:
    """An id of the run that never changes: MLflow's runs are found by it."""
    path = config.run_folder / "run_id"
    if not path.exists():
        config.run_folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".run_id.{os.getpid()}.tmp")
        temporary.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)  # fails if another process was first
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_text(encoding="utf-8").strip()


def shard_folders(
    config: Config, tokenized: dict[str, Any], local: bool = True, warns: bool = True
) -> tuple[list[Path], list[float]]:
    """The folders that rows are read from, and the weight of each.

    A copy in ``data.local_dir`` takes the place of a folder if it is whole.

    Args:
        config: The run.
        tokenized: Output of its tokenize stage.
        local: Whether to look for copies.
        warns: Whether to say which copies are missing.

    Raises:
        DamagedDataError: A shard of either split is not as long as it should be; a folder holds another's manifest.
        DataSettingError: A folder is absent, or was written with another tokenizer than the others.
    """
    weights = {corpus.name: corpus.weight for corpus in config.data.corpora}
    # By name: rows are keyed by a corpus's place, which must not depend on the order in the file.
    corpora = sorted(tokenized["corpora"], key=lambda corpus: corpus["name"])
    local_dir = config.data.local_dir if local else None
    manifests = {Path(corpus["folder"]): read_manifest(Path(corpus["folder"])) for corpus in corpora}
    check_same_tokenizer(manifests)
    folders = []
    for corpus, (folder, manifest) in zip(corpora, manifests.items(), strict=True):
        check_key(folder, manifest, corpus["key"])
        problem = why_not_staged(folder, local_dir) if local_dir else ""
        if local_dir and problem is None:
            folders.append(local_dir / folder.name)
            continue
        if problem and warns:
            logger.warning("data.local_dir: %s; %s is read in its place", problem, folder)
        check_sizes(folder, manifest)
        folders.append(folder)
    if local:
        logger.info("rows are read from %s", ", ".join(map(str, folders)))
    return folders, [weights[corpus["name"]] for corpus in corpora]


@contextmanager
def run_lock(config: Config, shared: bool = False) -> Iterator[None]:
    """Keeps other processes out of a run's folder; released however this process ends.

    Args:
        config: The run.
        shared: Whether others that share it may come in, as the elements of an array that tokenizes do.

    Raises:
        ConfigError: Another process has it.
    """
    config.run_folder.mkdir(parents=True, exist_ok=True)
    with open(config.run_folder / ".lock", "w") as file:
        try:
            _lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BlockingIOError:
            raise ConfigError(
                f"run {config.run.name!r} is in use by another process ({config.run_folder}); wait for it, or give "
                "this run another run.name"
            ) from None
        except OSError as error:
            logger.warning("%s: no file locks on this file system (%s); start a run only once", file.name, error)
        yield


def _lock(file: TextIO, kind: int) -> None:
    """Tries for a second: `electra status` holds the lock for a moment when it looks whether it is free."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(file, kind | fcntl.LOCK_NB)


def is_running(config: Config) -> bool:
    """Whether a process has the run's lock."""
    path = config.run_folder / ".lock"
    if not path.exists():
        return False
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def free_bytes(path: Path) -> int:
    """Free space on the file system of ``path`` or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
