"""DeepSpeed's only home: one engine, one backward, one optimizer, every ZeRO stage alike.

What the stages do differently is hidden here: where the gradient norm comes
from, what happens to NaN, and how full weights and moments are read and set.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.electra import Electra, GlobalCounts, MicroBatch
from model.statistics import Statistics
from pipeline.config import Config
from pipeline.deepspeed_config import build_deepspeed_config, zero_stage
from pipeline.errors import ConfigError
from pipeline.optimizer import ElectraAdamW, decay_groups
from pipeline.plan import Plan

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        statistics: Sums over this process's micro-batches, on the device.
        gradient_norm: Global norm before clipping; inf when the step was skipped.
        applied: False when the step was skipped because of NaN or inf.
        scaled_down: Skipped only because fp16's loss scale was too high; it is lower now.
    """

    statistics: Statistics
    gradient_norm: float
    applied: bool
    scaled_down: bool = False


def check_precision(config: Config, device: str) -> None:
    """Refuses what DeepSpeed would refuse later and less clearly."""
    if config.train.precision == "fp16" and device == "cpu":
        raise ConfigError("train.precision=fp16 needs a GPU: DeepSpeed refuses it on CPU; use bf16 or fp32")


class Engine:
    """A model in training."""

    def __init__(self, config: Config, plan: Plan, model: Electra, device: str):
        """Wraps ``model``; its weights at this moment are the ones that are trained.

        Raises:
            ConfigError: A precision that DeepSpeed refuses here, a contradicting DeepSpeed JSON.
        """
        import deepspeed
        from deepspeed.utils import logger as deepspeed_logger

        check_precision(config, device)
        deepspeed_logger.setLevel("WARNING")
        # Its shared-memory all-reduce is compiled at first use, which takes a minute, and serves one host only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = build_deepspeed_config(config, plan)
        self.stage = zero_stage(settings)
        self.settings = settings
        self.model = model
        self._clip = config.optimizer.gradient_clip
        self._world_size = plan.world_size
        optimizer = ElectraAdamW(
            decay_groups(model, config.optimizer.weight_decay),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            bias_correction=config.optimizer.bias_correction,
        )
        self._base_optimizer = optimizer
        self._is_plain = self.stage == 0 and config.train.precision == "fp32"
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._engine: Any = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        self._parameters = {names[parameter]: parameter for parameter in model.parameters()}
        self._create_moments()

    def step(
        self,
        micro_batches: list[tuple[int, MicroBatch]],
        counts: GlobalCounts,
        lr: float,
        dropout_seed: Callable[[int], int],
    ) -> StepResult:
        """Forward and backward over this process's micro-batches, then one update."""
        if not self.model.training:
            self._engine.train()
        statistics = Statistics.zeros(self._engine.device)
        for number, batch in micro_batches:
            torch.manual_seed(dropout_seed(number))
            loss, sums, _, _ = self._engine(batch, counts)
            statistics = statistics + Statistics(sums)
            # DeepSpeed averages over processes; the counts are global already, so that is undone.
            self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
            if self._engine.is_gradient_accumulation_boundary():
                gradient_norm, applied = self._update(lr)
            else:
                self._engine.step()
        scaled_down = not applied and self.settings["fp16"]["enabled"] and self._engine.optimizer.loss_scale > 1
        return StepResult(statistics, gradient_norm, applied, scaled_down)

    def _update(self, lr: float) -> tuple[float, bool]:
        """Clips and applies, or skips; returns the norm before clipping and whether it was applied."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._is_plain:
            norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self._clip))
            if not math.isfinite(norm):
                self._engine.optimizer.step = _skip_once(self._engine.optimizer)
            self._engine.step()
            return norm if math.isfinite(norm) else math.inf, math.isfinite(norm)
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        applied = self._engine.skipped_steps == skipped_before
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        return norm if applied else math.inf, applied

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, counts: GlobalCounts) -> tuple[Statistics, Tensor, Tensor]:
        """One forward pass without dropout.

        Returns:
            Sums; the discriminator's logits and labels, both ``(B, T)``.
        """
        self._engine.eval()
        _, sums, rtd_logits_BT, is_replaced_BT = self._engine(batch, counts)
        return Statistics(sums), rtd_logits_BT, is_replaced_BT

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter, whole, by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def full_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (kind, parameter, fp32 CPU tensor) for the weights and both moments, whole.

        Kinds are ``weight`` and those of ``MOMENTS``. A collective: all processes iterate together,
        and only rank 0 gets the tensors on the CPU.
        """
        for name, parameter in self._parameters.items():
            for kind in ("weight", *MOMENTS):
                value = self._read(parameter, kind).detach()
                yield kind, name, value.float().cpu() if self._engine.global_rank == 0 else value

    def load_full_state(self, read: Callable[[str, str], Tensor], applied_steps: int) -> None:
        """Sets weights and moments, whatever stage or number of processes wrote them.

        Args:
            read: (kind, parameter) to an fp32 tensor.
            applied_steps: Updates behind the moments.
        """
        self._base_optimizer.set_applied_steps(applied_steps)
        for name, parameter in self._parameters.items():
            for kind in ("weight", *MOMENTS):
                self._write(parameter, kind, read(kind, name).to(self._engine.device))

    def _create_moments(self) -> None:
        """Creates the moments now, as zeros. DeepSpeed 0.19 links them to parameters when the first group has
        stepped, and would not see those of the other groups.
        """
        optimizer = self._engine.optimizer
        if self.stage == 3:  # the base optimizer's groups are empty between steps
            self._base_optimizer.create_state(optimizer.fp32_partitioned_groups_flat)
            return
        self._base_optimizer.create_state(p for group in self._base_optimizer.param_groups for p in group["params"])
        if self.stage > 0:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            master = self._master(parameter)
            return master if kind == "weight" else self._base_optimizer.state[master][kind]
        if kind == "weight":
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        assert value is not None
        return value

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.stage == 3:
            self._write_partition(parameter, kind, value)
            return
        if self.stage == 0:
            master = self._master(parameter)
            (master if kind == "weight" else self._base_optimizer.state[master][kind]).copy_(value)
        elif kind == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
        if kind == "weight":
            parameter.copy_(value)  # what forward reads, beside the fp32 master

    def _write_partition(self, parameter: Any, kind: str, value: Tensor) -> None:
        """Stage 3: this process's part of a value. DeepSpeed's setters of whole values fail where the
        last part is padding, and leave what forward reads as it was.
        """
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self._world_size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self._engine.global_rank :][:size]
        if kind != "weight":
            safe_set_local_optimizer_state(parameter, part, kind)
            return
        safe_set_local_fp32_param(parameter, part)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    def _master(self, parameter: nn.Parameter) -> Any:
        """The fp32 copy of a parameter under stage 0; the parameter itself in fp32."""
        if self._is_plain:
            return parameter
        optimizer = self._engine.optimizer
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low_parameter, high_parameter in zip(low, high, strict=True):
                if low_parameter is parameter:
                    return high_parameter
        raise AssertionError("every parameter is in a group of the optimizer")


def _skip_once(optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    """A step that changes nothing and then restores the real one."""

    def skip(*_: Any, **__: Any) -> None:
        del optimizer.step

    return skip
