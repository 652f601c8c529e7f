"""Numbers that follow from a config and a number of processes; computed once, printed and logged."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from model.flops import RunFlops, count_parameters, run_flops, steps_for_flops, training_flops_per_token
from model.flops_paper import paper_flops_per_step
from model.objective import Trains
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.journal import Entry

MAX_AUTO_MICRO_BATCH_TOKENS = 32_768
"""Tokens of an automatic micro-batch: at hidden size 1024 they fill an H100's tiles to 97 %."""

_CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments


@dataclass(frozen=True)
class Before:
    """What the steps of the run that a fork goes on from came to, less what they would have come to by its own plan."""

    tokens: int = 0
    flops: float = 0.0
    flops_paper: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run does, in numbers.

    Attributes:
        world_size: Processes.
        micro_batch_rows: Rows of one forward pass.
        micro_batches_per_step: Micro-batches in a global batch.
        accumulation_steps: Micro-batches that each process runs per step; some may be empty.
        nominal: Training FLOPs of the steps, see ``model.flops``; two_stage has steps of two kinds.
        paper: The same in the paper's count, see ``model.flops_paper``.
        flops_per_token: Nominal training FLOPs, the mean over all steps.
        flops_per_step: The same for a step.
        flops_total: Nominal training FLOPs of all steps, by this plan: a fork's earlier ones too, unlike ``flops_at``.
        flops_paper_total: The same in the paper's count.
        checkpoint_bytes: One checkpoint: weights and both moments in fp32.
        disk_bytes: Checkpoints that are kept plus one being written.
        token_bytes: Of one token in a shard.
        before: Not zero in a fork with rows, a batch or an objective of its own.
    """

    world_size: int
    global_batch_rows: int
    micro_batch_rows: int
    micro_batches_per_step: int
    accumulation_steps: int
    idle_micro_batches_per_step: int
    sequence_length_tokens: int
    masked_per_row: int
    tokens_per_step: int
    total_tokens: int
    steps: int
    parameters_trained: int
    parameters_discriminator: int
    vocab_size: int
    nominal: RunFlops
    paper: RunFlops
    flops_per_token: float
    flops_per_step: float
    flops_total: float
    flops_paper_total: float
    checkpoint_bytes: int
    disk_bytes: int
    token_bytes: int
    before: Before = Before()

    def tokens_at(self, step: int) -> int:
        """Tokens of the first ``step`` steps together."""
        return self.before.tokens + step * self.tokens_per_step

    def flops_at(self, step: int) -> float:
        """Nominal FLOPs of the first ``step`` steps together."""
        return self.before.flops + self.nominal.at(step)

    def flops_paper_at(self, step: int) -> float:
        """FLOPs of the first ``step`` steps in the paper's count."""
        return self.before.flops_paper + self.paper.at(step)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types."""
        return asdict(self)


def make_plan(
    config: Config, world_size: int, vocab_size: int | None = None, micro_batch_rows: int | None = None
) -> Plan:
    """Derives the plan.

    Args:
        config: The run.
        world_size: Number of processes.
        vocab_size: Of the tokenizer at hand, when it is known; else the configured one.
        micro_batch_rows: The size that a resumed run keeps instead of ``auto``.

    Raises:
        ConfigError: A micro-batch that does not divide the batch; a budget that was planned at another vocabulary.
    """
    vocab_size = vocab_size or config.tokenizer.vocab_size
    _check_budget(config, vocab_size)
    rows, length = config.train.global_batch_size, config.data.sequence_length
    micro = config.train.micro_batch_size
    if micro == "auto":
        micro = micro_batch_rows or _auto_micro_batch(rows, length, world_size)
    if rows % micro:
        raise ConfigError(
            f"train.global_batch_size={rows} is not a multiple of the micro-batch of {micro} rows; "
            "set train.micro_batch_size to a divisor"
        )
    micro_batches = rows // micro
    accumulation = -(-micro_batches // world_size)
    parameters = count_parameters(config.model, config.objective, vocab_size)
    nominal, paper = _count_flops(config, vocab_size)
    steps, flops_total = config.train.steps, nominal.at(config.train.steps)
    checkpoint_bytes = parameters["total"] * _CHECKPOINT_BYTES_PER_PARAMETER
    return Plan(
        world_size=world_size,
        global_batch_rows=rows,
        micro_batch_rows=micro,
        micro_batches_per_step=micro_batches,
        accumulation_steps=accumulation,
        idle_micro_batches_per_step=accumulation * world_size - micro_batches,
        sequence_length_tokens=length,
        masked_per_row=config.objective.masked_per_row(length),
        tokens_per_step=rows * length,
        total_tokens=rows * length * steps,
        steps=steps,
        parameters_trained=parameters["total"],
        parameters_discriminator=parameters["discriminator"],
        vocab_size=vocab_size,
        nominal=nominal,
        paper=paper,
        flops_per_token=flops_total / (steps * rows * length),
        flops_per_step=flops_total / steps,
        flops_total=flops_total,
        flops_paper_total=paper.at(steps),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * _most_checkpoints(config, steps),
        token_bytes=2 if vocab_size < 65536 else 4,
    )


def with_steps_before(plan: Plan, config: Config, entries: Sequence[Entry]) -> Plan:
    """A fork's plan, which counts the steps up to it as the lines in the journal have them that it inherited.

    Where the run forked from wrote no line at that very step, the steps since its last one count as the fork's own.
    """
    if config.run.fork_from is None:
        return plan
    forked_at = int(config.run.fork_from.rpartition("@")[2])
    inherited = [entry for entry in entries if entry["step"] <= forked_at]
    if not inherited:
        return plan
    last, step = inherited[-1], inherited[-1]["step"]
    before = Before(
        last["tokens"] - step * plan.tokens_per_step,
        last["flops"] - plan.nominal.at(step),
        last.get("flops_paper", plan.paper.at(step)) - plan.paper.at(step),
    )
    return replace(plan, before=before)


def _most_checkpoints(config: Config, steps: int) -> int:
    """Those that are kept, and one being written."""
    train = config.train
    before_a_spike = 2 if train.spike_rollbacks else 0
    return (
        train.keep_checkpoints
        + train.keep_best
        + before_a_spike
        + (steps // train.keep_every if train.keep_every else 0)
        + 1
    )


def _count_flops(config: Config, vocab_size: int) -> tuple[RunFlops, RunFlops]:
    """Nominal FLOPs of the run's steps, and in the paper's count."""
    rows, length = config.train.global_batch_size, config.data.sequence_length
    shape = config.model, config.objective, vocab_size, length

    def nominal(trains: Trains) -> float:
        return rows * length * training_flops_per_token(*shape, trains)

    def paper(trains: Trains) -> float:
        return paper_flops_per_step(*shape, rows, trains)

    objective, steps = config.objective, config.train.steps
    return run_flops(objective, steps, nominal), run_flops(objective, steps, paper)


def _check_budget(config: Config, vocab_size: int) -> None:
    """``train.flops`` became steps at the configured vocabulary; the one at hand may cost otherwise."""
    if config.train.flops is None or vocab_size == config.tokenizer.vocab_size:
        return
    length, rows = config.data.sequence_length, config.train.global_batch_size
    steps = steps_for_flops(config.model, config.objective, vocab_size, length, rows, config.train.flops)
    if steps != config.train.steps:
        raise ConfigError(
            f"train.flops={config.train.flops:g} was planned as {config.train.steps:,} steps at tokenizer.vocab_size="
            f"{config.tokenizer.vocab_size}, but the tokenizer has {vocab_size} ids, with which it is {steps:,} steps; "
            f"set tokenizer.vocab_size={vocab_size}"
        )


def _auto_micro_batch(rows: int, sequence_length: int, world_size: int) -> int:
    """The largest divisor of the batch that gives every process work and stays within the token limit."""
    limit = max(1, min(-(-rows // world_size), MAX_AUTO_MICRO_BATCH_TOKENS // sequence_length))
    return max(divisor for divisor in range(1, limit + 1) if rows % divisor == 0)


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan as lines for people: name and value with unit."""
    idle = f", {plan.idle_micro_batches_per_step} idle" if plan.idle_micro_batches_per_step else ""
    return [
        ("parameters trained", f"{plan.parameters_trained / 1e6:.1f}M ({plan.parameters_trained:,})"),
        ("parameters of the discriminator", f"{plan.parameters_discriminator / 1e6:.1f}M"),
        ("vocabulary", f"{plan.vocab_size:,} ids"),
        ("processes", f"{plan.world_size}"),
        (
            "global batch",
            f"{plan.global_batch_rows:,} rows = {plan.micro_batches_per_step:,} micro-batches of "
            f"{plan.micro_batch_rows} rows; {plan.accumulation_steps} per process{idle}",
        ),
        ("row", f"{plan.sequence_length_tokens} tokens, {plan.masked_per_row} selected"),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.steps:,}"),
        ("tokens in all", f"{plan.total_tokens:.3e}"),
        ("FLOPs per token", f"{plan.flops_per_token:.3e}"),
        ("FLOPs per step", f"{plan.flops_per_step:.3e}"),
        ("FLOPs in all", f"{plan.flops_total:.3e}; {plan.flops_paper_total:.3e} in the paper's count"),
        ("one checkpoint", f"{plan.checkpoint_bytes / 2**30:.2f} GiB"),
        ("disk for shards", f"{plan.token_bytes} bytes per token of the corpora"),
        ("disk for checkpoints", f"{plan.disk_bytes / 2**30:.2f} GiB"),
    ]
