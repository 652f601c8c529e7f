"""A training's state on the host, as the bytes of a checkpoint's files, and their writing while training goes on.

    weights, moments ──gather──▶ thread: copy ──▶ Snapshot, memory used again ──thread: write, hash, fsync──▶ files

On a CPU training stands still for the gathering alone: the next step's forward and backward pass run beside the copy,
its update waits for it. From a GPU the copy is fast and is waited for. The next snapshot waits until the last one is
written.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK_BYTES = 16 << 20
_BATCH_BYTES = 4 << 20  # are handed over at once: many small tensors, so that their number costs no time
_FP32_BYTES = 4


class TensorFile:
    """A safetensors file of fp32 tensors in memory: its header, and room for them one behind the other."""

    def __init__(self, shapes: dict[str, list[int]], pinned: bool = False):
        """Names and shapes; ``pinned`` memory takes copies from a GPU twice as fast."""
        header: dict[str, Any] = {}
        begin = 0
        for name, shape in shapes.items():
            end = begin + _FP32_BYTES * torch.Size(shape).numel()
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors
        self._head = len(text).to_bytes(8, "little") + text
        self._data = torch.empty(begin // _FP32_BYTES, pin_memory=pinned)
        self._views = {
            name: self._data[about["data_offsets"][0] // _FP32_BYTES :][: torch.Size(about["shape"]).numel()]
            for name, about in header.items()
        }

    def set(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor in; from a GPU without waiting for it."""
        if tensor.device.type == "cpu":
            np.copyto(self._views[name].numpy(), tensor.reshape(-1).numpy())  # torch's would take the step's threads
        else:
            self._views[name].copy_(tensor.reshape(-1), non_blocking=True)

    def write(self, path: Path, half_way: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Writes the file to disk.

        Args:
            path: Where.
            half_way: Is called when half of the chunks are written.

        Returns:
            Its size in bytes and the SHA-256 of what was meant to be written.
        """
        digest, data = hashlib.sha256(), memoryview(self._data.numpy()).cast("B")  # type: ignore[arg-type]
        chunks = [data[begin : begin + _CHUNK_BYTES] for begin in range(0, len(data), _CHUNK_BYTES)]
        with open(path, "wb") as file:
            for number, chunk in enumerate([memoryview(self._head), *chunks]):
                if number == (len(chunks) + 1) // 2:
                    half_way()
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        return {"size": len(self._head) + len(data), "sha256": digest.hexdigest()}


class Snapshot:
    """Weights and both moments of a training at one step."""

    def __init__(self, shapes: dict[str, list[int]], moments: tuple[str, ...], device: str = "cpu"):
        """Shape of each parameter by name; the names of the moments."""
        pinned = device == "cuda"
        self.weights = TensorFile(shapes, pinned)
        self.optimizer = TensorFile({f"{m}/{name}": shape for name, shape in shapes.items() for m in moments}, pinned)
        self._device = device
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._copies: list[Future[None]] = []

    def take(self, tensors: Iterable[tuple[str, str, Tensor]]) -> None:
        """Begins to copy (kind, name, tensor), see ``Engine.full_state``; none may change before ``wait`` returns."""
        if self._device == "cuda":
            self._copy(tensors)
            torch.cuda.synchronize()
        else:
            self._copies = [self._thread.submit(self._copy, batch) for batch in _batches(tensors)]

    @property
    def is_copied(self) -> bool:
        """Whether ``wait`` would return at once."""
        return all(copy.done() for copy in self._copies)

    def wait(self) -> None:
        """Returns when what was taken last is copied; any thread may call it."""
        for copy in self._copies:
            copy.result()

    def _copy(self, tensors: Iterable[tuple[str, str, Tensor]]) -> None:
        for kind, name, tensor in tensors:
            if kind == "weight":
                self.weights.set(name, tensor)
            else:
                self.optimizer.set(f"{kind}/{name}", tensor)


def _batches(tensors: Iterable[tuple[str, str, Tensor]]) -> Iterator[list[tuple[str, str, Tensor]]]:
    batch, size = [], 0
    for kind, name, tensor in tensors:
        batch.append((kind, name, tensor))
        size += tensor.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class BackgroundWriter:
    """One write at a time, in a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Any] | None = None

    def begin(self, write: Callable[[], Any]) -> None:
        """Starts a write; the one before has ended."""
        assert self._writing is None, "wait() comes first"
        self._writing = self._thread.submit(write)

    @property
    def is_busy(self) -> bool:
        """Whether the write that was begun last goes on."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> OSError | None:
        """Waits for the write that was begun last, and returns what went wrong."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        try:
            writing.result()
        except OSError as error:
            return error
        return None
