"""Parameters and FLOPs: the published counts, and the modules that are really built."""

import subprocess
import sys
from itertools import product
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.batch import GlobalCounts, MicroBatch
from model.config import SIZES, ModelConfig
from model.electra import Electra
from model.flops import (
    count_parameters,
    encoder_flops_per_token,
    forward_flops_per_token,
    generator_steps,
    run_flops,
    steps_for_flops,
    training_flops_per_token,
)
from model.kernels.attention import Packing
from model.kernels.select import select_kernels
from model.masking import MaskingRule, select_and_mask
from model.objective import Objective, ObjectiveConfig, Sharing, Training, refuse_senseless

BERT_VOCABULARY = 30_522
LARGE, LARGE_OBJECTIVE = ModelConfig(size="large"), ObjectiveConfig(mask_fraction=0.25)


def test_parameters_of_large_are_the_published_ones():
    counts = count_parameters(LARGE, LARGE_OBJECTIVE, BERT_VOCABULARY)
    assert counts["total"] == 354_655_291
    assert counts["discriminator"] == pytest.approx(335.1e6, abs=0.05e6)
    millions = {name: round(count / 1e6, 2) for name, count in counts.items()}
    assert millions["embeddings"] == 31.78
    assert millions["generator_encoder"] == 19.22
    assert millions["generator_head"] == 0.30


@pytest.mark.parametrize(("size", "millions"), [("small", 14), ("small_plus_plus", 14), ("base", 110), ("large", 335)])
def test_discriminators_have_the_size_that_the_paper_names(size, millions):
    counts = count_parameters(ModelConfig(size=size), ObjectiveConfig(), BERT_VOCABULARY)
    assert counts["discriminator"] / 1e6 == pytest.approx(millions, rel=0.04)


def test_forward_flops_of_large_by_part():
    parts = forward_flops_per_token(LARGE, LARGE_OBJECTIVE, BERT_VOCABULARY, 512)
    megaflops = {name: round(flops / 1e6, 1) for name, flops in parts.items()}
    assert megaflops == {
        "discriminator_encoder": 654.3, "discriminator_head": 2.1, "generator_encoder": 50.9, "generator_head": 16.0,
    }  # fmt: skip
    attention = LARGE.discriminator.layers * 4 * 512 * 1024
    assert round(attention / 1e6, 1) == 50.3
    without = encoder_flops_per_token(LARGE.discriminator, 0)
    assert encoder_flops_per_token(LARGE.discriminator, 512) - without == attention


def test_flops_of_a_step_of_large():
    per_token = training_flops_per_token(LARGE, LARGE_OBJECTIVE, BERT_VOCABULARY, 512)
    assert round(per_token / 1e9, 3) == 2.170
    assert round(per_token * 2048 * 512 / 1e15, 3) == 2.275


def sensible_combinations() -> list[tuple[dict, dict]]:
    """Every objective, training, way of sharing and kind of generator that mean something together."""
    combinations = []
    for name, training, sharing, tables, kind, width in product(
        get_args(Objective), get_args(Training), get_args(Sharing), ("all", "token_and_position"),
        ("network", "unigram"), (0.5, 1),
    ):  # fmt: skip
        objective = {
            "name": name, "training": training, "sharing": sharing, "shared_tables": tables, "generator": kind,
        }  # fmt: skip
        model = {"size": "tiny", "hidden_size": 64, "embedding_size": 48, "generator_width": width}
        try:
            refuse_senseless(ModelConfig(**model), ObjectiveConfig(**objective))
        except ValueError:
            continue
        combinations.append((model, objective))
    return combinations


COMBINATIONS = sensible_combinations()


def test_no_objective_training_or_sharing_is_left_out():
    for key, kind in (("name", Objective), ("training", Training), ("sharing", Sharing)):
        assert {objective[key] for _, objective in COMBINATIONS} == set(get_args(kind))


@pytest.mark.parametrize(("model", "objective"), COMBINATIONS, ids=lambda part: "-".join(map(str, part.values())))
def test_counted_parameters_are_those_of_the_built_model(model, objective):
    check_counts(ModelConfig(**model), ObjectiveConfig(**objective))


