"""Which backend runs each operation, and why.

A backend other than ``reference`` and ``torch`` is imported only when somebody asks for it.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch

from model.kernels.adamw import ADAMW, AdamW
from model.kernels.attention import ATTENTION, Attention
from model.kernels.detection import DETECT, Detect
from model.kernels.embedding import EMBED, Embed
from model.kernels.gelu import BIAS_GELU, BiasGelu
from model.kernels.layer_norm import ADD_NORM, AddNorm
from model.kernels.selfcheck import deviation
from model.kernels.vocabulary import PREDICT, Predict

OPERATIONS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "add_norm": ADD_NORM,
    "bias_gelu": BIAS_GELU,
    "embed": EMBED,
    "predict": PREDICT,
    "detect": DETECT,
    "adamw": ADAMW,
}
"""Backends of each operation that are always there: ``reference`` and ``torch``."""

_OTHERS = {
    ("attention", "triton"): "attention_triton.triton_attention",
    ("add_norm", "triton"): "layer_norm_triton.triton_add_norm",
    ("bias_gelu", "triton"): "gelu_triton.triton_bias_gelu",
    ("embed", "triton"): "embedding_triton.triton_embed",
    ("predict", "triton"): "vocabulary_triton.triton_predict",
    ("detect", "triton"): "detection_triton.triton_detect",
    ("adamw", "triton"): "adamw_triton.triton_adamw",
    ("add_norm", "apex"): "apex.apex_add_norm",
    ("adamw", "apex"): "apex.apex_adamw",
    ("bias_gelu", "megatron"): "megatron.megatron_bias_gelu",
}

FASTEST = {
    "cpu": dict.fromkeys(OPERATIONS, ("torch", "Triton and apex need a GPU")),
    "cuda": {
        "attention": ("triton", "predicted: no products between documents, no mask in memory"),
        "add_norm": ("triton", "predicted: one pass over its bytes"),
        "bias_gelu": ("triton", "predicted: one pass over its bytes, gradient of the bias included"),
        "embed": ("triton", "predicted: one pass, sums without atomics"),
        "predict": ("triton", "predicted: two passes over a chunk's logits"),
        "detect": ("triton", "predicted: one kernel for ten"),
        "adamw": ("torch", "predicted: bound by memory, as any other"),
    },
}
"""By device and operation: the backend that ``auto`` takes where it works, and on what ground."""

_KEPT = "kept from the run's first attempt"


class UnusableBackendError(Exception):
    """The backend that was asked for runs nothing here; the message says why and what to do."""


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every operation; see the module of each for its signature.

    Attributes:
        names: Operation to backend; stored with a run and kept when it resumes.
        reasons: Why, by operation.
        warnings: What was to be taken and is broken, or no longer there.
    """

    attention: Attention
    add_norm: AddNorm
    bias_gelu: BiasGelu
    embed: Embed
    predict: Predict
    detect: Detect
    adamw: AdamW
    names: dict[str, str]
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()


def select_kernels(
    backend: str = "auto",
    device: str = "cpu",
    approximate_gelu: bool = False,
    kept: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    head_sizes: tuple[int, ...] = (64,),
) -> Kernels:
    """Resolves ``kernels.backend``. Backends that are not torch's own first run once against the reference.

    Args:
        backend: ``auto`` or one of the backends; operations that it does not have are chosen as by ``auto``.
        device: ``cpu`` or ``cuda``.
        approximate_gelu: Whether the model has the tanh form of GELU, the only one that Megatron has.
        kept: Backends by operation of an earlier attempt of the run, which ``auto`` keeps where they work.
        dtype: Of weights and activations, for the comparison with the reference.
        head_sizes: Of attention, for the same: the discriminator's and the generator's.

    Raises:
        UnusableBackendError: The backend that was asked for does not work here.
    """
    functions, names, reasons = {}, {}, {}
    unusable, warnings = [], []
    for operation in OPERATIONS:
        passed_over = []
        for name, ground in _wishes(operation, backend, device, kept):
            missing = why_not(operation, name, device, approximate_gelu)
            problem = missing or _broken(operation, name, device, approximate_gelu, dtype, head_sizes)
            if problem is None:
                break
            if name == backend and backend in backends_of(operation):
                unusable.append(problem)
            if problem != missing and name == backend:
                raise _unusable(backend, problem)
            passed_over.append(problem)
            if problem != missing or ground == _KEPT or (name == backend and backend in backends_of(operation)):
                warnings.append((operation, problem))
        functions[operation], names[operation] = find(operation, name), name
        reasons[operation] = "; ".join([ground, *dict.fromkeys(passed_over)])
    if backend != "auto" and backend not in names.values():
        raise _unusable(backend, unusable[0])
    told = tuple(f"{operation} runs on {names[operation]}: {problem}" for operation, problem in dict.fromkeys(warnings))
    return Kernels(**functions, names=names, reasons=reasons, warnings=told)


