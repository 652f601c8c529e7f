"""The learning rate as a function of the steps already applied."""


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
    decay = max(0.0, 1 - applied_steps / total_steps)
    warmup = min(1.0, applied_steps / warmup_steps) if warmup_steps else 1.0
    return peak * decay * warmup