@pytest.mark.parametrize("size", SIZES)
def test_counted_parameters_of_every_size(size):
    check_counts(ModelConfig(size=size), ObjectiveConfig())
    check_counts(ModelConfig(size=size), ObjectiveConfig(sharing="none"))


@pytest.mark.parametrize(
    "changes",
    [
        {"generator_depth": 0.5},
        {"embedding_size": 96},
        {"max_positions": 77},
        {"generator_width": 0.7},
        {"size": "base"},
    ],
)
def test_counts_follow_every_hyperparameter(changes):
    check_counts(ModelConfig(**({"size": "tiny"} | changes)), ObjectiveConfig())


def test_counts_follow_the_width_of_the_generators_own_tables():
    check_counts(ModelConfig(size="tiny", generator_embedding_size=40), ObjectiveConfig(sharing="none"))


def check_counts(model: ModelConfig, objective: ObjectiveConfig) -> None:
    with torch.device("meta"):
        built = Electra(model, objective, 1000, select_kernels("reference"))
    counts = count_parameters(model, objective, 1000)
    modules = dict.fromkeys(counts.keys() - {"total", "discriminator"}, 0)
    for name, parameter in built.named_parameters():
        module = name.split(".")[0]
        modules[f"{module}_encoder" if module in ("discriminator", "generator") else module] += parameter.numel()
    assert {name: counts[name] for name in modules} == modules
    assert counts["total"] == sum(modules.values())
    kept = ("embeddings", "discriminator_encoder", "discriminator_head", "prediction_head")
    assert counts["discriminator"] == sum(modules[name] for name in kept)


def test_difference_tables_add_nothing_to_what_is_kept():
    kept = [count_parameters(LARGE, ObjectiveConfig(sharing=sharing), 1000) for sharing in ("embeddings", "gdes")]
    assert kept[0]["discriminator"] == kept[1]["discriminator"]


LENGTH, ROWS, VOCAB_SIZE = 64, 2, 1000
BOTH_NETWORKS = [
    {"name": name} for name in get_args(Objective)
] + [
    {"sharing": "none"}, {"sharing": "all"}, {"sharing": "gdes"}, {"shared_tables": "token_and_position"},
    {"generator": "uniform"}, {"training": "adversarial"},
]  # fmt: skip


def build(objective: ObjectiveConfig) -> tuple[ModelConfig, Electra]:
    equal = objective.sharing == "all" or objective.training == "two_stage"
    config = ModelConfig(size="tiny", hidden_layers=2, embedding_size=96, generator_width=1 if equal else 0.5)
    model = Electra(config, objective, VOCAB_SIZE, select_kernels("reference"))
    model.set_control(torch.zeros(VOCAB_SIZE))
    return config, model


def run_and_count(model: Electra, trains: str = "both") -> tuple[int, int]:
    """FLOPs that torch counts in a real forward pass, and in the backward pass behind it."""
    ids = torch.full((ROWS, LENGTH), 9)
    reserved = int((0.15 + 0.005) * LENGTH)
    batch = MicroBatch(
        token_ids_BT=ids,
        positions_BT=torch.arange(LENGTH).expand(ROWS, -1),
        token_types_BT=torch.zeros_like(ids),
        packing=Packing(torch.zeros_like(ids)),
        masking=select_and_mask(ids, torch.arange(ROWS), MaskingRule(reserved, 0.85, 4, (0, 2, 3, 4))),
        seed=1,
    )
    with FlopCounterMode(display=False) as counter:
        loss = model(batch, GlobalCounts(ROWS * reserved, ROWS * LENGTH), trains)[0]
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("changes", BOTH_NETWORKS, ids=lambda changes: "-".join(changes.values()))
def test_counted_flops_are_those_of_the_matrix_products_that_run(changes):
    """Counted by torch on a real pass; the products of attention are counted there too."""
    objective = ObjectiveConfig(**changes)
    config, model = build(objective)
    forward, backward = run_and_count(model)
    parts = forward_flops_per_token(config, objective, VOCAB_SIZE, LENGTH)
    # Nominal once: the head that runs again when the reward is known, and logits that are not kept for the backward.
    again = {"forward": 0.0, "backward": 0.0}
    if objective.training == "adversarial":
        again["forward"] = parts["generator_head"]
    if objective.name == "all_tokens_mlm":
        again["backward"] = parts["prediction_head"]
    assert forward == (sum(parts.values()) + again["forward"]) * ROWS * LENGTH
    # The baseline reads hidden states without gradient: one of its three products is nominal only.
    twice = 2 * sum(parts.values()) - parts.get("baseline", 0)
    assert backward == pytest.approx((twice + again["backward"]) * ROWS * LENGTH, rel=1e-9)


