"""Numbers that follow from a config and a number of processes; computed once, printed and logged."""

from dataclasses import asdict, dataclass
from typing import Any

from model.flops import count_parameters, training_flops_per_token
from pipeline.config import Config
from pipeline.errors import ConfigError

MAX_AUTO_MICRO_BATCH_TOKENS = 32_768
"""Tokens of an automatic micro-batch: at hidden size 1024 they fill an H100's tiles to 97 %."""

_CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments


@dataclass(frozen=True)
class Plan:
    """What a run does, in numbers.

    Attributes:
        world_size: Processes.
        micro_batch_rows: Rows of one forward pass.
        micro_batches_per_step: Micro-batches in a global batch.
        accumulation_steps: Micro-batches that each process runs per step; some may be empty.
        flops_per_token: Nominal training FLOPs, see ``model.flops``.
        checkpoint_bytes: One checkpoint: weights and both moments in fp32.
        disk_bytes: Checkpoints that are kept plus one being written.
        token_bytes: Of one token in a shard.
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
    flops_per_token: float
    flops_per_step: float
    flops_total: float
    checkpoint_bytes: int
    disk_bytes: int
    token_bytes: int

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
    """
    vocab_size = vocab_size or config.tokenizer.vocab_size
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
    flops_per_token = training_flops_per_token(config.model, config.objective, vocab_size, length)
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
        total_tokens=rows * length * config.train.steps,
        steps=config.train.steps,
        parameters_trained=parameters["total"],
        parameters_discriminator=parameters["discriminator"],
        vocab_size=vocab_size,
        flops_per_token=flops_per_token,
        flops_per_step=flops_per_token * rows * length,
        flops_total=flops_per_token * rows * length * config.train.steps,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * (config.train.keep_checkpoints + 1),
        token_bytes=2 if vocab_size < 65536 else 4,
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
        ("FLOPs in all", f"{plan.flops_total:.3e}"),
        ("one checkpoint", f"{plan.checkpoint_bytes / 2**30:.2f} GiB"),
        ("disk for shards", f"{plan.token_bytes} bytes per token of the corpora"),
        ("disk for checkpoints", f"{plan.disk_bytes / 2**30:.2f} GiB"),
    ]
