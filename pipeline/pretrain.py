"""The pretrain stage: shards to checkpoints, the story of a run from its first step to its last.

    rows of step s ──mask──▶ micro-batches ──generator, sample, discriminator──▶ one loss ──▶ one update
         ▲ pure function of (seed, step)                                                        │
         └── checkpoint = weights, moments, step, open sums ◀── every n steps ──────────────────┘

Every process runs this. Rank 0 writes the journal and the checkpoints.
"""

import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_shards.loader import RowLoader
from model.batch import GlobalCounts, MicroBatch
from model.electra import Electra
from model.keyed import seed_for
from pipeline import checkpoint as checkpoints
from pipeline.batches import MicroBatches, mixture_notes, open_rows, to_device
from pipeline.config import Config
from pipeline.devices import (
    agree_on_kernels,
    choose_kernels,
    explaining_lack_of_memory,
    kept_kernels,
    kernels_to_keep,
    peak_flops,
    prepare_layers,
)
from pipeline.distributed import (
    Control,
    Process,
    ignore_stop_signals,
    init_process_group,
    lost_peer,
    processes_on_this_machine,
    resolve_device,
)
from pipeline.engine import Engine
from pipeline.errors import ConfigError, StoppedByFile, StoppedEarly
from pipeline.faults import Faults
from pipeline.goodput import Ledger
from pipeline.held_out import HeldOut
from pipeline.launch import threads_per_process
from pipeline.log import log_to_file, logger
from pipeline.plan import Plan, describe, make_plan
from pipeline.prefetch import Prefetcher
from pipeline.profiling import StepProfiler
from pipeline.restore import restore
from pipeline.schedule import learning_rate
from pipeline.spikes import read_skips
from pipeline.stages import StageRecord, free_bytes, shard_folders, stage_folder, write_record
from pipeline.stopping import STOP_FILE, StopRequest
from pipeline.tokenize import load_tokenize_output
from pipeline.training import Guards, Training
from pipeline.two_stage import generators_weights, stage_at
from pipeline.unigram import control_log_probabilities
from pipeline.watch import Watch, own_store

_INITIALISATION = 0  # stream of random numbers
_LEAST_SHARE_IN_ROWS = 0.95


def run_pretrain(config: Config, record: StageRecord, process: Process) -> None:
    """Trains from the newest checkpoint, or from the start, to ``train.steps``.

    Raises:
        StoppedEarly: A signal, a time limit or the file STOP; everything is saved.
        DoNotRequeueError: Too many steps with NaN or inf.
    """
    ledger = Ledger(stage_folder(config, "pretrain") if process.rank == 0 else None, record.attempts, record.lineage)
    stop = StopRequest(
        config.train.stop_after_seconds,
        config.train.stop_before_limit_seconds,
        config.run_folder / STOP_FILE if process.rank == 0 else None,
    )
    folder = stage_folder(config, "pretrain")
    log_to_file(folder / "log.txt", process.rank)
    device = resolve_device(config.launch.device)
    threads = record.numerics.get("threads") if config.launch.threads_per_process == "auto" else None
    threads = threads or threads_per_process(config, processes_on_this_machine(process))
    torch.set_num_threads(threads)
    choose_algorithms(config.train.deterministic)
    init_process_group(process, device)
    control = Control(device)
    attempt, number = control.broadcast((f"{record.lineage}/{record.attempts}", record.attempts))
    times = config.launch.peer_timeout_seconds, config.launch.hang_timeout_seconds
    watch = Watch(process, own_store(process, attempt, times[0]), *times, folder / "stacks")
    with watch, explaining_lack_of_memory(process):
        guards = Guards(Faults(process.rank, number), watch, ledger)
        run, batches, held_out = _prepare(config, record, process, control, device, threads, guards)
        try:
            _train(run, batches, held_out, stop)
            run.enter("held_out", run.state.step)
            record.metrics = held_out.score(run.trains, partial(watch.mark, "held_out", run.state.step))
        except RuntimeError as error:
            raise lost_peer(error, process, run.step) or error from None
        finally:
            run.close()
    record.metrics_step = run.state.step
    _report_held_out(config, record.metrics)
    if process.rank == 0:
        newest = checkpoints.load(folder / "checkpoints", run.state.step)
        record.output = {"checkpoint_step": run.state.step, "checkpoint_sha256": newest.digest}


