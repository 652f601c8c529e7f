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
from data_shards.temporaries import publish_bytes
from pipeline.config import Config, flatten
from pipeline.config_file import dump_yaml, load_config
from pipeline.errors import ConfigError, DamagedError
from pipeline.goodput import read_attempts
from pipeline.keys import science_of, weights_of_training_text
from pipeline.log import logger
from pipeline.sign_of_life import describe_owner, find_other, is_at_work, sign_of_life

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


def load_run(run_folder: Path) -> Config:
    """The config that a run's folder holds; the folder may have moved since it was written."""
    run_dir = Path(os.path.abspath(run_folder)).parent.parent
    return load_config(run_folder / "config.yaml", (f"run.dir={json.dumps(str(run_dir))}",))


def write_config(config: Config, stage: str) -> None:
    """Publishes a run's config.yaml before one of its stages starts, without contradicting what was trained.

    The later stages refuse other settings than pretrain has recorded; tokenize reads none of them, so a run that has
    been trained keeps its file when shards are made again under others.
    """
    record = read_record(config, "pretrain") if stage == "tokenize" else None
    if record:
        changed = differences({"science": record.inputs["science"]}, {"science": science_of(config, "pretrain")})
        if changed:
            logger.warning("config.yaml stays: pretrain was started with other settings: %s", "; ".join(changed))
            return
    config.run_folder.mkdir(parents=True, exist_ok=True)
    publish_bytes(config.run_folder / "config.yaml", dump_yaml(config).encode())


def read_record(config: Config, stage: str) -> StageRecord | None:
    """The stage's record, None when it was never started; what tokenize made is named where it is now."""
    record = read_record_file(stage_folder(config, stage) / "stage.json")
    if record and stage == "tokenize":
        record.output = locate_tokenized(config, record.output)
        # Records of earlier versions are without weights; pretrain's has them, so a change does not go unseen.
        record.inputs["science"] = weights_of_training_text(config) | record.inputs["science"]
    return record


def locate_tokenized(config: Config, output: dict[str, Any]) -> dict[str, Any]:
    """Output of a tokenize stage with the folders' paths here, if those in it are gone: the run may have moved.

    A folder's name has the key of its content, so one of that name in its place is the same.
    """
    found = dict(output)
    if "tokenizer" in output:
        found["tokenizer"] = _locate(output["tokenizer"], config.run.dir / "tokenizers")
    if "corpora" in output:
        found["corpora"] = [about | {"folder": _locate(about["folder"], config.shards_dir)}
                            for about in output["corpora"]]  # fmt: skip
    return found


def _locate(recorded: str, parent: Path) -> str:
    return recorded if os.path.exists(recorded) else str(parent / Path(recorded).name)


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
    path = stage_folder(config, record.stage) / "stage.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_json(path, asdict(record) | {"fingerprint": record.fingerprint})
    except OSError as error:  # of a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def start_record(
    config: Config, stage: str, inputs: dict[str, Any], environment: dict[str, Any], shared: str = ""
) -> StageRecord:
    """Marks a stage as running; an earlier attempt with the same inputs is continued.

    Args:
        config: The run.
        stage: The stage.
        inputs: Its own.
        environment: This attempt's.
        shared: What elements of an array that may do this at once have in common: their records are to be of one
            lineage. Empty where nobody else starts it.
    """
    record = read_record(config, stage)
    if record is None or record.inputs != inputs:
        before, record = record, StageRecord(stage, "running", inputs, started_unix_s=time.time(), attempts=0)
        if shared:
            origin = [shared, run_identity(config), stage, before.lineage if before else ""]
            record.lineage = content_key({"origin": origin, "inputs": inputs})
    record.state, record.environment, record.ended_unix_s = "running", environment, None
    record.attempts += 1
    write_record(config, record)
    return record


def end_record(config: Config, record: StageRecord, state: State) -> None:
    """Marks a stage as done, stopped or failed.

    Raises:
        OSError: It is done, and that cannot be written. After another end there is one error already, which decides.
    """
    record.state, record.ended_unix_s = state, time.time()
    try:
        write_record(config, record)
    except OSError as error:
        if state == "done":
            raise
        logger.warning("%s; the stage will seem to have been killed", error)


def is_done_by_others(config: Config, record: StageRecord) -> bool:
    """Whether another element of an array has finished the stage that this one has a record of, too."""
    other = read_record(config, record.stage)
    return other is not None and other.state == "done" and other.inputs == record.inputs


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for inputs that differ."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key.removeprefix('science.')}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def changed_since(record: StageRecord, config: Config) -> list[str]:
    """Lines ``key: old -> new`` for the science keys that changed since a stage was run; files are not compared."""
    return differences({"science": record.inputs["science"]}, {"science": science_of(config, record.stage)})


def refuse_changed_science(config: Config, changed: list[str], force_stage: str) -> ConfigError:
    """The error for science keys that changed under a name that already has results, with the ways on."""
    name = config.run.name
    return ConfigError(
        f"run {name!r} already has results, and these keys changed under it:\n  "
        + "\n  ".join(changed)
        + f"\nnothing was touched. Three ways on: run.name=NEW for a new run; run.name=NEW run.fork_from={name}@STEP "
        "for a new run that starts from a checkpoint; "
        f"`electra run … --force {force_stage}` to move the old outputs aside"
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
        identity = uuid.uuid4().hex + "\n"
        temporary.write_text(identity, encoding="utf-8")
        with suppress(FileExistsError):  # another process was first
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # no hard links on this file system
                with open(path, "x", encoding="utf-8") as file:
                    file.write(identity)
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

    By a file lock; where that ends at the node, or does not exist, by a sign of life.

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
        with sign_of_life(config.run_folder, shared):
            if other := find_other(config.run_folder, shared):
                step = max((attempt.step for attempt in read_attempts(stage_folder(config, "pretrain"))), default=0)
                raise ConfigError(
                    f"run {config.run.name!r} is in use by {describe_owner(other)}, which is seen at work, at step "
                    f"{step:,} of pretrain, although no file lock shows it from here ({other}); wait for it or end it, "
                    "or give this run another run.name"
                )
            yield


def _lock(file: TextIO, kind: int) -> None:
    """Tries for a second: `electra status` holds the lock for a moment when it looks whether it is free."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(file, kind | fcntl.LOCK_NB)


def is_running(run_folder: Path) -> bool:
    """Whether a process works in a run's folder, on any node; it may be somebody else's folder.

    Where file locks end at the node or are absent, they decide nothing: then by a sign of life.
    """
    return _is_locked(run_folder / ".lock") or is_at_work(run_folder)


def _is_locked(path: Path) -> bool:
    """Whether a process has the lock, as far as can be told from here."""
    try:
        file = open(path, "r+" if os.access(path, os.W_OK) else "r")
    except OSError:  # never started, or not ours to read
        return False
    with file:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):  # NFS gives only the latter to a file that is open for reading
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                continue
            return False
    return False


def free_bytes(path: Path) -> int:
    """Free space on the file system of ``path`` or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
