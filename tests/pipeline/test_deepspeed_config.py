"""The emitted dictionary, key by key, and contradictions."""

import json
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.deepspeed_config import build_deepspeed_config
from pipeline.errors import ConfigError
from pipeline.plan import make_plan
from tests.conftest import REPOSITORY


def build(config_path: Path, *overrides: str, world_size: int = 2) -> dict:
    config = load_config(config_path, overrides)
    return build_deepspeed_config(config, make_plan(config, world_size))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_value_relied_on_is_emitted(config_path: Path, stage: int, precision: str) -> None:
    file = REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json"
    emitted = build(config_path, f"deepspeed.config={file}", f"train.precision={precision}")
    own_clipping = stage == 0 and precision == "fp32"
    expected = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 8,
        "gradient_clipping": 0.0 if own_clipping else 1.0,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": precision if stage == 0 else "fp32"},
        "zero_allow_untested_optimizer": True,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
    zero = emitted.pop("zero_optimization")
    assert zero["stage"] == stage
    assert emitted == expected
    assert "auto" not in json.dumps(emitted)


def test_default_is_stage_1(config_path: Path) -> None:
    assert build(config_path)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 9}, r"train_batch_size=9 contradicts 8"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping=0.5 contradicts 1.0"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled=True contradicts False"),
        ({"bf16": {"check_grad_overflow": False}}, r"bf16\.check_grad_overflow=False contradicts True"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type='Lamb' contradicts optimizer\.name=adamw"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"optimizer\.params\.lr=0\.1 contradicts"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler is not allowed"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, r"reduce_bucket_size may not be auto"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, r"round_robin_gradients is not supported"),
        ([], r"must be a JSON object"),
    ],
)
def test_contradiction_is_an_error(config_path: Path, tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        build(config_path, f"deepspeed.config={file}")


def test_repeating_the_yaml_is_fine(config_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    params = {"lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": "auto"}
    file.write_text(json.dumps({
        "train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": params},
    }))  # fmt: skip
    emitted = build(config_path, f"deepspeed.config={file}")
    assert "optimizer" not in emitted


@pytest.mark.parametrize(("given", "name"), [("Lamb", "lamb"), ("lamb", "lamb"), ("AdamW", "adamw"), ("auto", "lamb")])
def test_the_json_may_name_the_optimizer(config_path: Path, tmp_path: Path, given: str, name: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": given}}))
    assert "optimizer" not in build(config_path, f"deepspeed.config={file}", f"optimizer.name={name}")


@pytest.mark.parametrize(("given", "name"), [("AdamW", "lamb"), ("Lamb", "adamw"), ("OneBitLamb", "lamb")])
def test_another_optimizer_than_the_yamls_is_an_error(config_path: Path, tmp_path: Path, given: str, name: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": given}}))
    with pytest.raises(ConfigError, match=rf"optimizer\.type='{given}' contradicts optimizer\.name={name}.*remove it"):
        build(config_path, f"deepspeed.config={file}", f"optimizer.name={name}")


def test_missing_or_broken_file(config_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        build(config_path, f"deepspeed.config={tmp_path / 'absent.json'}")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        build(config_path, f"deepspeed.config={tmp_path / 'broken.json'}")