def outside_autocast(kernels: Kernels) -> Kernels:
    """The same where ``torch.autocast`` is on: it would change dtypes in a kernel, and not in its backward pass."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
            with torch.autocast(first.device.type, enabled=False):
                return function(*arguments)

        return run

    return replace(kernels, **{operation: wrap(getattr(kernels, operation)) for operation in OPERATIONS})


def _wishes(operation: str, backend: str, device: str, kept: dict[str, str] | None) -> list[tuple[str, str]]:
    """Backends in the order in which they are tried, the last one always there; and on what ground."""
    first = []
    if backend != "auto":
        first = [(backend, f"kernels.backend={backend}")]
    elif kept and operation in kept:
        first = [(kept[operation], _KEPT)]
    return [*first, FASTEST[device][operation], ("torch", "always there")]


def _unusable(backend: str, problem: str) -> UnusableBackendError:
    return UnusableBackendError(f"kernels.backend={backend} does not work here: {problem}")


@cache
def _broken(
    operation: str, backend: str, device: str, approximate_gelu: bool, dtype: torch.dtype, head_sizes: tuple[int, ...]
) -> str | None:
    """None where a backend does on a small input what the reference does, else how not; torch's own are trusted."""
    if backend in OPERATIONS[operation]:
        return None
    try:
        function = find(operation, backend)
    except Exception as error:  # whatever an installation for another GPU or torch brings about
        return f"{backend} cannot be imported ({error})"
    sizes = dict.fromkeys(head_sizes if operation == "attention" else head_sizes[:1])
    for each, head_size in product(dict.fromkeys((torch.float32, dtype)), sizes):
        problem = deviation(operation, function, device, each, approximate_gelu, head_size)
        if problem:
            return f"{backend}'s {operation} fails its comparison with the reference ({problem})"
    return None


def backends_of(operation: str) -> list[str]:
    """Every backend that has the operation, whether or not it works here."""
    return [*OPERATIONS[operation], *(backend for other, backend in _OTHERS if other == operation)]


def why_not(operation: str, backend: str, device: str, approximate_gelu: bool = False) -> str | None:
    """None where a backend can run an operation here, else the reason."""
    if backend in OPERATIONS[operation]:
        return None
    if backend not in backends_of(operation):
        return f"{backend} has no {operation}"
    if backend == "triton":
        return _why_not_triton(device)
    module: Any = importlib.import_module(f"model.kernels.{backend}")
    return module.available(operation, approximate_gelu if backend == "megatron" else device)


def _why_not_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU, or TRITON_INTERPRET=1, which is for tests and slow"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return f"Triton kernels need compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
    return None


def find(operation: str, backend: str) -> Callable[..., Any]:
    """The function of a backend that ``why_not`` has nothing against."""
    if backend in OPERATIONS[operation]:
        return OPERATIONS[operation][backend]
    module, function = _OTHERS[operation, backend].split(".")
    return getattr(importlib.import_module(f"model.kernels.{module}"), function)


def table(device: str, approximate_gelu: bool = False) -> list[tuple[str, str, str]]:
    """Operation, backend and state: what works here and what does not; for people."""
    return [
        (operation, backend, why_not(operation, backend, device, approximate_gelu) or "works")
        for operation in OPERATIONS
        for backend in backends_of(operation)
    ]
