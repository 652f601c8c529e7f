"""Rows of tables and of hub datasets: all that is read through ``datasets``, streamed."""

import copy
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from data_shards.errors import DamagedDataError, DataSettingError

MODULES = ("parquet", "arrow")
_ROWS_AT_ONCE = 256
_CONTINUES = b"\xff\xff\xff\xff"
"""Before each message of an arrow stream; at its end a length of 0 follows. (Before arrow 0.15 there was none.)"""
_BYTES_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def hub_files(name: str, config: str | None, split: str, revision: str | None) -> list[str]:
    """Data files of a split, pinned to a commit; empty if ``datasets`` does not know them.

    Raises:
        DataSettingError: No such dataset, configuration or split.
    """
    return [path for path, _ in _data_files(name, config, split, revision)]


def hub_origins(name: str, config: str | None, split: str, revision: str | None) -> list[tuple[str, ...]]:
    """What tells one version of a split from another: repository and commit.

    Raises:
        DataSettingError: As ``hub_files``.
    """
    files = _data_files(name, config, split, revision)
    if not files:
        builder = _builder(name, config, revision)
        return [(str(builder.info.version), str(builder.hash), str(builder.info.download_checksums))]
    return sorted({tuple(str(part) for part in origin) for _, origin in files})


def _data_files(name: str, config: str | None, split: str, revision: str | None) -> list[tuple[str, tuple]]:
    """Path and origin of each data file of a split."""
    splits = _builder(name, config, revision).config.data_files
    if not splits:
        return []
    if split not in splits:
        raise DataSettingError(f"hub dataset {name}: no split {split!r}; it has {', '.join(splits)}; set hub_split")
    return list(zip(splits[split], splits[split].origin_metadata, strict=True))


@lru_cache(maxsize=16)
def _builder(name: str, config: str | None, revision: str | None) -> Any:
    """One look at the hub for each process, not one for each task."""
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(name, config, revision=revision)
    except (FileNotFoundError, ValueError) as error:  # no such name or revision; no such configuration
        raise DataSettingError(
            f"hub dataset {name} (hub_config {config!r}, hub_revision {revision!r}): {error}; "
            "give a name, configuration and revision that the hub has"
        ) from error


def read_hub_column(
    name: str, config: str | None, split: str, revision: str | None, path: str, column: str
) -> Iterator[Any]:
    """Values of a column in one data file of a hub dataset, or in all of it if ``path`` is its name.

    The file is read as the dataset's own configuration says, whose other files are left out.

    Raises:
        DamagedDataError: The file cannot be read, or has no such column.
    """
    from datasets import load_dataset
    from datasets.data_files import DataFilesDict, DataFilesList

    with _as_damage(path, "a file of a hub dataset"):
        if path == name:
            rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
        else:
            origin = dict(_data_files(name, config, split, revision)).get(path, ())
            builder = copy.copy(_builder(name, config, revision))
            builder.config, builder.info = copy.copy(builder.config), builder.info.copy()
            builder.config.data_files = DataFilesDict({split: DataFilesList([path], [origin])})
            if getattr(builder.config, "batch_size", 0) is None:  # of parquet; see read_column
                builder.config.batch_size = _ROWS_AT_ONCE
            rows = builder.as_streaming_dataset(split=split)
        yield from _column(rows, path, column)


def read_column(format: str, path: str, column: str) -> Iterator[Any]:  # noqa: A002 - the corpus's own word
    """Values of a column of a parquet or arrow file; text as its bytes, which may not be UTF-8.

    Raises:
        DamagedDataError: The file cannot be read as such, or has no such column.
    """
    from datasets import load_dataset

    with _as_damage(path, format):
        if format == "arrow":
            _refuse_cut_stream(path)
        # `datasets` takes a path for a glob pattern; [ and * in it stand for themselves
        files = glob.escape(os.path.abspath(path))
        # else `datasets` takes the first row group's size, which may be 0 and is then an error to pyarrow
        settings: dict[str, Any] = {"batch_size": _ROWS_AT_ONCE} if format == "parquet" else {}
        rows = load_dataset(format, data_files=files, split="train", streaming=True, **settings)
        yield from _column(rows, path, column)


def _refuse_cut_stream(path: str) -> None:
    """A stream that ends between two batches reads as a shorter one; who writes it to its end leaves a mark there."""
    with open(path, "rb") as file:
        is_stream = file.read(4) == _CONTINUES
        file.seek(-min(8, os.path.getsize(path)), os.SEEK_END)
        if is_stream and file.read() != _CONTINUES + bytes(4):
            raise ValueError("a stream without the mark at its end: cut off, or its writer was not closed")


def _column(rows: Any, path: str, column: str) -> Iterator[Any]:
    for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        if column not in table.column_names:
            raise DamagedDataError(
                f"{path}: no column {column!r}; it has {', '.join(table.column_names)}; set text_column"
            )
        values = table.column(column)
        # as bytes: one value that is not UTF-8 must not take the others with it
        yield from (values.cast("large_binary") if str(values.type) in _BYTES_TYPES else values).to_pylist()


@contextmanager
def _as_damage(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        # a disk's errors have a number and the network's an address; pyarrow's own have neither
        if isinstance(error, OSError) and (error.errno is not None or "://" in path):
            raise
        raise DamagedDataError(f"{path}: cannot be read as {kind} ({error}); fetch the file again") from error
