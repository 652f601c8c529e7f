"""Two stages: who learns when, what the discriminator starts from, and that nothing else changes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config_file import load_config
from pipeline.two_stage import Stage, generators_weights, stage_at
from tests.conftest import read_journal

TWO_STAGE = ("objective.training=two_stage", "model.generator_width=1")


@pytest.mark.parametrize(("overrides", "first"), [(TWO_STAGE, 10), ((*TWO_STAGE, "objective.generator_steps=3"), 3)])
def test_each_stage_has_its_own_steps(config_path, overrides, first):
    config = load_config(config_path, overrides)
    assert stage_at(config, 0) == stage_at(config, first - 1) == Stage("generator", 0, first)
    assert stage_at(config, first) == stage_at(config, 19) == Stage("discriminator", first, 20 - first)
    assert stage_at(load_config(config_path), 7) == Stage("both", 0, 20)


def test_the_discriminator_starts_from_what_the_generator_has_of_it():
    names = [
        "embeddings.token.weight", "embeddings.token_difference.weight", "generator_embeddings.token.weight",
        "generator.layers.0.attention.output.bias", "discriminator.layers.0.attention.output.bias",
        "generator_head.dense.weight", "prediction_head.dense.weight", "discriminator_head.dense.weight",
    ]  # fmt: skip
    assert generators_weights(names) == {
        "embeddings.token.weight": "generator_embeddings.token.weight",
        "discriminator.layers.0.attention.output.bias": "generator.layers.0.attention.output.bias",
        "prediction_head.dense.weight": "generator_head.dense.weight",
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (1, 2), (3, 2)])
def test_the_stages_follow_each_other_and_the_resting_network_rests(electra, shared_config, stage, processes):
    run = (f"run.name=two_stage_{stage}", *TWO_STAGE, "train.steps=8", "train.checkpoint_every=2",
           "train.keep_checkpoints=9", f"deepspeed.config=configs/deepspeed/zero{stage}.json",
           f"launch.processes={processes}", "optimizer.warmup_steps=0", "optimizer.bias_correction=true",
           "train.held_out_every=2", "train.keep_best=true")  # fmt: skip
    electra("tokenize", shared_config, *run)
    electra("pretrain", shared_config, *run)
    folder = shared_config.parent / f"out/runs/two_stage_{stage}/pretrain/checkpoints"
    check_scores(folder, read_journal(shared_config.parent / "out", f"two_stage_{stage}"))
    at = {step: load_file(folder / f"step_{step:08d}/weights.safetensors") for step in (2, 4, 6, 8)}
    moments = {step: load_file(folder / f"step_{step:08d}/optimizer.safetensors") for step in (2, 4, 6, 8)}

    def moved(before: int, after: int) -> set[str]:
        return {name for name, weight in at[before].items() if not torch.equal(weight, at[after][name])}

    of_generator = {name for name in at[2] if name.startswith("generator")}
    assert moved(2, 4) == of_generator
    assert moved(6, 8) == set(at[2]) - of_generator
    sources = generators_weights(at[2])
    assert {name.split(".")[0] for name in sources} == {"discriminator", "embeddings"}
    for name, source in sources.items():  # after two updates at most 2 lr away from where it started
        difference = (at[6][name] - at[4][source]).abs().max()
        assert 0 < difference < 0.01, name
    built_on = (
        at[6]["discriminator.layers.0.feed_forward_in.weight"] - at[4]["generator.layers.0.feed_forward_in.weight"]
    )
    assert built_on.abs().max() > 1.2 * 5e-4  # one update alone is at most the peak rate
    for name in at[2]:
        rests = name in of_generator
        for kind in ("exp_avg", "exp_avg_sq"):
            earlier, later = (moments[step][f"{kind}/{name}"] for step in ((4, 8) if rests else (2, 4)))
            assert torch.equal(earlier, later), name
            assert rests or not later.any(), name


def check_scores(folder, journal):
    """Held-out rows are scored by the stage that a step belongs to, the last step's too, and of one set."""
    states = [json.loads((folder / f"step_{step:08d}/state.json").read_text()) for step in (2, 4, 6, 8)]
    losses = [entry.get("held_out/total_loss") for entry in journal[1::2]]
    assert [state["score"] for state in states] == [None, None, *losses[2:]]
    assert len({state["scored_rows"] for state in states}) == 1 and states[0]["scored_rows"]
    record = json.loads((folder.parent / "stage.json").read_text())
    assert record["metrics"]["held_out/total_loss"] == losses[-1]


def test_two_stages_cannot_be_entered_on_the_way(electra, shared_config):
    joint = ("run.name=joint_parent", "objective.sharing=none", "model.generator_width=1", "train.steps=5")
    electra("tokenize", shared_config, *joint)
    electra("pretrain", shared_config, *joint)
    child = ("run.name=two_stage_child", *TWO_STAGE, "run.fork_from=joint_parent@5", "train.steps=8")
    electra("tokenize", shared_config, *child)
    refused = electra("pretrain", shared_config, *child, code=78).stderr
    assert "that run has objective.training=joint, this one two_stage" in refused
