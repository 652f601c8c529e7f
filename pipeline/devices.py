"""The device: its peak rate and memory, for MFU and reports; the kernels and layers that run on it."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from model.encoder import Encoder, Layer
from model.kernels.select import Kernels, UnusableBackendError, find, select_kernels
from pipeline.config import Config
from pipeline.distributed import Control, Process
from pipeline.errors import ConfigError
from pipeline.log import logger
from pipeline.meeting import node_name

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16, FLOP/s, from NVIDIA's datasheets.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "V100": 125e12}

_DIFFERING = "not the same on all processes"
_COMPILED = ("add_norm", "bias_gelu")  # what lies between a layer's products


@contextmanager
def explaining_lack_of_memory(process: Process) -> Iterator[None]:
    """In here the device may have too little memory, which it will have again the next time.

    Raises:
        ConfigError: In place of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"rank {process.rank} on {socket.gethostname()} is out of memory ({str(error).splitlines()[0]}); set a "
            "smaller train.micro_batch_size, the same global batch in more passes, or "
            "train.activation_checkpointing=true; `electra tune` measures what fits"
        ) from None


def choose_kernels(
    config: Config, device: str, kept: dict[str, str] | None = None, backend: str | None = None
) -> Kernels:
    """Resolves ``kernels.backend`` for a run; warns of what is broken here.

    Args:
        config: The run.
        device: ``cpu`` or ``cuda``.
        kept: Backends by operation of an earlier attempt, which ``auto`` keeps.
        backend: In place of the config's.

    Raises:
        ConfigError: The backend does not work here.
    """
    if config.kernels.compile_layers and config.kernels.backend not in ("auto", "torch"):
        raise ConfigError(
            f"kernels.compile_layers=true fuses torch's operations, and kernels.backend={config.kernels.backend} takes "
            "others; set kernels.backend=auto, or leave compile_layers out"
        )
    backend = backend or config.kernels.backend
    is_tanh = config.model.activation == "gelu_tanh"
    try:
        shapes = config.model.discriminator, config.model.generator
        head_sizes = tuple(shape.hidden_size // shape.heads for shape in shapes)
        kernels = select_kernels(backend, device, is_tanh, kept, _DTYPES[config.train.precision], head_sizes)
    except UnusableBackendError as error:
        raise ConfigError(f"{error}; or set kernels.backend=auto") from None
    for warning in kernels.warnings:
        logger.warning("kernel of %s", warning)
    if backend == "auto" and config.kernels.compile_layers:
        plain = {operation: find(operation, "torch") for operation in _COMPILED}
        reasons = dict.fromkeys(_COMPILED, "fused by the compiler: kernels.compile_layers")
        names = kernels.names | dict.fromkeys(_COMPILED, "torch")
        kernels = replace(kernels, **plain, names=names, reasons=kernels.reasons | reasons)
    return kernels


def agree_on_kernels(config: Config, kernels: Kernels, control: Control) -> Kernels:
    """What one process computed otherwise than the others would show nowhere but in the loss.

    Where they differ, ``auto`` leaves the operation to torch in all of them: one sick node ends no job.

    Raises:
        ConfigError: They differ, and another backend than ``auto`` was asked for (every rank).
    """
    differing = differing_kernels(control.gather(account_of(kernels)))
    for operation, how in differing.items():
        if config.kernels.backend != "auto":
            raise ConfigError(
                f"kernels.backend={config.kernels.backend}: for {operation}, {how}; mend that node, leave it out, or "
                "set kernels.backend"
            )
        if control.is_first:
            logger.warning("kernel of %s: %s; all take torch until the next attempt", operation, how)
    functions = {operation: find(operation, "torch") for operation in differing}
    names, reasons = dict.fromkeys(differing, "torch"), dict.fromkeys(differing, _DIFFERING)
    return replace(kernels, **functions, names=kernels.names | names, reasons=kernels.reasons | reasons)


def account_of(kernels: Kernels) -> list[Any]:
    """What ``differing_kernels`` compares, of this process."""
    return [node_name(), kernels.names, kernels.reasons]


def differing_kernels(accounts: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Operations that not all processes run alike, and how the first other one differs from rank 0.

    Args:
        accounts: ``account_of`` each rank.
    """
    (first_node, first, ground), *others = accounts
    differing: dict[str, str] = {}
    for rank, (node, names, reasons) in enumerate(others, 1):
        for operation in (each for each in first if names[each] != first[each]):
            how = f"rank {rank} on {node} has {names[operation]} ({reasons[operation]}) and rank 0 on {first_node} "
            differing.setdefault(operation, f"{how}{first[operation]} ({ground[operation]})")
    return differing


def kept_kernels(numerics: dict[str, Any], device: str) -> dict[str, str] | None:
    """Backends by operation that a run's first attempt chose, if it ran on a device of this kind."""
    kept = numerics.get("kernels_kept", numerics.get("kernels"))  # older records have what ran alone
    return kept if numerics.get("device") == device else None


def kernels_to_keep(config: Config, kernels: Kernels, kept: dict[str, str] | None) -> dict[str, str]:
    """Backends by operation that later attempts are to take: where ``auto`` chooses, those of the first one.

    What one node's sickness kept from running is not among them, so that each attempt tries it again.
    """
    chosen = {operation: name for operation, name in kernels.names.items() if kernels.reasons[operation] != _DIFFERING}
    return chosen | (kept or {}) if config.kernels.backend == "auto" else chosen


def prepare_layers(config: Config, model: nn.Module) -> None:
    """Has the encoders' layers compiled and their activations made again, where the config says so.

    Compiled is what follows attention: it has the same shapes in every micro-batch, and attention kernels of its own
    would only be called. What is compiled is kept for the next start, under ``run.dir``.
    """
    for encoder in model.modules():
        if isinstance(encoder, Encoder):
            encoder.checkpoints_activations = config.train.activation_checkpointing
    if not config.kernels.compile_layers:
        return
    # By now torch may have set it to a folder under /tmp by itself.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.run.dir.absolute() / ".inductor")
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.after_attention = torch.compile(layer.after_attention, dynamic=False)


def peak_flops(device: str, threads: int, precision: str) -> tuple[float, str]:
    """The rate that MFU refers to, in FLOP/s, and where it comes from.

    A known GPU's datasheet value; else the best of a few matrix products timed here, in the precision of training: a
    processor with units for bf16 multiplies in it eight times as fast.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for known, rate in _PEAK_BF16.items():
            if known in name:
                return rate, f"{name}, dense bf16 by its datasheet"
    size = 1024
    a, b = (torch.randn(size, size, device=device, dtype=_DTYPES[precision]) for _ in range(2))
    best_s = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        float((a @ b)[0, 0])  # reading a value waits for the device
        best_s = min(best_s, time.perf_counter() - begin)
    return 2 * size**3 / best_s, f"{threads} threads, {precision} product of {size}x{size} matrices timed now"


def peak_memory_gib(device: str) -> float:
    """Highest memory use so far: of the GPU's allocator, or this process's resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


class Stopwatch:
    """Seconds that a device spends in marked spans. A GPU is waited for only when they are asked for."""

    def __init__(self, device: str):
        """``cpu`` or ``cuda``."""
        self._is_gpu, self._seconds = device == "cuda", 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def span(self) -> Iterator[None]:
        """What is done inside counts."""
        if self._is_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
