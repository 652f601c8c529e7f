"""MLflow beside a run: where it is, and the process that ships to it.

Training writes stage.json and the journal and never waits for MLflow; a process
of its own mirrors the folder (``pipeline.tracking_mirror``) while the run goes.
"""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import ConfigError, ElectraError, PeerLostError, StartAgainError, StoppedEarly
from pipeline.journal import read_entries
from pipeline.log import logger
from pipeline.redaction import redact, user_info, without_secrets, without_user_info
from pipeline.stages import STAGES, StageRecord, is_running, read_record_file, run_identity

_NETWORK_FILE_SYSTEMS = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "panfs", "cifs", "smb", "fuse.", "afs", "wekafs", "dvs", "pvfs2",
    "orangefs", "ocfs2", "gfs2", "9p", "virtiofs", "autofs",
)  # fmt: skip
_LOCK_PATIENCE_S = 60.0
_FINAL_PASS_S, _FINAL_PASS_WHEN_STOPPED_S, _FINAL_PASS_WHEN_LOST_S = 120.0, 15.0, 2.0


def resolve_uri(config: Config) -> str | None:
    """Where runs are tracked; None when there is no tracking, or the journal has to do for now."""
    uri = config.tracking.uri
    if uri == "none":
        return None
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        return absolute_uri(uri)
    mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    return None if on_network_file_system(config.run.dir, mounts) else sqlite_uri(config.run.dir)


def absolute_uri(uri: str) -> str:
    """A SQLite URI with its path from the current folder, as MLflow reads it; any other URI as it is.

    The processes that ship work in other folders, and the place of artifacts beside the file has to be a URI.
    """
    scheme, is_file, path = uri.partition(":///")
    return f"{scheme}:///{os.path.abspath(path)}" if is_file and scheme.startswith("sqlite") else uri


def sqlite_uri(folder: Path) -> str:
    """The SQLite file of a run.dir."""
    return f"sqlite:///{folder.resolve()}/mlflow.db"


def on_network_file_system(path: Path, mounts: str) -> bool:
    """By the type of the longest mount point above ``path``; ``mounts`` is the text of /proc/mounts."""
    resolved, best, kind = str(path.resolve()), "", ""
    for line in mounts.splitlines():
        _, mount, file_system, *_ = line.split()
        inside = mount == "/" or resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, file_system
    return kind == "fuse" or kind.startswith(_NETWORK_FILE_SYSTEMS)  # fuseblk is a disk's


