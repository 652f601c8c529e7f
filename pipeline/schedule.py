"""The learning rate as a function of the updates already applied.

The released schedule multiplies warm-up and decay. The others warm up first,
linearly from 0 to the peak, and then decay from the peak to the final rate.
"""

import math

from pipeline.config_train import OptimizerConfig


def learning_rate(config: OptimizerConfig, applied_steps: int, total_steps: int) -> float:
    """Learning rate of the next update, by ``config.schedule``.

    ============================  ==============================================================================
    ``linear_times_warmup``       peak * decay(step / total) * min(1, step / warm-up), as released
    ``linear``                    warm-up, then peak * decay over the steps that are left
    ``cosine``                    warm-up, then half a cosine over the steps that are left; ``decay_power`` does
                                  not apply
    ``wsd``                       warm-up, the peak, then peak * decay over the last ``decay_fraction`` of all
                                  steps, or over what the warm-up leaves of them
    ============================  ==============================================================================

    Decay is final + (1 - final) * (1 - progress) ** ``decay_power``, with final the
    ``final_lr_fraction``: it reaches final times the peak at ``total_steps``, one step after the
    last. A warm-up that is as long as the run or longer never ends: the rate rises to the last
    step and nothing decays (but the released schedule, which decays all along).

    Args:
        config: Peak, schedule and its settings.
        applied_steps: Updates made so far; skipped steps do not count. The first update has 0, and
            with a warm-up the rate 0.
        total_steps: Where the decay ends.
    """
    if config.schedule == "linear_times_warmup":
        decay = _decay(config, applied_steps / total_steps)
        return config.lr * decay * _warmup(applied_steps, config.warmup_steps)
    if applied_steps < config.warmup_steps:
        return config.lr * _warmup(applied_steps, config.warmup_steps)
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, total_steps * (1 - config.decay_fraction))
    progress = (applied_steps - begin) / (total_steps - begin) if begin < total_steps else 1.0
    progress = min(1.0, max(0.0, progress))
    if config.schedule == "cosine":
        final = config.final_lr_fraction
        return config.lr * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    return config.lr * _decay(config, progress)


def linear_times_warmup(peak: float, applied_steps: int, warmup_steps: int, total_steps: int) -> float:
    """Peak times linear decay times warm-up, as released: the first step has rate 0.

    Decay and warm-up multiply, so the peak itself is never reached
    (google-research/electra, ``model/optimization.py``).

    Args:
        peak: Nominal peak learning rate.
        applied_steps: Updates made so far; skipped steps do not count.
        warmup_steps: Length of the warm-up; 0 for none.
        total_steps: Where the decay reaches 0.
    """
    return peak * max(0.0, 1 - applied_steps / total_steps) * _warmup(applied_steps, warmup_steps)


def _warmup(applied_steps: int, warmup_steps: int) -> float:
    return min(1.0, applied_steps / warmup_steps) if warmup_steps else 1.0


def _decay(config: OptimizerConfig, progress: float) -> float:
    final = config.final_lr_fraction
    return final + (1 - final) * max(0.0, 1 - progress) ** config.decay_power
