"""Which files hold which split of a task.

In this order: the file that the task names; one of that name with another
ending; the dataset in the hub's own layout, as ``hub.prefetch`` and a download
by hand leave it. All of it is looked for in ``evaluate.data_dir``, the first two
in the task file's folder as well.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import DamagedError
from pipeline.evaluation.task_file import HubSource, TaskConfig

_TABLES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_ENDINGS = {
    "tagging": (".txt", ".conll", ".conllu", ".jsonl", ".json", ".parquet"),
    "question_answering": (".json", ".jsonl", ".parquet"),
}
_SHARD = re.compile(r"-of-(\d+)\.parquet$")


def find_split(
    config: TaskConfig, split: str, data_dir: Path | None, folders: Sequence[Path] = ()
) -> tuple[Path, ...] | None:
    """Files of a split in their order, or None if there are none.

    Args:
        config: The task.
        split: Name of the split: train, dev, or one of ``also`` and ``test``.
        data_dir: ``evaluate.data_dir``.
        folders: Where else relative file names may start.

    Raises:
        DamagedError: Some shards of a split are not there.
    """
    name = config.file_names()[split]
    named = [base / name for base in (*([data_dir] if data_dir else []), *folders)]
    for path in named:
        if path.is_file():
            return (path,)
    for path in named:
        for ending in _ENDINGS.get(config.kind, _TABLES):
            if path.suffix != ending and path.with_suffix(ending).is_file():
                return (path.with_suffix(ending),)
        if shards := _shards(path.parent, f"{glob.escape(path.stem)}-*-of-*.parquet"):
            return shards
    if config.hub and data_dir and split in config.hub.splits:
        return _find_in_hub_layout(config.hub, config.hub.splits[split], data_dir)
    return None


def hub_split(hub: HubSource, split: str) -> tuple[str | None, str]:
    """Configuration and split of what ``hub.splits`` names."""
    config, slash, name = split.rpartition("/")
    return (config, name) if slash else (hub.config, name)


def hub_folder(hub: HubSource, config: str | None, data_dir: Path) -> Path:
    """Where a configuration's files are put; a dataset that is a folder goes by its name."""
    path = Path(hub.path)
    name = path.name if path.is_absolute() or path.is_dir() else hub.path
    return data_dir / name / (config or "")


def _find_in_hub_layout(hub: HubSource, split: str, data_dir: Path) -> tuple[Path, ...] | None:
    config, name = hub_split(hub, split)
    for folder in _hub_folders(hub, config, data_dir):
        for file in (f"{name}.parquet", f"{name}.jsonl"):
            if (folder / file).is_file():
                return (folder / file,)
        for pattern in (f"{glob.escape(name)}-*.parquet", f"{glob.escape(name)}/*.parquet"):
            if shards := _shards(folder, pattern):
                return shards
    return None


def _hub_folders(hub: HubSource, config: str | None, data_dir: Path) -> Iterator[Path]:
    """Without the configuration's folder only where there is none: splits of several are called alike."""
    whole = hub_folder(hub, None, data_dir)
    for root in dict.fromkeys((whole, data_dir / whole.name, data_dir)):
        yield root / (config or "")
        yield root / (config or "") / "data"
        if config:
            yield root / "data" / config


def _shards(folder: Path, pattern: str) -> tuple[Path, ...]:
    files = sorted(folder.glob(pattern))
    total = _SHARD.search(files[0].name) if files else None
    if total and len(files) != int(total[1]):
        raise DamagedError(
            f"{files[0]}: {len(files)} of {int(total[1])} shards are in {folder}; put all of one download there"
        )
    return tuple(files)
