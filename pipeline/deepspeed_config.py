"""The dictionary that DeepSpeed gets: every value that the engine relies on is in it.

Users bring a JSON for what is DeepSpeed's own business (ZeRO stage, buckets).
Batch sizes, precision, clipping and the optimizer belong to the YAML;
the JSON may leave them out, say "auto", or repeat them. It may not contradict.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config import flatten as flatten_tree
from pipeline.errors import ConfigError
from pipeline.plan import Plan

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def read_deepspeed_json(path: Path | None) -> dict[str, Any]:
    """The user's JSON, or the default.

    Raises:
        ConfigError: No such file, not a JSON object, or a value that DeepSpeed would stumble over.
    """
    if path is None:
        return DEFAULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"deepspeed.config={path}: no such file; configs/deepspeed has one for each stage") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed.config={path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed.config={path}: must be a JSON object")
    for section in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types"):
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(f"deepspeed.config={path}: {section}={content[section]!r} must be a JSON object")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.config={path}: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    _check_buckets(content.get("zero_optimization", {}), path)
    for key in content.get("zero_optimization", {}):
        if key.startswith("offload_") or key == "cpu_offload":
            raise ConfigError(
                f"deepspeed.config={path}: zero_optimization.{key} is not supported: ELECTRA's states fit on the GPU; "
                "remove it"
            )
    if content.get("zero_optimization", {}).get("round_robin_gradients") is True:
        raise ConfigError(
            f"deepspeed.config={path}: zero_optimization.round_robin_gradients is not supported: with several "
            "processes DeepSpeed 0.19 then takes one parameter's weights for another's, and checkpoints would be "
            "wrong; remove it"
        )
    return content


def _check_buckets(zero: dict[str, Any], path: Path) -> None:
    """DeepSpeed takes 5e8 for a whole number, and null for ``overlap_comm``: true under stage 3."""
    size, overlap = zero.get("reduce_bucket_size", "auto"), zero.get("overlap_comm", "auto")
    is_count = type(size) is int or (type(size) is float and size.is_integer())
    if size != "auto" and not (is_count and size >= 1):
        raise ConfigError(
            f"deepspeed.config={path}: zero_optimization.reduce_bucket_size={size!r} must be a whole number of "
            "elements, at least 1; DeepSpeed's own is 5e8"
        )
    if overlap not in ("auto", None) and type(overlap) is not bool:
        raise ConfigError(
            f"deepspeed.config={path}: zero_optimization.overlap_comm={overlap!r} must be true, false or null"
        )


def zero_stage(deepspeed_json: dict[str, Any]) -> int:
    """ZeRO stage, 0 to 3."""
    return int(deepspeed_json.get("zero_optimization", {}).get("stage", 0))


def build_deepspeed_config(config: Config, plan: Plan) -> dict[str, Any]:
    """Merges the user's JSON with what the engine relies on.

    Raises:
        ConfigError: The JSON says something else than the YAML.
    """
    given = read_deepspeed_json(config.deepspeed.config)
    _reject_foreign_optimizer(given, config)
    stage = zero_stage(given)
    merged = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler")}
    for dotted, value in _relied_on(config, plan, stage).items():
        stated = config.optimizer.gradient_clip if dotted == "gradient_clipping" else value
        _fill(merged, dotted, value, stated, str(config.deepspeed.config))
    leftover = [key for key, value in flatten_tree(merged).items() if value == "auto"]
    if leftover:
        raise ConfigError(f"deepspeed.config={config.deepspeed.config}: {leftover[0]} may not be auto; give a value")
    return merged


def _relied_on(config: Config, plan: Plan, stage: int) -> dict[str, Any]:
    precision = config.train.precision
    # Stage 0 in fp32 neither reports the norm nor skips NaN, so the engine does both itself.
    clips_itself = stage == 0 and precision == "fp32"
    accumulation_dtype = precision if stage == 0 else "fp32"
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "train_batch_size": plan.micro_batch_rows * plan.accumulation_steps * plan.world_size,
        "gradient_clipping": 0.0 if clips_itself else config.optimizer.gradient_clip,
        "bf16.enabled": precision == "bf16",
        "bf16.check_grad_overflow": True,  # else ZeRO 1 and 2 apply gradients with NaN in bf16
        "fp16.enabled": precision == "fp16",
        "data_types.grad_accum_dtype": accumulation_dtype,
        # Else bf16 gradients are summed over processes in bf16, and the result depends on their number.
        "communication_data_type": "fp32",
        "zero_optimization.stage": stage,
        "zero_allow_untested_optimizer": True,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def _fill(merged: dict[str, Any], dotted: str, value: Any, stated: Any, file: str) -> None:
    """Sets a key; ``stated`` is what the YAML says, which the JSON may repeat."""
    *sections, key = dotted.split(".")
    target = merged
    for section in sections:
        target[section] = dict(target.get(section, {}))
        target = target[section]
    given = target.get(key, "auto")
    if given not in ("auto", stated):
        raise ConfigError(
            f"deepspeed.config={file}: {dotted}={given!r} contradicts {stated!r}, which follows from the run's "
            'config; remove it there, or write "auto"'
        )
    target[key] = value


def _reject_foreign_optimizer(given: dict[str, Any], config: Config) -> None:
    expected = {
        "lr": config.optimizer.lr, "betas": list(config.optimizer.betas), "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay, "bias_correction": config.optimizer.bias_correction,
    }  # fmt: skip
    optimizer = given.get("optimizer", {})
    if str(optimizer.get("type", "auto")).lower() not in ("auto", config.optimizer.name):
        raise ConfigError(
            f"deepspeed.config: optimizer.type={optimizer['type']!r} contradicts "
            f"optimizer.name={config.optimizer.name}; the optimizer belongs to the run's config: set it there, and "
            'remove it here, or write "auto"'
        )
    for key, value in optimizer.get("params", {}).items():
        if value != "auto" and value != expected.get(key):
            raise ConfigError(
                f"deepspeed.config: optimizer.params.{key}={value!r} contradicts the run's config "
                f'({expected.get(key, "no such key")!r}); remove it, or write "auto"'
            )
    if "scheduler" in given:
        raise ConfigError("deepspeed.config: scheduler is not allowed; optimizer.schedule of the run's config has it")
