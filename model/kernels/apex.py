"""NVIDIA's apex, built from its source: LayerNorm and AdamW; and how to tell it from others of that name.

Names and orders of arguments are those of NVIDIA/apex at 6424da3 (``apex/normalization/fused_layer_norm.py``,
``apex/optimizers/fused_adam.py``, ``csrc/amp_C_frontend.cpp``).
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from model.kernels.adamw import AdamWRule
from model.kernels.dropout import Dropout, torch_dropout

_INSTALL = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
_EXTENSIONS = {"add_norm": "fused_layer_norm_cuda", "adamw": "amp_C"}
_NOT_TAKEN = {
    "predict": "apex's cross-entropy reads all logits at once and cannot sample",
    "lamb": "apex's LAMB takes norms of the tensors it gets, which under ZeRO are pieces of the model's, clips by "
    "itself, and scales no update without weight decay",
}
_DECOUPLED_DECAY = 1  # FusedAdam's adam_w_mode


def available(operation: str, device: str) -> str | None:
    """None where apex can run ``operation`` (``add_norm``, ``adamw``); else the reason, with the remedy.

    Args:
        operation: As in ``model.kernels.select``, or ``adamw``, ``lamb``.
        device: Where tensors lie: ``cuda`` or ``cpu``.
    """
    if operation not in _EXTENSIONS:
        return _NOT_TAKEN.get(operation, f"apex has no kernel for {operation}")
    apex, place_or_reason = find_apex()
    if apex is None:
        return place_or_reason
    try:
        importlib.import_module(_EXTENSIONS[operation])
    except ImportError as error:
        return f"NVIDIA's apex in {place_or_reason} lacks its CUDA extensions ({error}); build them: {_INSTALL}"
    return None if device == "cuda" else "apex's kernels need a GPU"


def find_apex() -> tuple[ModuleType | None, str]:
    """Recognises NVIDIA's apex by what lies in it; nothing of another project of that name is run.

    Returns:
        The module and its folder; or None and the reason, with the remedy. CUDA extensions may be
        missing: see ``available``.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None, f"apex is not installed; NVIDIA's is built from its source: {_INSTALL}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    places = [folder for folder in folders if (folder / "normalization" / "fused_layer_norm.py").exists()]
    if not places:
        where = folders[0] if folders else spec.origin
        return None, (
            f"the apex in {where} is another project of that name, not NVIDIA's (the package index's is a web toolkit "
            f"for Pyramid); replace it: pip uninstall apex, then {_INSTALL}"
        )
    try:
        return importlib.import_module("apex"), str(places[0])
    except Exception as error:  # whatever a build against another torch brings about
        return None, f"NVIDIA's apex in {places[0]} cannot be imported ({error}); build it again: {_INSTALL}"


def apex_add_norm(
    x: Tensor, residual: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, dropout: Dropout | None
) -> Tensor:
    """See ``model.kernels.layer_norm.reference_add_norm``; needs a GPU."""
    layer_norm = importlib.import_module("apex.normalization.fused_layer_norm")
    total = residual + torch_dropout(x, dropout)
    # Gain and shift may be wider than x; the result is as wide as they are.
    return layer_norm.mixed_dtype_fused_layer_norm_affine(total, weight_C, bias_C, weight_C.shape, eps).to(x.dtype)


@torch.no_grad()
def apex_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: AdamWRule,
    scale: Tensor | None = None,
    half_copies: list[Tensor] | None = None,
) -> None:
    """See ``model.kernels.adamw.reference_adamw``; needs a GPU.

    apex rounds betas to fp32: second moments settle 1e-5 off for a beta of 0.999. Scaling and copies are passes of
    their own, and with bias correction the host waits for the step counts.
    """
    update = importlib.import_module("amp_C").multi_tensor_adam
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    wide = [gradient.to(weight.dtype).contiguous() for weight, gradient in zip(weights, gradients, strict=True)]
    if scale is not None:
        wide = torch._foreach_mul(wide, scale)
    counts = [1] * len(weights)
    if rule.bias_correction:
        torch._foreach_add_(steps, 1)
        counts = [int(count) for count in torch.stack(steps).tolist()]
    no_overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)
    for count in sorted(set(counts)):
        lists = [
            [tensor for tensor, own in zip(tensors, counts, strict=True) if own == count]
            for tensors in (wide, weights, exp_avgs, exp_avg_sqs)
        ]
        apply(
            update, no_overflow, lists, rule.lr, *rule.betas, rule.eps, count,
            _DECOUPLED_DECAY, int(rule.bias_correction), rule.weight_decay,
        )  # fmt: skip
    if half_copies is not None:
        torch._foreach_copy_(half_copies, weights)