def read_tracking(config: Config) -> dict[str, Any]:
    """What the mirror noted: URI, run ids, how far it got."""
    try:
        return dict(json.loads((config.run_folder / "mlflow.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # absent or damaged: the next mirror pass writes it anew
        return {}


def needs_shipping(config: Config) -> bool:
    """Whether MLflow lacks something of this run."""
    uri = resolve_uri(config)
    noted = read_tracking(config)
    return uri is not None and (
        noted.get("uri") != redact(uri) or noted.get("mirrored") != summarize(config.run_folder)
    )


def summarize(run_folder: Path) -> dict[str, Any]:
    """State of the run folder as far as MLflow mirrors it."""
    summary: dict[str, Any] = {}
    for stage in STAGES:
        record = read_record_file(run_folder / stage / "stage.json")
        if record:
            summary[stage] = stage_summary(record)
    entries = read_entries(run_folder / "pretrain" / "journal.jsonl")
    return summary | {"step": entries[-1]["step"] if entries else 0}


def stage_summary(record: StageRecord) -> list[Any]:
    """What tells one state of a stage from another."""
    return [record.state, record.attempts, record.ended_unix_s, record.fingerprint]


@contextmanager
def shipper_lock(run_folder: Path) -> Iterator[None]:
    """One mirror pass at a time for a run.

    Raises:
        ElectraError: Another one goes on for a minute: it ships already.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    with open(run_folder / ".shipper.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ElectraError(f"{run_folder}: another process ships this run to MLflow") from None
                time.sleep(0.2)
            except OSError:
                break  # no locks on this file system
        yield


class Shipper:
    """The shipping process beside a run; a context manager.

    It ends when this process does: at the end of the block after a last pass,
    or when the pipe to it breaks because this process was killed.
    """

    def __init__(self, config: Config):
        self._config = config
        self._uri = resolve_uri(config)

    def __enter__(self) -> "Shipper":
        folder = self._config.run_folder
        run_identity(self._config)
        self._process: subprocess.Popen[bytes] | None = None
        if self._uri is None:
            logger.info("tracking: the journal alone (tracking.uri=%s)", self._config.tracking.uri)
            return self
        logger.info("tracking: %s, experiment %s", redact(self._uri), self._config.tracking.experiment)
        try:
            with open(folder / "tracking.log", "a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline.shipper", str(folder), self._config.tracking.experiment],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self._config.run.dir, start_new_session=True,
                    env=shipper_environment(self._uri),
                )  # fmt: skip
        except OSError as error:  # no memory for a process, no room on the disk
            logger.warning("tracking: nothing is shipped while this goes on (%s); afterwards: %s", error,
                           sync_command(self._config))  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is None:
            return
        patience_s = _FINAL_PASS_S
        if kind is not None and issubclass(kind, StoppedEarly):  # Slurm's patience is short then
            patience_s = _FINAL_PASS_WHEN_STOPPED_S
        goes_on = kind is not None and issubclass(kind, PeerLostError | StartAgainError)
        if goes_on:  # the next attempt, which waits for this one's end, ships the rest
            patience_s = _FINAL_PASS_WHEN_LOST_S
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"end\n")
            self._process.stdin.flush()
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = -1
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if code and not goes_on:
            logger.warning(
                "tracking: MLflow at %s did not take everything: %s (see %s). Nothing of the run itself is missing; "
                "this ships the rest: %s",
                redact(self._uri or ""), "; ".join(describe_missing(self._config)) or "files of the last stage",
                self._config.run_folder / "tracking.log", sync_command(self._config),
            )  # fmt: skip


def describe_missing(config: Config) -> list[str]:
    """What of a run MLflow lacks, by what the mirror noted last; empty when it lacks nothing that was noted."""
    noted, uri = read_tracking(config), resolve_uri(config)
    mirrored = noted.get("mirrored", {}) if uri and noted.get("uri") == redact(uri) else {}
    entries = read_entries(config.run_folder / "pretrain" / "journal.jsonl")
    rest = [entry["step"] for entry in entries if entry["step"] > mirrored.get("step", 0)]
    missing = [f"{len(rest)} lines of the journal (steps {rest[0]:,} to {rest[-1]:,})"] if rest else []
    stages = [
        stage for stage, state in summarize(config.run_folder).items()
        if stage in STAGES and mirrored.get(stage) != state
    ]  # fmt: skip
    return missing + ([f"state, results or files of {', '.join(stages)}"] if stages else [])


def sync_command(config: Config) -> str:
    """The command that ships what is missing, from any folder; a password has to be given again."""
    uri = resolve_uri(config) or ""
    command = ["electra", "sync", str(config.run_folder / "config.yaml"), f"tracking.uri={redact(uri)}",
               f"tracking.experiment={config.tracking.experiment}"]  # fmt: skip
    password = " (with user and password in it, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
    return shlex.join(command) + (password if user_info(uri) else "")


def shipper_environment(uri: str) -> dict[str, str]:
    """Short time-outs and no telemetry; the URI travels here because it may hold a password.

    A server's user and password leave the URI, which MLflow repeats in what it prints. Nothing is tried again by
    itself: a call that was lost may have been heard, and another pass looks first.
    """
    package_root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    secrets = {}
    if uri.startswith("http") and (info := user_info(uri)):
        uri = without_user_info(uri)
        secrets = {"MLFLOW_TRACKING_USERNAME": info[0], "MLFLOW_TRACKING_PASSWORD": info[1]}
    return (
        os.environ
        | secrets
        | {
            "ELECTRA_TRACKING_URI": uri,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "PYTHONPATH": path,
            "CUDA_VISIBLE_DEVICES": "",
        }
    )


def sync_now(config: Config) -> str:
    """One mirror pass in this process, for `electra sync`; on network storage it fills the SQLite file.

    Raises:
        ElectraError: MLflow cannot be reached.
    """
    uri = resolve_uri(config) or (sqlite_uri(config.run.dir) if config.tracking.uri == "auto" else None)
    if uri is None:
        raise ConfigError("tracking.uri=none: give the URI to ship to, as tracking.uri=…")
    if not (config.run_folder / "run_id").exists():
        raise ElectraError(f"{config.run_folder}: no such run; check run.dir and run.name")
    os.environ.update(shipper_environment(uri))
    os.chdir(config.run.dir)
    try:
        from pipeline.tracking_mirror import Mirror

        with shipper_lock(config.run_folder):
            uri = os.environ["ELECTRA_TRACKING_URI"]
            mirror = Mirror(config.run_folder, uri, config.tracking.experiment, logger.info)
            shipped = mirror.mirror(owner_alive=is_running(config.run_folder))
    except ElectraError:
        raise
    except Exception as error:
        raise ElectraError(f"MLflow at {redact(uri)} cannot be reached: {first_line(error, uri)}") from error
    return f"{shipped} steps shipped to {redact(uri)}"


def first_line(error: Exception, uri: str) -> str:
    """The first line of an error's text, without the password that MLflow repeats in it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return without_secrets(line, uri)[:300]
