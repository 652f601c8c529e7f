"""Megatron-core's fused bias and GELU, the tanh form.

The other fusions of ``megatron.core.fusions`` (0.16) are not taken: LayerNorm is apex's kernel in a module
(``model.kernels.apex`` calls the kernel itself), bias with dropout draws from torch's generator instead of by key,
softmax needs the scores of whole rows in memory, and cross-entropy needs all logits and cannot sample.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

from torch import Tensor


def available(operation: str, approximate: bool) -> str | None:
    """None where Megatron-core can run ``operation`` (``bias_gelu``); else the reason, with the remedy.

    Args:
        operation: As in ``model.kernels.select``.
        approximate: Whether the model's GELU is the tanh form.
    """
    if operation == "add_norm":
        return "Megatron-core's LayerNorm is apex's: kernels.backend=apex"
    if operation != "bias_gelu":
        return f"Megatron-core has no kernel for {operation} that fits"
    if not approximate:
        return "Megatron-core's GELU is the tanh form; the model's is the exact one by erf"
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        return "Megatron-core is not installed: pip install megatron-core"
    try:
        _bias_gelu()
    except Exception as error:  # whatever an installation for another torch brings about
        return f"Megatron-core cannot be imported ({error}); install another release: pip install -U megatron-core"
    return None


def megatron_bias_gelu(x: Tensor, bias_F: Tensor, approximate: bool) -> Tensor:
    """See ``model.kernels.gelu.reference_bias_gelu``; ``approximate`` must be true.

    The first calls compile it with torch.compile. The sum is made in the dtype of ``x``.
    """
    assert approximate, "Megatron-core's GELU is the tanh form"
    return _bias_gelu()(x, bias_F.to(x.dtype))


@cache
def _bias_gelu() -> Callable[[Tensor, Tensor], Tensor]:
    """Imported at first use, which takes 3 s and warns of what else is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.fusions.fused_bias_gelu").bias_gelu_impl
