"""A discriminator that stays at chance is noticed, also across a restart, and the warning says what to change; so are
processes that all others wait for."""

import logging
from pathlib import Path

import pytest

from pipeline.config_file import load_config
from pipeline.health import ChanceWatch, SlowWatch
from pipeline.journal import Entry


def entries(aucs: list[float | None], first_step: int = 10) -> list[Entry]:
    found = []
    for number, auc in enumerate(aucs):
        entry: Entry = {"step": first_step + number, "train/generator_accuracy": 0.61}
        found.append(entry if auc is None else entry | {"train/discriminator_auc": auc})
    return found


def warnings(config_path: Path, before: list[Entry], now: list[Entry], caplog, *overrides: str) -> list[str]:
    watch = ChanceWatch(load_config(config_path, ("train.chance_intervals=4", *overrides)), before)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="electra"):
        for entry in now:
            watch.observe(entry)
    return [record.getMessage() for record in caplog.records]


def test_the_warning_says_since_when_and_what_to_change(config_path, caplog):
    (message,) = warnings(config_path, [], entries([0.6, 0.51, 0.49, 0.5, 0.515, 0.5]), caplog)
    assert "AUC 0.515" in message
    assert "since step 11, for 4 logged intervals" in message
    assert "right at 61 %" in message
    assert "lower model.generator_width (now 0.5;" in message
    assert "objective.discriminator_loss_weight (now 50)" in message


def test_it_is_repeated_and_resets_when_the_discriminator_learns(config_path, caplog):
    assert len(warnings(config_path, [], entries([0.5] * 8), caplog)) == 2
    assert not warnings(config_path, [], entries([0.5, 0.5, 0.5, 0.53, 0.5, 0.5, 0.5]), caplog)
    assert not warnings(config_path, [], entries([0.5, 0.5, 0.5, None, 0.5, 0.5, 0.5]), caplog)


def test_how_near_to_chance_is_chance(config_path, caplog):
    assert not warnings(config_path, [], entries([0.521] * 8), caplog)
    assert len(warnings(config_path, [], entries([0.519] * 4), caplog)) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.sharing=all", "model.generator_width=1"),
        ("objective.training=two_stage", "model.generator_width=1", "objective.generator_steps=2"),
        ("objective.generator=unigram",),
    ],
)
def test_what_the_config_would_refuse_is_not_advised(config_path, caplog, overrides):
    (message,) = warnings(config_path, [], entries([0.5] * 4), caplog, *overrides)
    assert "generator_width" not in message
    assert "raise objective.discriminator_loss_weight (now 50)" in message


def test_the_second_stages_own_warm_up_does_not_count(config_path, caplog):
    overrides = ("objective.training=two_stage", "model.generator_width=1", "train.steps=1000")
    now = entries([0.5] * 8, first_step=501)  # warm-up is 5 steps of each stage
    assert not warnings(config_path, [], now, caplog, *overrides)
    assert len(warnings(config_path, [], entries([0.5] * 9, first_step=501), caplog, *overrides)) == 1


def test_a_restart_goes_on_counting(config_path, caplog):
    found = entries([0.5] * 4)
    assert len(warnings(config_path, found[:3], found[3:], caplog)) == 1


@pytest.mark.parametrize("override", ["train.chance_intervals=0", "optimizer.warmup_steps=100"])
def test_it_can_be_switched_off_and_waits_for_the_warm_up(config_path, caplog, override):
    assert not warnings(config_path, [], entries([0.5] * 20), caplog, override)


def test_a_run_whose_discriminator_learns_nothing_warns(electra, shared_config):
    run = ("run.name=at_chance", "objective.discriminator_loss_weight=0", "optimizer.warmup_steps=0")
    electra("tokenize", shared_config, *run)
    done = electra(
        "pretrain", shared_config, *run, "train.log_every=4", "train.global_batch_size=64", "train.chance_intervals=2",
        "train.micro_batch_size=64", "train.checkpoint_every=20",
    )  # fmt: skip
    assert "the discriminator is at chance" in done.stderr


def test_a_process_that_all_wait_for_is_named_with_its_node(caplog) -> None:
    watch = SlowWatch(["n1", "n1", "n2", "n2"])
    once, slow = [1.0, 1.1, 1.4, 1.0], [1.0, 1.1, 1.7, 1.0]
    for seconds in (slow, slow, once, slow, slow):
        watch.observe(seconds)
    assert caplog.text == ""
    watch.observe(slow)
    assert "slow for 3 logged intervals in a row: rank 2 on n2 (1.7 times the median)" in caplog.text
    caplog.clear()
    watch.observe(slow)
    assert caplog.text == ""  # not in every line
    SlowWatch(["n1"]).observe([0.0])


def test_of_two_the_slower_one_is_compared_with_the_other(caplog) -> None:
    watch = SlowWatch(["n1", "n2"])
    for _ in range(3):
        watch.observe([1.0, 1.6])
    assert "rank 1 on n2 (1.6 times the median)" in caplog.text
