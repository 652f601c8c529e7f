"""Shard files: Megatron-core's IndexedDataset format, written and read.

``.bin`` holds nothing but token ids, document after document. ``.idx`` is for
Megatron's tools; our reader maps the ``.bin`` alone, since the position of a
row in it is arithmetic. data_shards/README.md has both formats byte by byte.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_shards.errors import DamagedDataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


class ShardWriter:
    """Writes one shard by temporary file, fsync and rename: it is whole or absent."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        """``prefix`` is the path without ``.bin``; ``dtype`` is uint16 or int32."""
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.num_tokens = 0
        self._lengths: list[int] = []
        self._bin = open(_temporary(prefix, ".bin"), "wb")

    def add(self, document: np.ndarray) -> None:
        """Appends one document's ids, its [SEP] included."""
        assert document.dtype == self.dtype, f"{document.dtype} ids for a shard of {self.dtype}"
        self._bin.write(document.tobytes())
        self._lengths.append(len(document))
        self.num_tokens += len(document)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def close(self) -> None:
        """Publishes ``.idx``, then ``.bin``; a shard without ``.bin`` does not exist."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with open(_temporary(self.prefix, ".idx"), "wb") as file:
            file.write(_index_bytes(np.asarray(self._lengths, np.int32), self.dtype))
            file.flush()
            os.fsync(file.fileno())
        for suffix in (".idx", ".bin"):
            publish(_temporary(self.prefix, suffix), with_suffix(self.prefix, suffix))


def write_shard(prefix: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> tuple[int, int]:
    """Writes documents as a shard; returns the number of documents and tokens."""
    writer = ShardWriter(prefix, dtype)
    for document in documents:
        writer.add(document)
    writer.close()
    return writer.num_documents, writer.num_tokens


def map_tokens(prefix: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    """Maps a shard's tokens, ``(num_tokens,)``, read-only.

    Raises:
        DamagedDataError: The file is absent or its size is not what the manifest says.
    """
    path = with_suffix(prefix, ".bin")
    expected_bytes = num_tokens * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else -1
    if size != expected_bytes:
        found = "it is missing" if size < 0 else f"it has {size} bytes"
        raise DamagedDataError(
            f"{path}: the manifest says {expected_bytes} bytes but {found}; "
            "delete the shard folder and run tokenize again"
        )
    if num_tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def publish(temporary: Path, target: Path) -> None:
    """Renames a file that is on disk to its final name, and makes the name survive a crash too."""
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """``prefix`` plus ``suffix``; unlike ``Path.with_suffix`` it never replaces a part of the name."""
    return prefix.parent / f"{prefix.name}{suffix}"


def _temporary(prefix: Path, suffix: str) -> Path:
    return prefix.parent / f".{prefix.name}{suffix}.{os.getpid()}.tmp"


def _index_bytes(lengths_tokens: np.ndarray, dtype: np.dtype) -> bytes:
    """One sequence per document, as Megatron's preprocess_data writes with append-eod."""
    num = len(lengths_tokens)
    pointers_bytes = np.zeros(num, np.int64)
    np.cumsum(lengths_tokens[:-1].astype(np.int64) * dtype.itemsize, out=pointers_bytes[1:])
    document_ends = np.arange(num + 1, dtype=np.int64)
    header = _MAGIC + struct.pack("<QBQQ", _VERSION, _DTYPE_CODES[dtype], num, num + 1)
    return header + lengths_tokens.tobytes() + pointers_bytes.tobytes() + document_ends.tobytes()
