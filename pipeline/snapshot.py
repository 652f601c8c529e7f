"""A training's state on the host, as the bytes of a checkpoint's files, and their writing while training goes on.

    pieces of the state ──thread: gather, copy──▶ Snapshot, memory used again ──thread: write, hash, fsync──▶ files

On CPUs the next step's forward and backward pass run beside the copy, and its update waits for it; on GPUs, whose
collectives belong to one thread, training stands still for it. The next snapshot waits until the last one is written.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.pieces import Piece

_CHUNK_BYTES = 16 << 20
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

    def set(self, name: str, offset: int, values: Tensor) -> None:
        """Copies flat values to a tensor's elements from ``offset`` on; from a GPU without waiting for it."""
        place = self._views[name][offset : offset + values.numel()]
        if values.device.type == "cpu":
            np.copyto(place.numpy(), values.numpy())  # torch's would take the step's threads
        else:
            place.copy_(values, non_blocking=True)

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

    def take(self, pieces: Iterable[Piece]) -> None:
        """Copies every piece; they may change when this returns."""
        for kind, name, offset, values in pieces:
            if kind == "weight":
                self.weights.set(name, offset, values)
            else:
                self.optimizer.set(f"{kind}/{name}", offset, values)
        if self._device == "cuda":
            torch.cuda.synchronize()


class BackgroundCopy:
    """One gathering and copying at a time, in a thread, or at once where it may not run beside the steps."""

    def __init__(self, is_beside: bool):
        self._thread = ThreadPoolExecutor(1, "copy") if is_beside else None
        self._copying: Future[Any] = Future()
        self._copying.set_result(None)

    def begin(self, copy: Callable[[], Any]) -> None:
        """Starts a copy, when the one before has ended."""
        self.wait()
        if self._thread:
            self._copying = self._thread.submit(copy)
        else:
            copy()

    @property
    def is_busy(self) -> bool:
        """Whether the copy that was begun last goes on."""
        return not self._copying.done()

    def wait(self) -> None:
        """Waits for the copy that was begun last; any thread may.

        Raises:
            Exception: What ended it.
        """
        self._copying.result()


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
