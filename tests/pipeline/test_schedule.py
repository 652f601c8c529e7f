"""Learning rates against numbers worked by hand: peak 1, 100 steps, 10 of them warm-up unless a case says else."""

from typing import Any

import pytest

from pipeline.config_train import OptimizerConfig
from pipeline.schedule import learning_rate, linear_times_warmup


def rate(step: int, total: int = 100, **settings: Any) -> float:
    return learning_rate(OptimizerConfig(**({"lr": 1.0, "warmup_steps": 10} | settings)), step, total)


HALF = {"decay_power": 0.5}
TENTH = {"final_lr_fraction": 0.1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Steps 0, 5 (in warm-up), 10 (its end), 55 (the middle of what is left), 99 (the last).
        ({"schedule": "linear_times_warmup"}, (0, 0.5 * 0.95, 0.9, 0.45, 0.01)),
        ({"schedule": "linear_times_warmup"} | HALF, (0, 0.5 * 0.974679434, 0.948683298, 0.670820393, 0.1)),
        ({"schedule": "linear_times_warmup"} | TENTH, (0, 0.5 * 0.955, 0.91, 0.505, 0.109)),
        ({"schedule": "linear"}, (0, 0.5, 1, 0.5, 1 / 90)),
        ({"schedule": "linear"} | HALF, (0, 0.5, 1, 0.707106781, 0.105409255)),
        ({"schedule": "linear"} | TENTH, (0, 0.5, 1, 0.55, 0.11)),
        ({"schedule": "cosine"}, (0, 0.5, 1, 0.5, 0.000304586)),
        ({"schedule": "cosine"} | TENTH, (0, 0.5, 1, 0.55, 0.1 + 0.9 * 0.000304586)),
        ({"schedule": "cosine"} | HALF, (0, 0.5, 1, 0.5, 0.000304586)),
        ({"schedule": "wsd"}, (0, 0.5, 1, 1, 0.1)),
        ({"schedule": "wsd", "decay_fraction": 0.5}, (0, 0.5, 1, 0.9, 0.02)),
        ({"schedule": "wsd"} | HALF, (0, 0.5, 1, 1, 0.316227766)),
        ({"schedule": "wsd"} | TENTH, (0, 0.5, 1, 1, 0.19)),
    ],
)
def test_by_hand(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert [rate(step, **settings) for step in (0, 5, 10, 55, 99)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear_times_warmup", "linear", "cosine", "wsd"])
def test_decay_ends_at_the_final_fraction_and_stays_there(schedule: str) -> None:
    for step in (100, 130):
        assert rate(step, schedule=schedule) == pytest.approx(0, abs=1e-12)
        assert rate(step, schedule=schedule, final_lr_fraction=0.25) == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(schedule: str) -> None:
    assert rate(0, schedule=schedule, warmup_steps=0) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [100, 400])
def test_a_warmup_as_long_as_the_run_rises_to_its_end(schedule: str, warmup: int) -> None:
    rates = [rate(step, schedule=schedule, warmup_steps=warmup) for step in range(100)]
    assert rates == [step / warmup for step in range(100)]


def test_a_warmup_into_the_decay_of_wsd_shortens_it() -> None:
    rates = [rate(step, schedule="wsd", warmup_steps=95, decay_fraction=0.5) for step in (94, 95, 97, 99)]
    assert rates == pytest.approx([94 / 95, 1, 0.6, 0.2])


def test_wsd_that_decays_all_the_way_is_linear() -> None:
    for step in range(100):
        assert rate(step, schedule="wsd", decay_fraction=1) == pytest.approx(rate(step, schedule="linear"))


def test_the_default_is_the_released_one_to_the_bit() -> None:
    config = OptimizerConfig(lr=5e-4, warmup_steps=7)
    for step in range(100):
        assert learning_rate(config, step, 100) == linear_times_warmup(5e-4, step, 7, 100)
        assert linear_times_warmup(5e-4, step, 7, 100) == 5e-4 * max(0.0, 1 - step / 100) * min(1.0, step / 7)
