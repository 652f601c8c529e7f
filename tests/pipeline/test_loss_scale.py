"""fp16's loss scale goes on where it was, with DeepSpeed's own scalers of every ZeRO stage."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

from pipeline.loss_scale import never_give_up, read_loss_scale, set_loss_scale

OVERFLOWS = [False, False, True, False, False, False, True, True, False, False, False, False, False]


def with_zero() -> Any:
    scaler = DynamicLossScaler(2**12, 3, 1, delayed_shift=2, consecutive_hysteresis=False)
    return SimpleNamespace(loss_scaler=scaler)


def without_zero() -> Any:
    arguments = {"init_scale": 2**12, "scale_window": 3, "min_scale": 1, "delayed_shift": 2}
    return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 0, arguments))


def test_a_scaler_that_is_set_goes_on_as_the_one_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("log_dist", "dist"):  # there is no process group
        monkeypatch.setattr(loss_scaler, name, mock.Mock())
    one, other = with_zero(), with_zero()
    for overflow in OVERFLOWS[:7]:
        one.loss_scaler.update_scale(overflow)
    state = read_loss_scale(one)
    assert state["cur_scale"] != read_loss_scale(other)["cur_scale"]
    set_loss_scale(other, state)
    for overflow in OVERFLOWS[7:]:
        for optimizer in (one, other):
            optimizer.loss_scaler.update_scale(overflow)
        assert read_loss_scale(one) == read_loss_scale(other)


@pytest.mark.parametrize(("source", "target"), [(with_zero, without_zero), (without_zero, with_zero)])
def test_it_moves_between_stages(source: Any, target: Any) -> None:
    one, other = source(), target()
    set_loss_scale(one, {"cur_scale": 64.0, "cur_iter": 9, "last_overflow_iter": 7})
    set_loss_scale(other, read_loss_scale(one))
    assert {name: read_loss_scale(other)[name] for name in ("cur_scale", "cur_iter", "last_overflow_iter")} == {
        "cur_scale": 64.0, "cur_iter": 9, "last_overflow_iter": 7,
    }  # fmt: skip


def test_nan_for_ever_ends_at_the_least_scale_and_not_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler raises at its least scale unless told otherwise; from there on steps count as bad."""
    for name in ("log_dist", "dist"):
        monkeypatch.setattr(loss_scaler, name, mock.Mock())
    kept, plain = with_zero(), with_zero()
    never_give_up(kept)
    never_give_up(without_zero())  # has nothing to be told
    for _ in range(40):
        kept.loss_scaler.update_scale(True)
    assert kept.loss_scaler.cur_scale == 1
    with pytest.raises(Exception, match="already at minimum"):
        for _ in range(40):
            plain.loss_scaler.update_scale(True)
