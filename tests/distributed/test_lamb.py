"""LAMB against a plain one, and the engine under every ZeRO stage on one process and on two.

Stages cut parameters differently, so LAMB's norms, the norms that are logged, freezing and copies of weights
are held against one another across them. ``engine_worker`` is its processes.
"""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.lamb import ElectraLamb, Segment
from tests.conftest import REPOSITORY, clean_environment
from tests.distributed.engine_worker import target

pytestmark = pytest.mark.distributed

STAGES = (0, 1, 2, 3)
CORRECTED = {"bias_correction": True}
LAMB = {"name": "lamb", "bias_correction": True, "betas": [0.878, 0.974]}
IN_TURN = ["generator"] * 3 + ["discriminator"] * 4


def cases(world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        case = {"stage": stage}
        found[f"adamw-{stage}"] = case | {"steps": 3}
        found[f"lamb-{stage}"] = case | {"optimizer": LAMB}
        found[f"clip-{stage}"] = case | {"scale": 1000.0, "steps": 1}
        if world_size == 2:
            found[f"copy-{stage}"] = case | {"does": "copy"}
            for precision in ("fp32", "bf16"):
                found[f"frozen-{stage}-{precision}"] = case | {
                    "precision": precision, "two_stage": True, "trains": IN_TURN, "keeps_states": True,
                    "optimizer": CORRECTED,
                }  # fmt: skip
    found["adamw-bf16-1"] = {"stage": 1, "precision": "bf16", "steps": 3}
    found["adamw-bf16-0"] = {"stage": 0, "precision": "bf16", "steps": 3}
    found["resume-lamb"] = {"stage": 3, "does": "resume", "optimizer": LAMB}
    in_turn = {"two_stage": True, "trains": IN_TURN + ["discriminator"] * 3}
    found["resume-in-turn"] = in_turn | {"stage": 2, "does": "resume", "optimizer": CORRECTED}
    found["resume-bf16"] = {"stage": 0, "precision": "bf16", "does": "resume", "optimizer": CORRECTED}
    file = folder / "sub_groups.json"  # stage 3 then updates a few parameters at a time
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 40}}))
    found["lamb-sub_groups"] = {"stage": 3, "optimizer": LAMB, "deepspeed": str(file)}
    layer_wise = {"layer_decay": 0.5, "lr": 0.01} | CORRECTED
    found["layer-wise-3"] = {"stage": 3, "steps": 1, "keeps_states": True, "optimizer": layer_wise}
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What happened to each case, by number of processes."""
    folder = tmp_path_factory.mktemp("worlds")
    asked = {size: cases(size, folder) for size in (1, 2)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.engine_worker", str(folder), json.dumps(asked)],
        env=clean_environment(OMP_NUM_THREADS="1"), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=400)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, said[-4000:]
    return {size: json.loads((folder / f"{size}.json").read_text()) for size in asked}


@pytest.fixture(scope="module")
def one(worlds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return worlds[1]


@pytest.fixture(scope="module")
def two(worlds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return worlds[2]


def plain_lamb(weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], lr: float, corrected: bool) -> None:
    """Algorithm 2 of You et al. in float64; the last tensor stands for a bias."""
    beta1, beta2, eps, decay = 0.878, 0.974, 1e-6, 0.01
    for number, weight in enumerate(weights):
        is_bias = number == len(weights) - 1
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step, gradient in enumerate((step[number] for step in gradients), start=1):
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient**2
            by = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
            direction = (mean / by[0]) / ((square / by[1]).sqrt() + eps)
            if is_bias:
                weight -= lr * direction
                continue
            direction = direction + decay * weight
            ratio = weight.norm() / direction.norm() if weight.norm() > 0 and direction.norm() > 0 else 1.0
            weight -= lr * ratio * direction


SHAPES = [(5, 3), (7,), (4, 4), (6,)]  # the last is a bias, the third starts at 0


def made_tensors(steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    weights[2].zero_()
    return weights, [[torch.randn(s, generator=draw, dtype=torch.float64) for s in SHAPES] for _ in range(steps)]


def make_lamb(decayed: list[torch.Tensor], others: list[torch.Tensor], corrected: bool) -> ElectraLamb:
    groups = [
        {"params": decayed, "weight_decay": 0.01, "decays": True},
        {"params": others, "weight_decay": 0.0, "decays": False},
    ]
    lamb = ElectraLamb(groups, (0.878, 0.974), 1e-6, 0.01, corrected)
    for group in lamb.param_groups:
        group["lr"] = 0.02
    return lamb


@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_is_the_plain_one(corrected: bool) -> None:
    weights, gradients = made_tensors(5)
    parameters = [torch.nn.Parameter(weight.float()) for weight in weights]
    lamb = make_lamb(parameters[:-1], parameters[-1:], corrected)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.float()
        lamb.step()
    plain_lamb(weights, gradients, 0.02, corrected)
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_lamb_on_pieces_is_lamb_on_whole_tensors() -> None:
    # One flat tensor of the three that decay and two elements of padding, as two processes hold it.
    weights, gradients = made_tensors(5)
    flat = [torch.cat([t.flatten() for t in ts[:3]] + [torch.zeros(2)]).float() for ts in (weights, *gradients)]
    halves = [torch.nn.Parameter(part.clone()) for part in flat[0].chunk(2)]  # of 20: 15 + 5, and 2 + 16 + padding
    lamb = make_lamb(halves, [], True)
    table = {halves[0]: [Segment(0, 0, 15), Segment(1, 15, 5)], halves[1]: [Segment(1, 0, 2), Segment(2, 2, 16)]}
    lamb.set_segments(table, 3, None)
    for step in flat[1:]:
        for half, gradient in zip(halves, step.chunk(2), strict=True):
            half.grad = gradient
        lamb.step()
    plain_lamb(weights, gradients, 0.02, True)
    expected = torch.cat([weight.flatten() for weight in weights[:3]] + [torch.zeros(2)])
    torch.testing.assert_close(torch.cat([h.detach() for h in halves]).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_group_keeps_weights_and_moments() -> None:
    weights, gradients = made_tensors(1)
    parameters = [torch.nn.Parameter(weight.float()) for weight in weights]
    lamb = make_lamb(parameters[:-1], parameters[-1:], True)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient.float()
    lamb.param_groups[0]["frozen"] = True
    lamb.step()
    assert all(torch.equal(p.detach(), w.float()) for p, w in zip(parameters[:-1], weights[:-1], strict=True))
    assert not torch.equal(parameters[-1].detach(), weights[-1].float())
    assert set(lamb.state) == {parameters[-1]}


@pytest.mark.parametrize("stage", [*STAGES, "sub_groups"])
@pytest.mark.parametrize("processes", [1, 2])
def test_lamb_agrees_under_every_stage(one: dict, two: dict, stage: int | str, processes: int) -> None:
    found, expected = (one, two)[processes - 1][f"lamb-{stage}"], one["lamb-0"]
    for a, b in zip(expected["steps"], found["steps"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-5)
    assert_close(expected["states"][-1], found["states"][-1], "weight", 1e-5)
    assert expected["steps"][-1]["loss"] < expected["steps"][0]["loss"]


@pytest.mark.parametrize("case", ["resume-lamb", "resume-in-turn", "resume-bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_is_bitwise_the_same(one: dict, two: dict, case: str, processes: int) -> None:
    found = (one, two)[processes - 1][case]
    assert found["whole"] == found["resumed"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", [1, 2])
def test_norms_of_parts_make_up_the_norm(one: dict, two: dict, stage: int, processes: int) -> None:
    found, expected = (one, two)[processes - 1][f"adamw-{stage}"], one["adamw-0"]
    for a, b in zip(expected["steps"], found["steps"], strict=True):
        parts = [b[f"train/grad_norm_{part}"] for part in ("embeddings", "generator", "discriminator")]
        assert math.hypot(*parts) == pytest.approx(b["norm"], rel=1e-6)
        for name in [name for name in a if name.startswith("train/")]:
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
    first = expected["states"][0]
    squares = [x * x for name, values in first.items() if name.startswith("weight/generator.") for x in values]
    squares += [x * x for name, values in first.items() if name.startswith("weight/generator_head") for x in values]
    assert expected["steps"][0]["train/parameter_norm_generator"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


@pytest.mark.parametrize("case", ["adamw-bf16-0", "adamw-bf16-1"])
@pytest.mark.parametrize("processes", [1, 2])
def test_norms_of_parts_in_bf16(one: dict, two: dict, case: str, processes: int) -> None:
    for step in (one, two)[processes - 1][case]["steps"]:
        parts = [step[f"train/grad_norm_{part}"] for part in ("embeddings", "generator", "discriminator")]
        assert math.hypot(*parts) == pytest.approx(step["norm"], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_are_clipped_by_the_norm_over_all_processes(one: dict, two: dict, stage: int, processes: int) -> None:
    found, expected = (one, two)[processes - 1][f"clip-{stage}"], one["clip-0"]
    assert found["steps"][0]["norm"] == pytest.approx(expected["steps"][0]["norm"], rel=1e-6)
    assert found["steps"][0]["norm"] > 100
    squares = [x * x for name, values in found["states"][-1].items() if name.startswith("exp_avg/") for x in values]
    assert math.sqrt(sum(squares)) == pytest.approx(0.1 * 1.0, rel=1e-4)  # (1 - beta1) of a gradient of norm 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_network_stays_as_it_is(two: dict, stage: int, precision: str) -> None:
    states = two[f"frozen-{stage}-{precision}"]["states"]
    for number, trains in enumerate(IN_TURN):
        for name, before in states[number].items():
            part = "generator" if "/generator" in name else "discriminator"
            if part != trains:
                assert states[number + 1][name] == before, (number, name)
            elif name.startswith("weight/"):
                assert states[number + 1][name] != before, (number, name)
    # With bias correction the first update of an element is the learning rate, if steps are counted from it.
    for number, part in ((0, "generator_head"), (3, "discriminator_head")):
        before, after = (states[n][f"weight/{part}.weight"] for n in (number, number + 1))
        changes = [abs(a - b) for a, b in zip(after, before, strict=True)]
        assert changes == pytest.approx([0.01] * len(changes), rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_copied_and_set(two: dict, stage: int) -> None:
    found = two[f"copy-{stage}"]
    before, after = found["before"], found["after"]
    sources = [name for name in before if name.startswith("weight/generator")]
    for name in sources:
        assert after[target(name)] == before[name]
        assert after[name] == ([0.25] * 3 if name == "weight/generator_head.bias" else before[name])
    assert {n: v for n, v in after.items() if n[:3] == "exp"} == {n: v for n, v in before.items() if n[:3] == "exp"}
    # What forward reads was set too: the outputs differ by the one bias that does.
    bias = before["weight/generator_head.bias"]
    expected = [0.25 - value for value in bias] * (len(found["difference"]) // 3)
    assert found["difference"] == pytest.approx(expected, abs=1e-5)


def test_layer_wise_rates_under_stage_3(two: dict) -> None:
    before, after = two["layer-wise-3"]["states"][:2]
    for name, exponent in {
        "discriminator_head.weight": 0, "discriminator.layers.1.0.weight": 1, "generator.layers.0.0.weight": 2,
        "embeddings.layer_norm.bias": 3, "generator.embeddings_project.bias": 3,
    }.items():  # fmt: skip
        changes = [abs(a - b) for a, b in zip(after[f"weight/{name}"], before[f"weight/{name}"], strict=True)]
        assert changes == pytest.approx([0.01 * 0.5**exponent] * len(changes), rel=0.05)


def assert_close(one: dict, other: dict, kind: str, absolute: float) -> None:
    assert one.keys() == other.keys()
    for name in [name for name in one if name.startswith(f"{kind}/")]:
        assert other[name] == pytest.approx(one[name], abs=absolute), name
