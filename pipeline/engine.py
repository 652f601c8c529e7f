"""DeepSpeed's only home: one engine, one backward, one optimizer, every ZeRO stage alike.

What the stages do differently is hidden here: where the gradient norm comes
from, what happens to NaN, and how full weights and moments are read and set.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from model.batch import GlobalCounts, MicroBatch
from model.electra import Electra
from model.flops import generator_steps
from model.objective import Trains
from model.statistics import Statistics
from pipeline.config import Config
from pipeline.deepspeed_config import build_deepspeed_config, zero_stage
from pipeline.devices import Stopwatch
from pipeline.errors import ConfigError
from pipeline.fragments import Fragment, in_flat_group, in_sub_group, measure_norms, segments, whole
from pipeline.lamb import ElectraLamb
from pipeline.loss_scale import never_give_up, read_loss_scale, set_loss_scale, skip_next_step
from pipeline.optimizer import ElectraAdamW, parameter_groups
from pipeline.pieces import Piece, Pieces
from pipeline.plan import Plan

MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIMIZERS = {"adamw": ElectraAdamW, "lamb": ElectraLamb}


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        statistics: Sums over this process's micro-batches, on the device.
        gradient_norm: Global norm before clipping; inf when the step was skipped.
        applied: False when the step was skipped because of NaN or inf.
        scaled_down: Skipped only because fp16's loss scale was too high; it is lower now.
        norms: When asked for: L2 norms of the gradients before clipping and of the fp32 weights before the
            update, as ``train/grad_norm_<part>`` and ``train/parameter_norm_<part>``.
    """

    statistics: Statistics
    gradient_norm: float
    applied: bool
    scaled_down: bool = False
    norms: dict[str, float] = field(default_factory=dict)


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
        check_precision(config, device)
        settings = build_deepspeed_config(config, plan)
        self.stage = zero_stage(settings)
        self.settings = settings
        self.model = model
        self.before_change: Callable[[], object] = lambda: None  # is called before weights or moments change
        self._clip = config.optimizer.gradient_clip
        self._world_size = plan.world_size
        kernel = {"kernel": model.kernels.adamw} if config.optimizer.name == "adamw" else {}
        optimizer = _OPTIMIZERS[config.optimizer.name](
            parameter_groups(model, config),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            bias_correction=config.optimizer.bias_correction,
            **kernel,
        )
        self._base_optimizer = optimizer
        self._generator_steps = generator_steps(config.objective, config.train.steps)
        self._forward_watch = Stopwatch(device)
        self._is_plain = self.stage == 0 and config.train.precision == "fp32"
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._engine: Any = _import_deepspeed().initialize(
            model=model.to(device), optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        if settings["fp16"]["enabled"]:
            never_give_up(self._engine.optimizer)
        self._parameters = {names[parameter]: parameter for parameter in model.parameters()}
        self._create_moments()
        self._fragments = self._find_fragments()
        self._pieces = Pieces(self._fragments, self._read_fragment, self.shapes(), self.stage > 0, device == "cpu")
        if isinstance(optimizer, ElectraLamb):
            tensors = [tensor for _, tensors in self._updated_tensors() for tensor in tensors]
            optimizer.set_segments(
                segments(self._fragments, self._parameters, tensors), len(self._parameters), self._sum_over_pieces()
            )

    def step(
        self,
        micro_batches: Iterable[tuple[MicroBatch, GlobalCounts]],
        lr: float,
        trains: Trains = "both",
        measures_norms: bool = False,
    ) -> StepResult:
        """Forward and backward over this process's micro-batches, then one update.

        Args:
            micro_batches: Rows, and the denominators of their losses.
            lr: Learning rate; layer-wise rates are fractions of it.
            trains: The network that is updated; the other one's weights, moments and step counts stay
                as they are. Other than ``both`` for two_stage only.
            measures_norms: Whether ``StepResult.norms`` are wanted; costs a pass over gradients and weights.
        """
        if not self.model.training:
            self._engine.train()
        self._prepare_groups(lr, trains)
        statistics = Statistics.zeros(self._engine.device)
        norms: dict[str, float] = {}
        for batch, counts in micro_batches:
            torch.manual_seed(batch.seed)  # for kernels that draw from torch's generator
            with self._forward_watch.span():
                loss, sums, *_ = self._engine(batch, counts, trains)
            statistics = statistics + Statistics(sums)
            # DeepSpeed averages over processes; the counts are global already, so that is undone.
            self._engine.backward(loss * self._world_size, scale_wrt_gas=False)
            if self._engine.is_gradient_accumulation_boundary():
                if measures_norms:
                    norms = measure_norms(
                        self._fragments, self._parameters, self._loss_scale(), self._sum_over_pieces()
                    )
                gradient_norm, applied = self._update()
            else:
                self._engine.step()
        scaled_down = not applied and self.settings["fp16"]["enabled"] and self._engine.optimizer.loss_scale > 1
        return StepResult(statistics, gradient_norm, applied, scaled_down, norms)

    def busy_s(self) -> float:
        """Seconds of this process's forward passes since the last call; backward passes wait for others."""
        return self._forward_watch.take()

    @torch.no_grad()
    def flip_a_bit(self) -> None:
        """Damages one weight of this process's copy; for drills."""
        self.before_change()
        weight = next(self.model.parameters()).view(-1)[:1]
        bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)
        bits ^= 1 << 5

    def _prepare_groups(self, lr: float, trains: Trains) -> None:
        for group in self._base_optimizer.param_groups:
            assert trains == "both" or group["part"] != "both", "only two_stage has groups for each network"
            group["lr"] = lr * group["lr_scale"]
            group["frozen"] = trains != "both" and group["part"] != trains

    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self.settings["fp16"]["enabled"] else 1.0

    def _update(self) -> tuple[float, bool]:
        """Clips and applies, or skips; returns the norm before clipping and whether it was applied."""
        self.before_change()
        if self._is_plain:
            norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), self._clip))
            if not math.isfinite(norm):
                skip_next_step(self._engine.optimizer)
            self._engine.step()
            return norm if math.isfinite(norm) else math.inf, math.isfinite(norm)
        skipped_before, scale = self._engine.skipped_steps, self._loss_scale()
        self._engine.step()
        applied = self._engine.skipped_steps == skipped_before
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self.stage == 0:  # there DeepSpeed 0.19 reports the norm of the scaled gradients
            norm /= scale
        return norm if applied else math.inf, applied

    @torch.no_grad()
    def evaluate(
        self, batch: MicroBatch, counts: GlobalCounts, trains: Trains = "both"
    ) -> tuple[Statistics, Tensor | None, Tensor | None]:
        """One forward pass without dropout.

        Returns:
            Sums; the discriminator's logits and labels, both ``(B, T)``, None where nothing is detected.
        """
        self._engine.eval()
        _, sums, rtd_logits_BT, is_replaced_BT = self._engine(batch, counts, trains)
        return Statistics(sums), rtd_logits_BT, is_replaced_BT

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter, whole, by name."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def full_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (kind, parameter, fp32 tensor on the device) for the weights and both moments, whole.

        Kinds are ``weight`` and those of ``MOMENTS``. A collective: all processes iterate together. Some tensors are
        the ones in use: copy them before the next step.
        """
        for name, parameter in self._parameters.items():
            for kind in ("weight", *MOMENTS):
                yield kind, name, self._read(parameter, kind).detach().float()

    def state_pieces(self) -> Iterator[Piece]:
        """Yields what ``full_state`` does on the first process alone, in pieces, as fast as can be; a collective.

        Most are in use: their values stay as they are until ``before_change`` returns.
        """
        return self._pieces.gather(("weight", *MOMENTS))

    def _read_fragment(self, fragment: Fragment, kind: str) -> Tensor:
        return fragment.weight if kind == "weight" else fragment.of(self._base_optimizer.state[fragment.tensor][kind])

    def load_full_state(self, read: Callable[[str, str], Tensor], applied_steps: int) -> None:
        """Sets weights and moments, whatever stage or number of processes wrote them.

        Args:
            read: (kind, parameter) to an fp32 tensor.
            applied_steps: Updates behind the moments.
        """
        self._set_applied_steps(applied_steps)
        for name, parameter in self._parameters.items():
            for kind in ("weight", *MOMENTS):
                self._write(parameter, kind, read(kind, name).to(self._engine.device))

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of fp16's loss scale; None in other precisions. May be set to what it was."""
        return read_loss_scale(self._engine.optimizer) if self.settings["fp16"]["enabled"] else None

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float] | None) -> None:
        if state and self.settings["fp16"]["enabled"]:
            set_loss_scale(self._engine.optimizer, state)

    def set_weights(self, read: Callable[[str], Tensor | None]) -> None:
        """Sets the weights of the parameters for which ``read`` gives a tensor; moments stay. A collective.

        Args:
            read: Parameter name to a whole tensor of its shape, the same on all processes, or None.
        """
        shapes = self.shapes()
        for name, parameter in self._parameters.items():
            value = read(name)
            if value is not None:
                assert list(value.shape) == shapes[name], f"{name} has the shape {shapes[name]}"
                self._write(parameter, "weight", value.to(self._engine.device, torch.float32))

    def copy_weights(self, sources: dict[str, str]) -> None:
        """Sets weights to those of other parameters, in fp32; moments stay. A collective.

        Args:
            sources: The parameter that is set, by name, to the one that it is copied from. Shapes agree.
        """
        shapes = self.shapes()
        for target, source in sources.items():
            assert shapes[target] == shapes[source], f"{target} and {source} have different shapes"
            value = self._read(self._parameters[source], "weight").detach().clone()
            self._write(self._parameters[target], "weight", value)

    def _create_moments(self) -> None:
        """Creates the moments now, as zeros. DeepSpeed 0.19 links them to parameters when the first group has
        stepped, and would not see those of the other groups.
        """
        for _, tensors in self._updated_tensors():
            self._base_optimizer.create_state(tensors)
        self._set_applied_steps(0)  # DeepSpeed makes a step of its own under stage 0 in half precision
        if self.stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _updated_tensors(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Each group with the tensors that the optimizer updates, parameters or flat pieces of them."""
        groups = self._base_optimizer.param_groups
        if self.stage < 3:
            yield from ((group, group["params"]) for group in groups)
            return
        optimizer = self._engine.optimizer  # the base optimizer's groups are empty between steps
        for number, tensor in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield groups[optimizer.sub_group_to_group_id[number]], [tensor]

    def _set_applied_steps(self, applied_steps: int) -> None:
        """Under two_stage each network counts from its own first update."""
        for group, tensors in self._updated_tensors():
            steps = applied_steps
            if group["part"] == "generator":
                steps = min(applied_steps, self._generator_steps)
            elif group["part"] == "discriminator":
                steps = max(0, applied_steps - self._generator_steps)
            self._base_optimizer.set_applied_steps(tensors, steps)

    def _find_fragments(self) -> list[Fragment]:
        fragments: list[Fragment | None] = []
        for name, parameter in self._parameters.items():
            if self.stage == 0:
                fragments.append(whole(name, parameter, self._master(parameter)))
            elif self.stage == 3:
                fragments.append(in_sub_group(name, parameter, self._engine.optimizer, self._engine.global_rank))
            else:
                fragments.append(in_flat_group(name, parameter, self._base_optimizer.param_groups))
        return [fragment for fragment in fragments if fragment]

    def _sum_over_pieces(self) -> Callable[[Tensor], Any] | None:
        """Sums over the processes that hold pieces; None where each holds everything."""
        return torch.distributed.all_reduce if self.stage > 0 and self._world_size > 1 else None

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

        self.before_change()
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
        lows, highs = (chain.from_iterable(groups) for groups in (optimizer.fp16_groups, optimizer.fp32_groups))
        return next(high for low, high in zip(lows, highs, strict=True) if low is parameter)


def _import_deepspeed() -> Any:
    """DeepSpeed without what costs seconds at each start, or a minute at the first, and serves nothing here."""
    without_mlflow = "mlflow" not in sys.modules  # its autotuner would import it, and does without
    if without_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    # torch would import its compiler in order to tell it to leave these alone.
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
        plain: Any = getattr(method, "__wrapped__", method)
        plain.__dynamo_disable = plain
    try:
        import deepspeed
        from deepspeed.runtime import bf16_optimizer, compiler, engine
    finally:
        if without_mlflow:
            del sys.modules["mlflow"]
    from deepspeed.utils import logger as deepspeed_logger

    # In the first step it imports Muon, to tell that our optimizer is another; that one would be compiled.
    with mock.patch.object(compiler, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed_logger.setLevel("WARNING")
    # Its shared-memory all-reduce is compiled at first use, and serves one host only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Half a second of collecting garbage for every group, and lines that nobody asked for.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    engine.is_zero_supported_optimizer = lambda _: True  # it would say that ours is not on its list
    return deepspeed
