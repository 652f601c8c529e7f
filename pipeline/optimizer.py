"""AdamW as ELECTRA uses it, on torch's fused implementation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NO_DECAY = ("layer_norm", "bias")

# Without bias correction torch's formula is used at a step count where 1 - beta^step is 1 exactly.
_STEP_WITHOUT_CORRECTION = 1e9


class ElectraAdamW(torch.optim.AdamW):
    """torch's AdamW with the bias correction as a switch.

    The released optimizer has none: update = m / (sqrt(v) + eps) + decay * weight
    (google-research/electra, ``model/optimization.py``). The learning rate starts
    at 0; the training loop sets it before every step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
    ):
        self.bias_correction = bias_correction
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def create_state(self, parameters: Iterable[Tensor]) -> None:
        """Creates the moments of ``parameters`` that do not exist yet, as zeros."""
        for parameter in parameters:
            if not self.state[parameter]:
                step = 0.0 if self.bias_correction else _STEP_WITHOUT_CORRECTION
                self.state[parameter] = {
                    "step": torch.tensor(step, dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }

    def set_applied_steps(self, applied_steps: int) -> None:
        """Tells restored moments how many updates are behind them; matters with bias correction only."""
        if self.bias_correction:
            for state in self.state.values():
                state["step"].fill_(applied_steps)

    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            self.create_state(group["params"])
        return super().step(closure)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay on all but LayerNorm and biases. Embedding tables decay."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if any(part in name for part in _NO_DECAY) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
