"""Fetches what a task's files lack from the Hugging Face hub into ``evaluate.data_dir``."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_shards.temporaries import publish, remove_abandoned, temporary_path
from pipeline.errors import ConfigError
from pipeline.evaluation.locate import find_split, hub_folder, hub_split
from pipeline.evaluation.task_file import HubSource, TaskConfig
from pipeline.log import logger

# What a library reads when it is first imported: a hub that does not answer is known within seconds.
_PATIENCE = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "20"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def prefetch(tasks: Sequence[TaskConfig], data_dir: Path | None) -> list[Path]:
    """Writes what is missing and the hub has, as ``<data_dir>/<dataset>/<configuration>/<split>.parquet``.

    A split that is there is not fetched again, and a file is whole or absent. The
    hub library keeps its own copy in ``HF_HOME``.

    Returns:
        The files that were written.

    Raises:
        ConfigError: No ``data_dir``, or none that can be written to; the hub cannot be reached, or does not have
            the dataset, its configuration, revision or split.
    """
    if data_dir is None:
        raise ConfigError("--prefetch needs a folder to fill; set evaluate.data_dir")
    written = []
    for task in tasks:
        loaded: dict[str | None, Any] = {}  # configuration to its splits
        for split, wanted in task.hub.splits.items() if task.hub else ():
            if task.hub and find_split(task, split, data_dir) is None:
                written.append(_fetch(task.hub, wanted, data_dir, loaded))
    return written


def _fetch(hub: HubSource, wanted: str, data_dir: Path, loaded: dict[str | None, Any]) -> Path:
    config, split = hub_split(hub, wanted)
    target = hub_folder(hub, config, data_dir) / f"{split}.parquet"
    _refuse_closed(target.parent)
    logger.info(f"evaluate: fetching {_title(hub, config)}, {split}")
    if config not in loaded:
        loaded[config] = _load(hub, config)
    if split not in loaded[config]:
        known = ", ".join(map(str, loaded[config]))
        raise ConfigError(
            f"hub dataset {_title(hub, config)}: no split {split!r}; it has {known}; correct the task file's hub.splits"
        )
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, below=False)
        loaded[config][split].to_parquet(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        publish(temporary, target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error}); check permissions and free space") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _refuse_closed(folder: Path) -> None:
    """Before anything is downloaded."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "no permission to write" if there.is_dir() else "a file, not a folder"
        raise ConfigError(f"{there}: {problem}; set evaluate.data_dir to a folder of yours")


def _load(hub: HubSource, config: str | None) -> Any:
    """All splits of a configuration."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from datasets import DownloadConfig, load_dataset

    with _as_setting(_title(hub, config)):
        if not os.path.isdir(hub.path):
            _ask_hub(hub)
        settings = DownloadConfig(max_retries=1)
        return load_dataset(hub.path, config, revision=hub.revision, download_config=settings)


def _ask_hub(hub: HubSource) -> None:
    """Fails at once where ``datasets`` would try for half a minute to reach a hub that is not there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    with suppress(HfHubHTTPError, OfflineModeIsEnabled):  # an answer, which `datasets` puts into better words
        HfApi().dataset_info(hub.path, revision=hub.revision, timeout=10)


def _title(hub: HubSource, config: str | None) -> str:
    return hub.path + (f"/{config}" if config else "") + (f"@{hub.revision}" if hub.revision else "")


@contextmanager
def _as_setting(title: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of an HTTP library, the hub's or datasets, by release; none of them is our fault
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"hub dataset {title}: {_remedy(error, problem)}") from error


def _remedy(error: Exception, problem: str) -> str:
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"no place for the download ({problem}); set HF_HOME to a folder of yours with enough space"
    answered = isinstance(error, FileNotFoundError | ValueError | RuntimeError)  # no such name; script; configuration
    if answered and not isinstance(error, ConnectionError) and not isinstance(error.__cause__, ConnectionError):
        return f"cannot be read from there ({problem}); correct path, config or revision in the task file's hub"
    return (
        f"cannot be fetched ({problem}); run --prefetch on a machine with internet and copy evaluate.data_dir from "
        "there, or set HF_ENDPOINT or HTTPS_PROXY"
    )