@pytest.mark.parametrize("sharing", ["none", "gdes"])
@pytest.mark.parametrize("trains", ["generator", "discriminator"])
def test_counted_flops_of_the_two_stages(trains, sharing):
    """The network that rests runs on eight tokens with weight 0, which the nominal count leaves out."""
    objective = ObjectiveConfig(training="two_stage", sharing=sharing)
    config, model = build(objective)
    resting = "discriminator" if trains == "generator" else "generator"
    parts = forward_flops_per_token(config, objective, VOCAB_SIZE, 8)
    idle = 8 * sum(flops for name, flops in parts.items() if name.startswith(resting))
    nominal = ROWS * LENGTH * training_flops_per_token(config, objective, VOCAB_SIZE, LENGTH, trains)
    assert sum(run_and_count(model, trains)) == pytest.approx(nominal + 3 * idle)


def test_forward_flops_by_network():
    objective = ObjectiveConfig()
    config, model = build(objective)
    parts = forward_flops_per_token(config, objective, VOCAB_SIZE, LENGTH)
    generator = parts["generator_encoder"] + parts["generator_head"]
    ids = torch.full((ROWS, LENGTH), 9)
    places = torch.arange(LENGTH).expand(ROWS, -1)
    with FlopCounterMode(display=False) as counter:
        embedded = model.embeddings(ids, places, torch.zeros_like(ids))
        model.discriminator(embedded, Packing(torch.zeros_like(ids)))
    assert counter.get_total_flops() == parts["discriminator_encoder"] * ROWS * LENGTH
    assert run_and_count(model)[0] - counter.get_total_flops() == (
        (parts["discriminator_head"] + generator) * ROWS * LENGTH
    )


def test_run_in_two_stages_is_counted_piece_by_piece():
    objective = ObjectiveConfig(training="two_stage")
    per_step = {"generator": 2.0, "discriminator": 3.0, "both": 5.0}.__getitem__
    flops = run_flops(objective, 11, per_step)
    assert (flops.at(0), flops.at(5), flops.at(6), flops.at(11)) == (0, 10, 13, 28)
    assert run_flops(ObjectiveConfig(), 11, per_step).at(11) == 55
    assert generator_steps(ObjectiveConfig(training="two_stage", generator_steps=3), 11) == 3
    assert generator_steps(ObjectiveConfig(), 11) == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"name": "mlm"}, {"training": "two_stage"}, {"training": "two_stage", "generator_steps": 40}],
)
@pytest.mark.parametrize("steps", [1, 2, 61, 1000, 1001])
def test_budget_buys_the_fewest_steps_that_reach_it(changes, steps):
    model, objective = ModelConfig(size="small", generator_width=1), ObjectiveConfig(**changes)
    shape = model, objective, BERT_VOCABULARY, 128

    def per_step(trains):
        return 32 * 128 * training_flops_per_token(*shape, trains)

    flops = run_flops(objective, steps, per_step).at(steps)
    assert steps_for_flops(*shape, 32, flops) == steps
    assert steps_for_flops(*shape, 32, flops * (1 + 1e-9)) == steps + 1
    assert steps_for_flops(*shape, 32, flops * (1 - 1e-9)) == steps


def test_counting_needs_no_torch():
    code = "import sys, model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("size", "generator"),
    [("small", (12, 64, 1, 256)), ("base", (12, 256, 4, 1024)), ("large", (24, 256, 4, 1024)),
     ("small_plus_plus", (12, 256, 4, 1024))],
)  # fmt: skip
def test_generators_have_the_published_shapes(size, generator):
    shape = ModelConfig(size=size).generator
    assert (shape.layers, shape.hidden_size, shape.heads, shape.feed_forward_size) == generator
