"""The schema of what trains: processes, length and batches, optimizer, DeepSpeed, kernels."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model.config import Section

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
MOST_STEPS, MOST_FLOPS, MOST_PROFILED_STEPS = 10**9, 1e30, 20
LayerDecayDepth = Literal["released", "fixed"]


class LaunchConfig(Section):
    """Processes and threads."""

    processes: Auto | Count = Field("auto", description="Processes on this machine; auto: one a GPU, or one on CPU.")
    threads_per_process: Auto | Count = Field(
        "auto", description="CPU threads of a process; auto: cores over processes. Rounding depends on it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    restarts: int = Field(
        3,
        ge=0,
        description="How often in a row a stage's processes are started again from the last checkpoint, when "
        "one has died and none has got further than the time before.",
    )
    peer_timeout_seconds: float = Field(
        30.0, gt=0, description="Without a sign of life for so long, a process is taken for lost and all end."
    )
    hang_timeout_seconds: float = Field(
        1800.0, gt=0, description="All processes alive and none of them getting on for so long: all end, with stacks."
    )


class TrainConfig(Section):
    """Length, batches, precision and what is written when."""

    steps: int = Field(ge=1, le=MOST_STEPS, description="Optimizer steps of the whole run; the schedule ends there.")
    flops: float | None = Field(
        None, gt=0, lt=MOST_FLOPS, strict=True, description="Nominal FLOPs of the whole run, from which steps follow."
    )
    initial_discriminator: Path | None = Field(
        None, description="Hugging Face folder, google/electra-* among them, that the discriminator starts from."
    )
    initial_generator: Path | None = Field(None, description="The same for the generator.")
    global_batch_size: int = Field(ge=1, description="Rows of sequence_length tokens per step.")
    micro_batch_size: Auto | Count = Field(
        "auto", description="Rows of one forward pass; divides global_batch_size. auto: at most 32,768 tokens."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="Of weights and activations in a pass.")
    stop_after_seconds: float | None = Field(None, gt=0, description="Save and exit 85 after so long in this attempt.")
    stop_before_limit_seconds: float = Field(
        120.0, gt=0, description="Stop and save so long before the job's time limit, whether Slurm warns or not."
    )
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints (released: 1,000).")
    checkpoint_seconds: float | None = Field(None, gt=0, description="Also when the last is so old; null: no matter.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that are kept.")
    keep_every: int | None = Field(None, ge=1, description="Checkpoints of steps that this divides are kept for ever.")
    keep_best: bool = Field(False, description="Keep the one with the lowest held-out loss; needs held_out_every.")
    log_every: int = Field(100, ge=1, description="Steps between lines of the journal; metrics are means over them.")
    held_out_rows: int = Field(
        512, ge=0, description="Held-out rows scored at the end and in between, from all of what is held out; 0: none."
    )
    held_out_every: int | None = Field(
        None, ge=1, description="Steps between scores of the held-out rows, a multiple of log_every; null: at the end."
    )
    chance_intervals: int = Field(
        20, ge=0, description="Logged intervals with the discriminator at chance before a warning; 0: never."
    )
    max_skipped_steps: int = Field(50, ge=0, description="Steps with NaN or inf that are skipped before exit 93.")
    spike_threshold: float | None = Field(
        8.0, gt=0, description="A logged loss so many spreads above those before is called a spike; null: none is."
    )
    spike_rollbacks: int = Field(
        0,
        ge=0,
        description="How often to go back before a spike and leave out its rows; more end in exit 93; 0: never.",
    )
    check_replicas_every: int | None = Field(
        None, ge=1, description="Steps between comparisons of the weights across processes, ZeRO 0 to 2; null: never."
    )
    deterministic: bool = Field(False, description="Deterministic algorithms on GPU; CPU always is.")
    activation_checkpointing: bool = Field(False, description="Keep layers' inputs alone and run each layer again.")
    profile_steps: tuple[Count, Count] | None = Field(
        None, description="Steps torch's profiler records, 20 at most: the first, and the first after; null: none."
    )


class OptimizerConfig(Section):
    """AdamW as in google-research/electra's ``model/optimization.py``, and what others use."""

    name: Literal["adamw", "lamb"] = Field(
        "adamw", description="Adam with decoupled weight decay; lamb: scaled by tensor, for batches of many thousands."
    )
    lr: float = Field(gt=0, description="Peak learning rate: 5e-4 for Small, 2e-4 else.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: float = Field(1e-6, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.01, ge=0, description="On all but LayerNorm and biases; embeddings decay too.")
    bias_correction: bool = Field(False, description="The released optimizer has none.")
    schedule: Literal["linear_times_warmup", "linear", "cosine", "wsd"] = Field(
        "linear_times_warmup",
        description="linear_times_warmup: decay over all steps times min(1, step / warmup_steps), released; the "
        "others warm up first and then decay: linear, cosine, or wsd (constant, then linear over decay_fraction).",
    )
    warmup_steps: int = Field(10_000, ge=0, description="Steps of warm-up.")
    decay_power: float = Field(1.0, gt=0, description="Exponent of the linear decays: 1; NVIDIA's recipe: 0.5.")
    decay_fraction: float = Field(0.1, gt=0, le=1, description="Share of all steps in which wsd decays.")
    final_lr_fraction: float = Field(0.0, ge=0, lt=1, description="Learning rate at the end over the peak.")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Learning rate of a layer over that of the one above; for continued pretraining."
    )
    layer_decay_depth: LayerDecayDepth = Field(
        "fixed", description="Which layer gets which power; see pipeline/optimizer.py."
    )
    gradient_clip: float = Field(1.0, gt=0, description="Largest global norm, over both networks together.")


class DeepSpeedConfig(Section):
    """DeepSpeed's own settings."""

    config: Path | None = Field(None, description="A DeepSpeed JSON; default: ZeRO stage 1.")


class KernelsConfig(Section):
    """Implementations of fused operations."""

    backend: Literal["auto", "reference", "torch", "triton", "apex", "megatron"] = Field(
        "auto",
        description="auto takes for each operation the backend that is fastest on the device, on CUDA by prediction; "
        "others run what they have, and auto's the rest. Megatron's GELU is the tanh form.",
    )
    compile_layers: bool = Field(False, description="Compile what follows attention in a layer; kept in run.dir.")