def _prepare(
    config: Config, record: StageRecord, process: Process, control: Control, device: str, threads: int, guards: Guards
) -> tuple[Training, MicroBatches, HeldOut]:
    """Everything before the first step: rows, kernels, model, engine, and the state to go on from."""
    folder = stage_folder(config, "pretrain")
    tokenized = load_tokenize_output(config)
    folders, weights = shard_folders(config, tokenized, warns=process.local_rank == 0)
    plan = make_plan(config, process.world_size, tokenized["vocab_size"], record.numerics.get("micro_batch_rows"))
    kept = kept_kernels(record.numerics, device)
    kernels = agree_on_kernels(config, choose_kernels(config, device, kept), control)
    _check_disk(folder, plan, control)
    peak, peak_source = peak_flops(device, threads, config.train.precision)
    _log_plan(plan)
    for operation, name in kernels.names.items():
        logger.info("%-32s %s (%s)", f"kernel of {operation}", name, kernels.reasons[operation])
    logger.info("MFU refers to %.2f TFLOP/s per process (%s)", peak / 1e12, peak_source)

    torch.manual_seed(seed_for(config.run.seed, 0, 0, _INITIALISATION))
    model = Electra(config.model, config.objective, plan.vocab_size, kernels)
    if config.objective.generator != "network":
        model.set_control(control_log_probabilities(config, folders, weights, plan.vocab_size))
    prepare_layers(config, model)
    engine = Engine(config, plan, model, device)
    guards.ledger.enter("restore")
    state = restore(config, folder, engine, control, plan.vocab_size)
    guards.ledger.enter("startup")
    loader = open_rows(config, folders, weights, state.rows_before)
    _log_rows(plan, loader, weights)
    if process.rank == 0:
        _announce_numerics(config, record, {
            "world_size": process.world_size, "threads": threads, "device": device, "zero_stage": engine.stage,
            "micro_batch_rows": plan.micro_batch_rows, "kernels": kernels.names,
            "compile_layers": config.kernels.compile_layers,
        }, kernels_to_keep(config, kernels, kept))  # fmt: skip
    # A fork's are written while it is restored, by the first process.
    skips = control.broadcast(read_skips(folder) if control.is_first else None)
    batches = MicroBatches(config, plan, process, loader, device, skips)
    held_out = HeldOut(config, plan, engine, folders, weights, process, control, device)
    run = Training(config, plan, engine, control, process, state, folder, device, peak, guards)
    return run, batches, held_out


def _train(run: Training, batches: MicroBatches, held_out: HeldOut, stop: StopRequest) -> None:
    """The loop: one iteration is one optimizer step."""
    train, state = run.config.train, run.state
    run.begin()
    with (
        Prefetcher(batches, train.steps, run.device) as prefetcher,
        StepProfiler(run.config, run.process, run.folder, run.device) as profiler,
    ):
        while state.step < train.steps:
            with profiler.step(state.step + 1):
                _train_step(run, prefetcher, held_out, stop)
    run.settle()


def _train_step(run: Training, prefetcher: Prefetcher, held_out: HeldOut, stop: StopRequest) -> None:
    """One optimizer step, and what is written after it."""
    config, state, engine = run.config, run.state, run.engine
    began, step = time.monotonic(), state.step + 1
    run.enter("data", step)
    micro_batches = [batch for _, batch in prefetcher.of_step(state.step)]
    run.enter("exchange", step)
    masked = float(sum(batch.num_masked for batch in micro_batches))
    tokens = sum(batch.num_tokens for batch in micro_batches)
    # One exchange a step, on the host: the losses' denominators, whether anybody was told to stop, and what the first
    # process wants: a checkpoint by its clock, or to go back before a spike.
    is_timed = run.process.rank == 0 and run.is_save_due
    goes_back = bool(run.spike) and config.train.spike_rollbacks > 0
    told = [float(stop.reason() is not None), float(is_timed), float(goes_back)]
    stops, saves, spikes, masked, tokens = run.control.sum([*told, masked, tokens])
    if spikes:
        run.roll_back()
    if stops:
        _stop(run, stop)
    stage = stage_at(config, state.applied_steps)
    if stage.trains == "discriminator" and state.applied_steps == stage.first_step:
        engine.copy_weights(generators_weights(engine.shapes()))
    lr = learning_rate(config.optimizer, state.applied_steps - stage.first_step, stage.steps)
    counted = with_counts(config, run.plan, micro_batches, GlobalCounts(max(masked, 1.0), max(tokens, 1.0)))
    struck = run.enter("step", step)
    if "nan" in struck:
        counted = [(batch, GlobalCounts(math.nan, math.nan)) for batch, _ in counted]
    if "flip" in struck:
        engine.flip_a_bit()
    on_device = _on_device(run, counted)
    state.step = step
    result = engine.step(on_device, lr, stage.trains, measures_norms=run.is_logged)
    run.account(result, time.monotonic() - began)
    if run.is_logged:
        every = config.train.held_out_every
        scores = {}
        if every and step % every == 0:
            run.enter("held_out", step)
            scores = held_out.score(run.trains, partial(run.watch.mark, "held_out", step))
        run.enter("log", step)
        run.log(result, lr, scores, held_out.digest)
    every = config.train.check_replicas_every
    if every and step % every == 0:
        run.compare_replicas()
    run.is_overdue = run.is_overdue or bool(saves) or step % config.train.checkpoint_every == 0
    if (run.is_overdue and result.applied) or step == config.train.steps:  # weights that fail are no good to go back to
        run.save()


