"""What a run writes down: health of both networks at each interval, held-out scores in between, and no side effects."""

import math

import pytest

from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.journal import without_volatile
from tests.conftest import read_journal

QUARTER = ("train.log_every=5", "train.checkpoint_every=20")
PARTS = ("embeddings", "generator", "discriminator")
HEALTH = {
    "train/total_loss", "train/generator_mlm_loss", "train/mask_token_loss", "train/discriminator_rtd_loss",
    "train/generator_accuracy", "train/discriminator_accuracy", "train/discriminator_auc", "train/discriminator_recall",
    "train/replaced_fraction", "train/grad_norm", "train/learning_rate",
    *(f"train/{kind}_norm_{part}" for kind in ("grad", "parameter") for part in PARTS),
}  # fmt: skip


@pytest.fixture(scope="module")
def journals(electra, shared_config) -> dict[str, list[dict]]:
    """The same run without and with held-out scores in between."""
    found = {}
    for name, more in {"plain": (), "scored": ("train.held_out_every=10",)}.items():
        run = (f"run.name=training_{name}", *QUARTER, *more)
        electra("tokenize", shared_config, *run)
        electra("pretrain", shared_config, *run)
        found[name] = read_journal(shared_config.parent / "out", f"training_{name}")
    return found


def test_every_interval_has_the_health_of_both_networks(journals):
    for entry in journals["plain"]:
        assert set(entry) >= HEALTH
        assert all(math.isfinite(value) for value in entry.values())
    final = journals["plain"][-1]
    assert 0 < final["train/replaced_fraction"] <= 0.16


def test_the_norms_of_the_parts_make_up_the_whole(journals):
    for entry in journals["plain"]:
        parts = sum(entry[f"train/grad_norm_{part}"] ** 2 for part in PARTS)
        assert math.sqrt(parts) == pytest.approx(entry["train/grad_norm"], rel=1e-4)


def test_both_counts_of_flops_grow_with_the_steps(journals):
    first, last = journals["plain"][0], journals["plain"][-1]
    for count in ("flops", "flops_paper"):
        assert last[count] == pytest.approx(4 * first[count])


def test_held_out_scores_join_the_journal_and_change_nothing_else(journals):
    scored = {entry["step"]: {k for k in entry if k.startswith("held_out/")} for entry in journals["scored"]}
    assert {step for step, keys in scored.items() if keys} == {10, 20}
    assert scored[10] >= {"held_out/discriminator_auc", "held_out/mask_token_loss", "held_out/generator_accuracy"}
    rest = [{k: v for k, v in entry.items() if k not in scored[entry["step"]]} for entry in journals["scored"]]
    assert [without_volatile(entry) for entry in rest] == [without_volatile(e) for e in journals["plain"]]


def test_held_out_scores_are_due_at_logged_steps_only(config_path):
    with pytest.raises(ConfigError, match=r"held_out_every=10 must divide train.checkpoint_every=15"):
        load_config(config_path, ("train.keep_best=true", "train.held_out_every=10", "train.checkpoint_every=15"))
    with pytest.raises(ConfigError, match="held_out_every=7 is not a multiple of train"):
        load_config(config_path, ("train.held_out_every=7", "train.log_every=5"))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("train.held_out_rows=0",), "train.held_out_rows=0"),
        (("data.held_out_fraction=0",), "data.held_out_fraction=0"),
        (("data.held_out_fraction=0.001",), "what data.held_out_fraction=0.001 holds out is less than two rows of 32"),
    ],
)
def test_it_is_said_why_nothing_is_scored(config_path, electra, overrides, why):
    said = electra("run", config_path, "train.steps=1", *overrides).stderr
    assert f"nothing is scored: {why}" in said
