"""Parameter groups: who decays, which layer has which rate, and what is frozen."""

from typing import Any

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.kernels.adamw import ADAMW, AdamW
from pipeline.config import Config, EvaluateConfig
from pipeline.evaluation.finetune import layer_learning_rates
from pipeline.evaluation.recipes import recipes_for
from pipeline.evaluation.task_file import TaskConfig
from pipeline.optimizer import ElectraAdamW, layer_exponents, parameter_groups, part_of

NAMES = [
    "embeddings.token.weight", "embeddings.layer_norm.weight", "embeddings.token_difference.weight",
    "generator_embeddings.token.weight", "generator.embeddings_project.bias", "generator.layers.0.output.weight",
    "generator.layers.1.layer_norm.bias", "generator_head.dense.weight", "discriminator.embeddings_project.weight",
    "discriminator.layers.0.query.bias", "discriminator.layers.1.query.weight", "discriminator.layers.2.query.weight",
    "discriminator_head.output.bias", "prediction_head.dense.weight", "copy_gate.weight", "baseline.weight",
]  # fmt: skip


class Named(nn.Module):
    """A parameter of one element for each name."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.by_name = {name: nn.Parameter(torch.ones(1)) for name in names}

    def named_parameters(self, *_: Any, **__: Any):
        return iter(self.by_name.items())


def make_config(objective: dict[str, Any] | None = None, **optimizer: Any) -> Config:
    return Config.model_validate({
        "data": {"corpora": [{"name": "none", "path": "none"}]},
        "model": {"size": "tiny", "generator_width": 1, "generator_depth": 1},
        "objective": objective or {},
        "train": {"steps": 10, "global_batch_size": 1},
        "optimizer": {"lr": 1e-3} | optimizer,
    })  # fmt: skip


def names_of(model: Named, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.by_name.items()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_by_default_there_are_two_groups_in_the_models_order() -> None:
    model = Named(NAMES)
    decayed, plain = parameter_groups(model, make_config(weight_decay=0.1))
    assert names_of(model, plain) == [name for name in NAMES if "layer_norm" in name or "bias" in name]
    assert names_of(model, decayed) == [name for name in NAMES if "layer_norm" not in name and "bias" not in name]
    expected = {"part": "both", "lr_scale": 1.0, "frozen": False}
    assert {key: value for key, value in decayed.items() if key != "params"} == expected | {
        "weight_decay": 0.1, "decays": True,
    }  # fmt: skip
    assert {key: value for key, value in plain.items() if key != "params"} == expected | {
        "weight_decay": 0.0, "decays": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("fixed", (4, 4, 4, 3, 3, 2, 1, 0, 4, 3, 2, 1, 0, 0, 0, 0)),
        ("released", (5, 5, 5, 4, 4, 3, 2, 0, 5, 4, 3, 2, 0, 0, 0, 0)),
    ],
)
def test_depth_by_layers_of_the_network_itself(depth: Any, expected: tuple[int, ...]) -> None:
    assert tuple(layer_exponents(NAMES, depth).values()) == expected  # generator: two layers, discriminator: three


@pytest.mark.parametrize("depth", ["fixed", "released"])
def test_layer_wise_rates(depth: Any) -> None:
    model = Named(NAMES)
    exponents = layer_exponents(NAMES, depth)
    groups = parameter_groups(model, make_config(layer_decay=0.5, layer_decay_depth=depth))
    found = {name: group["lr_scale"] for group in groups for name in names_of(model, group)}
    assert found == {name: 0.5 ** exponents[name] for name in NAMES}
    assert len({(group["lr_scale"], group["decays"]) for group in groups}) == len(groups)


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.9}])
def test_two_stage_divides_the_networks(settings: dict[str, float]) -> None:
    model = Named(NAMES)
    groups = parameter_groups(model, make_config({"training": "two_stage"}, **settings))
    for group in groups:
        assert {part_of(name) for name in names_of(model, group)} == {group["part"]}
    found = sorted(name for group in groups for name in names_of(model, group))
    assert found == sorted(NAMES)
    assert len(groups) == 4 or settings


def test_parts_by_name() -> None:
    generators = [name for name in NAMES if part_of(name) == "generator"]
    assert generators == [name for name in NAMES if name.startswith("generator") or name == "baseline.weight"]


@pytest.mark.parametrize("corrected", [True, False])
def test_a_frozen_group_keeps_weights_moments_and_step_count(corrected: bool) -> None:
    model = Named(["generator_head.weight", "discriminator_head.weight"])
    generator, discriminator = model.by_name.values()
    groups = parameter_groups(model, make_config({"training": "two_stage"}))
    optimizer = ElectraAdamW(groups, (0.9, 0.999), 1e-6, 0.01, corrected)
    optimizer.create_state([generator, discriminator])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        group["frozen"] = group["part"] == "discriminator"
    before = {key: value.clone() for key, value in optimizer.state[discriminator].items()}
    for _ in range(3):
        generator.grad, discriminator.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
    assert discriminator.item() == 1
    assert {k: v.item() for k, v in optimizer.state[discriminator].items()} == {k: v.item() for k, v in before.items()}
    assert generator.item() != 1
    assert all(len(group["params"]) == 1 for group in optimizer.param_groups)
    if corrected:
        assert optimizer.state[generator]["step"] == 3
        optimizer.set_applied_steps([discriminator], 2)
        assert optimizer.state[generator]["step"] == 3
        assert optimizer.state[discriminator]["step"] == 2


@pytest.mark.parametrize("corrected", [True, False])
def test_adamw_is_torchs_to_the_last_bit(corrected: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=draw) for size in (5, 300, 7)]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizer = ElectraAdamW(
        [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:]}], (0.9, 0.98), 1e-6, 0.0, corrected
    )
    peer = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:]}],
        0.0, (0.9, 0.98), 1e-6, 0.0, fused=True,
    )  # fmt: skip
    for number in range(5):
        for mine, other in zip(ours[number == 3 :], theirs[number == 3 :], strict=True):  # once without the first
            mine.grad = torch.randn(mine.shape, generator=draw)
            other.grad = mine.grad.clone()
        for group in optimizer.param_groups + peer.param_groups:
            group["lr"] = 0.1 / (1 + number)
        optimizer.step()
        peer.step()
        if number == 0 and not corrected:  # the same rule from here on: so late a step has no correction
            for state in peer.state.values():
                state["step"].fill_(1e9)
            with torch.no_grad():
                for mine, other in zip(ours, theirs, strict=True):
                    assert not torch.equal(mine, other)
                    other.copy_(mine)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[mine][moment], peer.state[other][moment])
        optimizer.zero_grad()
        peer.zero_grad()


def test_adamw_runs_the_kernel_that_it_is_given() -> None:
    draw = torch.Generator().manual_seed(0)
    results = []
    start, gradient = (torch.randn(300, generator=draw) for _ in range(2))
    for kernel in ADAMW.values():
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        calls: list[int] = []

        def counted(*arguments: Any, kernel: AdamW = kernel, calls: list[int] = calls) -> None:
            calls.append(len(arguments[0]))
            kernel(*arguments)

        optimizer = ElectraAdamW([{"params": [parameter]}], (0.9, 0.98), 1e-6, 0.1, False, counted)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert calls == [1]
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize(("depth", "extra"), [("fixed", 0), ("released", 1)])
def test_fine_tuning_counts_depth_in_the_same_way(depth: Any, extra: int) -> None:
    model = Named([name for name in NAMES if name.startswith(("embeddings", "discriminator."))] + ["head.weight"])
    task = TaskConfig.model_validate({"name": "t", "kind": "pair", "train": "a", "dev": "b", "text": ["a", "b"]})
    evaluate = EvaluateConfig(lr=3e-4, layer_decay=0.8, layer_decay_depth=depth)  # type: ignore[call-arg]
    groups = layer_learning_rates(model, recipes_for(evaluate, task, ModelConfig(size="small"))[""])  # type: ignore
    rates = {name: group["peak_lr"] for group in groups for name in names_of(model, group)}
    assert rates["head.weight"] == 3e-4
    assert rates["discriminator.layers.2.query.weight"] == 3e-4 * 0.8 ** (1 + extra)
    assert rates["discriminator.layers.0.query.bias"] == 3e-4 * 0.8 ** (3 + extra)
    assert rates["embeddings.token.weight"] == 3e-4 * 0.8 ** (4 + extra)