def _on_device(
    run: Training, counted: list[tuple[MicroBatch, GlobalCounts]]
) -> Iterator[tuple[MicroBatch, GlobalCounts]]:
    for batch, counts in counted:
        run.watch.mark("step", run.state.step)
        yield to_device(batch, run.device), counts


def _stop(run: Training, stop: StopRequest) -> None:
    """All processes come here at the same step."""
    run.save()
    run.enter("stop", run.state.step)
    run.settle()
    ignore_stop_signals()
    raise (StoppedByFile if stop.is_held else StoppedEarly)(
        f"stopped at step {run.state.step:,} of {run.config.train.steps:,} ({stop.reason() or 'another process'}); "
        "everything is saved, the same command goes on"
    )


def with_counts(
    config: Config, plan: Plan, micro_batches: list[MicroBatch], counts: GlobalCounts
) -> list[tuple[MicroBatch, GlobalCounts]]:
    """Each micro-batch with the denominators of its losses.

    ``fixed``: those of the global batch. ``released``: its own times the number of micro-batches, so
    that the losses add up to the mean of the micro-batches' own means.
    """
    if config.objective.loss_normalization == "global":
        return [(batch, counts) for batch in micro_batches]
    parts = plan.micro_batches_per_step
    return [
        (batch, GlobalCounts(max(float(batch.num_masked), 1.0) * parts, max(batch.num_tokens, 1.0) * parts))
        for batch in micro_batches
    ]


def _log_plan(plan: Plan) -> None:
    for name, value in describe(plan):
        logger.info("%-32s %s", name, value)


def _log_rows(plan: Plan, loader: RowLoader, weights: list[float]) -> None:
    logger.info("%-32s %.1f over %s rows", "epochs", plan.total_tokens / plan.sequence_length_tokens / loader.num_rows,
                f"{loader.num_rows:,}")  # fmt: skip
    for level, note in mixture_notes(loader.shares, weights):
        logger.log(level, note)
    if loader.share_in_rows < _LEAST_SHARE_IN_ROWS:
        logger.warning(
            "only %.0f %% of the tokens lie in rows: shards of small files are shorter than two rows of %d tokens; "
            "join the files, or raise data.task_bytes", 100 * loader.share_in_rows, plan.sequence_length_tokens,
        )  # fmt: skip


def choose_algorithms(deterministic: bool) -> None:
    """Deterministic algorithms where several exist; takes effect before the first product on a GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    # Filling every fresh tensor would cost DeepSpeed's buckets of half a billion elements each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _announce_numerics(
    config: Config, record: StageRecord, numerics: dict[str, Any], kernels_kept: dict[str, str]
) -> None:
    """Says what differs from the attempt before, and stores that and what later ones are to take."""
    for key, value in numerics.items():
        before = record.numerics.get(key, value)
        if before != value:
            logger.warning("%s changed from %s to %s: results agree to rounding, not bitwise", key, before, value)
    record.numerics = numerics | {"kernels_kept": kernels_kept}
    write_record(config, record)


def _check_disk(folder: Path, plan: Plan, control: Control) -> None:
    """Room for all checkpoints that the run will hold at once, less those that are there."""
    problem = ""
    if control.is_first:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # from now on its absence means a loss
        checkpoints.remove_unfinished(folder / "checkpoints")
        there = len(checkpoints.list_steps(folder / "checkpoints"))
        free, needed = free_bytes(folder), plan.disk_bytes - there * plan.checkpoint_bytes
        if free < max(needed, plan.checkpoint_bytes):
            problem = (
                f"{folder}: {free / 2**30:.2f} GiB free, but the checkpoints that train.keep_checkpoints and "
                f"keep_every keep need {needed / 2**30:.2f} GiB more; free space, keep fewer, or set run.dir to "
                "another file system"
            )
    problem = control.broadcast(problem)
    if problem:
        raise ConfigError(problem)


def _why_nothing_is_scored(config: Config) -> str:
    if config.train.held_out_rows == 0:
        return "train.held_out_rows=0"
    if config.data.held_out_fraction == 0:
        return "data.held_out_fraction=0"
    return (
        f"what data.held_out_fraction={config.data.held_out_fraction:g} holds out is less than two rows of "
        f"{config.data.sequence_length} tokens in every shard; raise it, or data.task_bytes, in a new run"
    )


def _report_held_out(config: Config, metrics: dict[str, float]) -> None:
    if not metrics:
        logger.info("nothing is scored: %s", _why_nothing_is_scored(config))
        return
    text = "held-out: loss on [MASK] %.3f nats (unigram entropy %.3f)"
    shown = [metrics.get("held_out/mask_token_loss", math.nan), metrics["held_out/unigram_entropy"]]
    if "held_out/discriminator_auc" in metrics:
        text += "; discriminator's AUC %.4f ± %.4f"
        shown += [metrics["held_out/discriminator_auc"], metrics["held_out/discriminator_auc_standard_error"]]
    if "held_out/prediction_accuracy" in metrics:
        text += "; originals predicted %.1f %%"
        shown.append(100 * metrics["held_out/prediction_accuracy"])
    logger.info(text, *shown)
