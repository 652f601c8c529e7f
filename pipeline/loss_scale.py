"""State of fp16's dynamic loss scale, which decides what later steps round to: part of a checkpoint; skipped steps."""

from typing import Any

_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(optimizer: Any) -> Any:
    """Where DeepSpeed keeps it: under ZeRO in a scaler, without in a record."""
    return optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config


def never_give_up(optimizer: Any) -> None:
    """At its least scale DeepSpeed's ZeRO would end the run by itself; steps with NaN are counted by us."""
    if hasattr(_scaler(optimizer), "raise_error_at_min_scale"):
        _scaler(optimizer).raise_error_at_min_scale = False


def read_loss_scale(optimizer: Any) -> dict[str, float]:
    """The scale, the updates and the last overflow that it counts from, of one of DeepSpeed's fp16 optimizers."""
    scaler = _scaler(optimizer)
    return {name: getattr(scaler, name) for name in _FIELDS if hasattr(scaler, name)}


def set_loss_scale(optimizer: Any, state: dict[str, float]) -> None:
    """Goes on from what ``read_loss_scale`` gave, under the same ZeRO stage or another."""
    scaler = _scaler(optimizer)
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def skip_next_step(optimizer: Any) -> None:
    """The optimizer's next step changes nothing; those after it are real again."""

    def skip(*_: Any, **__: Any) -> None:
        del optimizer.step

    optimizer.step = skip
