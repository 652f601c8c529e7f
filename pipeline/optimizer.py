"""AdamW as ELECTRA uses it, by one of the kernels, and the parameter groups of all optimizers."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.kernels.adamw import AdamW, AdamWRule, torch_adamw
from pipeline.config import Config
from pipeline.config_train import LayerDecayDepth

_NO_DECAY = ("layer_norm", "bias")
_LAYER = re.compile(r"^(\w+)\.layers\.(\d+)\.")


class WithMoments:
    """What the optimizers have in common: both moments of every tensor, and groups that may be frozen.

    The learning rate starts at 0; the training loop sets ``group["lr"]`` before every step.
    """

    bias_correction: bool
    param_groups: list[dict[str, Any]]
    state: Any

    def create_state(self, parameters: Iterable[Tensor]) -> None:
        """Creates the moments of ``parameters`` that do not exist yet, as zeros."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }

    def set_applied_steps(self, parameters: Iterable[Tensor], applied_steps: int) -> None:
        """Tells the moments of ``parameters`` how many updates are behind them; matters with bias correction only."""
        if self.bias_correction:
            for parameter in parameters:
                self.state[parameter]["step"].fill_(applied_steps)

    @contextmanager
    def frozen_left_out(self) -> Iterator[None]:
        """Hides the parameters of groups with ``group["frozen"]``: weights, moments and step counts stay."""
        groups = [(group, group["params"]) for group in self.param_groups if group.get("frozen")]
        for group, _ in groups:
            group["params"] = []
        try:
            yield
        finally:
            for group, parameters in groups:
                group["params"] = parameters


class ElectraAdamW(WithMoments, torch.optim.Optimizer):
    """AdamW with the bias correction as a switch; see ``model.kernels.adamw`` for the formula and the kernels."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        kernel: AdamW = torch_adamw,
    ):
        self.bias_correction = bias_correction
        self._kernel = kernel
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient and is not frozen."""
        assert closure is None
        with self.frozen_left_out():
            for group in self.param_groups:
                self.create_state(group["params"])
                updated = [(p, p.grad, self.state[p]) for p in group["params"] if p.grad is not None]
                if not updated:
                    continue
                weights, gradients, states = (list(column) for column in zip(*updated, strict=True))
                means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
                rule = AdamWRule(group["lr"], group["betas"], group["eps"], group["weight_decay"], self.bias_correction)
                self._kernel(weights, gradients, means, squares, steps, rule, None, None)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The groups of pretraining, see ``group_parameters``; by network where they are trained one after the other."""
    optimizer = config.optimizer
    return group_parameters(
        model,
        optimizer.weight_decay,
        optimizer.layer_decay,
        optimizer.layer_decay_depth,
        by_part=config.objective.training == "two_stage",
    )


def group_parameters(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: LayerDecayDepth = "fixed",
    by_part: bool = False,
) -> list[dict[str, Any]]:
    """Groups with what the optimizers, DeepSpeed and the training loop treat alike.

    Weight decay is on all but LayerNorm and biases; embedding tables decay. Without layer-wise
    rates and parts that is two groups.

    Args:
        model: Whose parameters; names as ``layer_exponents`` expects them.
        weight_decay: Of the groups that decay.
        layer_decay: Learning rate of a layer over that of the one above; 1 for equal rates.
        depth: Which layer gets which power of it.
        by_part: Whether the two networks have groups of their own.

    Returns:
        Groups with torch's ``params`` and ``weight_decay``, and ``decays`` (False for LayerNorm and
        biases), ``part`` (``generator``, ``discriminator`` or ``both``), ``lr_scale`` and ``frozen``.
    """
    exponents = layer_exponents([name for name, _ in model.named_parameters()], depth)
    groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decays = not any(part in name for part in _NO_DECAY)
        part = part_of(name) if by_part else "both"
        key = (part, exponents[name] if layer_decay != 1 else 0, decays)
        group = groups.setdefault(key, {
            "params": [], "weight_decay": weight_decay if decays else 0.0, "decays": decays, "part": part,
            "lr_scale": layer_decay ** key[1], "frozen": False,
        })  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


def part_of(name: str) -> str:
    """The network that a parameter belongs to, by its name; shared tables are the discriminator's."""
    return "generator" if name.startswith(("generator", "baseline")) else "discriminator"


def layer_exponents(names: Iterable[str], depth: LayerDecayDepth) -> dict[str, int]:
    """Powers of the layer-wise decay by parameter name, for pretraining and fine-tuning alike.

    With n layers, counted in each network by itself:

    ============  ========  =============================
    part          ``fixed``  ``released``
    ============  ========  =============================
    heads         0         0
    top layer     1         2
    bottom layer  n         n + 1
    embeddings    n + 1     n + 2
    ============  ========  =============================

    ``released`` has one power too many below the heads; the published scores were obtained that way
    (google-research/electra, ``_get_layer_lrs``). ``embeddings_project`` counts as embeddings.

    Args:
        names: ``<network>.layers.<i>.*``, ``*embeddings.*`` and ``<network>.embeddings_project.*``;
            all others are heads.
        depth: One of the two columns.
    """
    names = list(names)
    num_layers: dict[str, int] = {}
    for found in filter(None, map(_LAYER.match, names)):
        num_layers[found[1]] = max(num_layers.get(found[1], 0), int(found[2]) + 1)
    extra = 1 if depth == "released" else 0
    exponents = {}
    for name in names:
        found = _LAYER.match(name)
        if found:
            exponents[name] = num_layers[found[1]] - int(found[2]) + extra
        elif name.startswith(("embeddings.", "generator_embeddings.")) or ".embeddings_project." in name:
            exponents[name] = num_layers.get(part_of(name), 0) + 1 + extra
        else:
            exponents[name] = 0
    return exponents
