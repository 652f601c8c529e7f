"""Kernels and layers as a run has them: what is refused, kept, announced, compiled, made again."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from model.batch import GlobalCounts
from model.electra import Electra as Model
from model.encoder import Encoder
from model.kernels.select import OPERATIONS, select_kernels
from pipeline import bench, devices
from pipeline.batches import MicroBatches
from pipeline.bench import SyntheticRows, kernel_choices
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.devices import choose_kernels, prepare_layers
from pipeline.distributed import Process
from pipeline.errors import ConfigError
from pipeline.plan import make_plan
from tests.conftest import Electra, clean_environment


def record_of(config_path: Path, name: str) -> Path:
    return config_path.parent / "out" / "runs" / name / "pretrain" / "stage.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_backend_that_cannot_run_here_ends_the_stage_at_once(shared_config, electra: Electra):
    name = "run.name=kernels-refused"
    electra("tokenize", shared_config, name)
    message = electra("pretrain", shared_config, name, "kernels.backend=triton", code=78).stderr
    assert "kernels.backend=triton does not work here: Triton kernels need a GPU" in message
    assert message.strip().endswith("or set kernels.backend=auto")


def test_a_run_keeps_its_kernels_and_says_when_it_cannot(shared_config, electra: Electra):
    """Attempts under stored names that ``auto`` would not choose: one there is, one is gone, and tried each time."""
    name, short = "run.name=kernels-kept", "train.stop_after_seconds=0.001"
    electra("tokenize", shared_config, name)
    first = electra("pretrain", shared_config, name, short, code=85).stderr
    for operation in OPERATIONS:
        assert f"kernel of {operation}".ljust(32) + " torch (Triton and apex need" in first
    path = record_of(shared_config, "kernels-kept")
    record = json.loads(path.read_text())
    assert record["numerics"]["kernels"] == record["numerics"]["kernels_kept"] == dict.fromkeys(OPERATIONS, "torch")
    assert record["numerics"]["compile_layers"] is False
    for names in ("kernels", "kernels_kept"):
        record["numerics"][names] |= {"add_norm": "reference", "embed": "triton"}
    path.write_text(json.dumps(record))

    second = electra("pretrain", shared_config, name, short, code=85).stderr
    assert "kernel of add_norm".ljust(32) + " reference (kept from the run's first attempt)" in second
    assert "kernel of embed runs on torch: Triton kernels need a GPU" in second
    (changed,) = [line for line in second.splitlines() if "results agree to rounding, not bitwise" in line]
    assert "kernels changed from" in changed
    assert "'embed': 'triton'" in changed
    now = json.loads(path.read_text())["numerics"]["kernels"]
    assert now == dict.fromkeys(OPERATIONS, "torch") | {"add_norm": "reference"}

    third = electra("pretrain", shared_config, name, short, code=85).stderr
    assert "kernel of embed runs on torch: Triton kernels need a GPU" in third
    assert "results agree to rounding, not bitwise" not in third


def test_what_is_broken_is_warned_of(config_path, monkeypatch):
    kernels = dataclasses.replace(select_kernels(), warnings=("embed runs on torch: triton's embed fails",))
    said: list[str] = []
    monkeypatch.setattr(devices, "select_kernels", lambda *_: kernels)
    monkeypatch.setattr(devices.logger, "warning", lambda text, *values: said.append(text % values))
    assert choose_kernels(load_config(config_path), "cpu") == kernels
    assert said == ["kernel of embed runs on torch: triton's embed fails"]


def test_only_different_choices_that_work_are_measured(config_path, monkeypatch):
    """On a GPU, say: triton for all, or by auto for all but one; no apex."""

    def choose(config: Config, device: str, backend: str) -> Any:
        del config
        assert device == "cuda"
        if backend == "apex":
            raise ConfigError("apex is not installed")
        base = select_kernels()
        changed = {"triton": list(OPERATIONS), "auto": list(OPERATIONS)[:-1]}.get(backend, [])
        return dataclasses.replace(base, names=base.names | dict.fromkeys(changed, "triton"))

    monkeypatch.setattr(bench, "choose_kernels", choose)
    found = kernel_choices(load_config(config_path), "cuda")
    assert [choice.overrides for choice in found] == [f"kernels.backend={name}" for name in ("torch", "triton", "auto")]


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_shows_what_works_and_what_auto_takes(electra: Electra, as_json):
    said = electra("doctor", *["--json"] * as_json, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").stdout
    if not as_json:
        assert "torch".ljust(32) + f" {torch.__version__}" in said
        assert "embed by torch".ljust(32) + " works  <- auto (Triton and apex need a GPU)" in said
        assert "embed by triton".ljust(32) + " Triton kernels need a GPU" in said
        assert said.count("<- auto") == len(OPERATIONS)
        return
    found = json.loads(said)
    assert (found["device"], found["devices"], found["warnings"]) == ("cpu", [], [])
    taken = {kernel["operation"]: kernel["backend"] for kernel in found["kernels"] if kernel["auto"]}
    assert taken == dict.fromkeys(OPERATIONS, "torch")


def test_doctor_is_in_the_help_without_torch():
    code = "import sys; from pipeline.cli import cli; assert 'doctor' in cli.commands and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=clean_environment(), check=True)


def gradients(config: Config, steps: int = 2) -> dict[str, torch.Tensor]:
    """Of some micro-batches, dropout included."""
    torch.manual_seed(3)
    plan = make_plan(config, 1)
    model = Model(config.model, config.objective, plan.vocab_size, choose_kernels(config, "cpu"))
    prepare_layers(config, model)
    rows: Any = SyntheticRows(config)
    source = MicroBatches(config, plan, Process(), rows, "cpu")
    for step in range(steps):
        for _, batch in source.of_step(step):
            model(batch, GlobalCounts(10.0, 100.0))[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_activations_made_again_give_the_same_gradients_to_the_bit(config_path, monkeypatch):
    calls = []
    monkeypatch.setattr("model.encoder.checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    plain = gradients(load_config(config_path))
    assert not calls
    again = gradients(load_config(config_path, ("train.activation_checkpointing=true",)))
    assert len(calls) == 2 * 4 * 2 * 2  # steps, micro-batches, networks, layers
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("checkpoints", ["false", "true"])
def test_layers_compile_once_for_each_network_without_a_graph_break(config_path, monkeypatch, tmp_path, checkpoints):
    """By a compiler that runs the graph as it is, so that numbers stay near."""
    compiler = CompileCounter()
    whole = functools.partial(torch.compile, backend=compiler, fullgraph=True)
    plain = gradients(load_config(config_path))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", whole)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_somebody")  # as torch does by itself
    overrides = ("kernels.compile_layers=true", f"train.activation_checkpointing={checkpoints}")
    compiled = gradients(load_config(config_path, overrides))
    assert devices.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "out" / ".inductor")
    assert compiler.frame_count == 2  # the generator is smaller; layers of a network share theirs
    for name in plain:
        scale = float(plain[name].abs().max())
        torch.testing.assert_close(compiled[name], plain[name], rtol=0, atol=1e-5 * scale + 1e-8)


def test_the_compiler_gets_plain_operations_unless_a_backend_is_asked_for(config_path, monkeypatch):
    base = select_kernels()
    others: Any = {"names": dict.fromkeys(OPERATIONS, "triton"), "add_norm": print, "embed": print}
    other = dataclasses.replace(base, **others)
    monkeypatch.setattr(devices, "select_kernels", lambda *_: other)
    found = choose_kernels(load_config(config_path, ("kernels.compile_layers=true",)), "cpu")
    assert found.names == other.names | {"add_norm": "torch", "bias_gelu": "torch"}
    assert found.add_norm is base.add_norm
    assert found.embed is print
    assert "kernels.compile_layers" in found.reasons["bias_gelu"]
    asked = load_config(config_path, ("kernels.compile_layers=true", "kernels.backend=triton"))
    with pytest.raises(ConfigError, match=r"compile_layers=true fuses .* and kernels.backend=triton"):
        choose_kernels(asked, "cpu")


def test_without_either_key_layers_are_left_alone(config_path):
    config = load_config(config_path)
    model = Model(config.model, config.objective, 300, select_kernels())
    prepare_layers(config, model)
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    assert len(encoders) == 2
    assert not any(encoder.checkpoints_activations for encoder in encoders)
    assert not any("after_attention" in vars(layer) for encoder in encoders for layer in encoder.layers)
