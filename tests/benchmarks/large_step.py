"""The full training step of ELECTRA-Large, AdamW included: this engine against transformers.

    hf_eager                eager attention, AMP bf16, MLM head on all positions
    hf_sdpa_compile         torch's fused attention, parts under torch.compile, otherwise the same
    hf_sdpa_compile_gather  the same with the MLM head on the masked positions alone
    ours_auto               this engine through DeepSpeed ZeRO-1 with kernels.backend=auto, each row one piece
    ours_auto_several       the same on rows in which documents end
    ours_triton, ours_torch ours_auto with another backend

The peers read the rows of ``ours_auto``, masks included, and no attention mask: their fastest
case. Masking is done beforehand for all. Rates count every token of a row and the nominal FLOPs of
``model.flops``; a ratio is ours over the peer in tokens/s.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo
from ceilings import square_product
from peers import HfTrainer, peer_inputs
from section import CheckFailedError, Context
from synthetic import build_engine, join_process_group, make_config, micro_batches, write_small_buckets
from timing import Timer, interleave, paired_ratio, spread

from model.batch import GlobalCounts, MicroBatch
from model.flops import training_flops_per_token
from pipeline.config import Config
from pipeline.devices import peak_memory_gib
from pipeline.engine import Engine

NOMINAL_TFLOP_PER_S = 989  # dense bf16 of an H100 or H200, by NVIDIA's datasheet
RATIO_TARGETS = [(64, "hf_eager", 2.2), (64, "hf_sdpa_compile", 1.3), (64, "hf_sdpa_compile_gather", 1.25)]
RATE_TARGETS = [(64, 473.0), (16, 0.85 * 473.0)]
"""Rows, and the least TFLOP/s of ``ours_auto``."""
ROWS = (64, 16, 128, 8, 4)
"""Of a micro-batch, in the order in which they are measured; what there is no time for is skipped from the end."""
TINY_ROWS = (4, 8)
_SETUP_S, _ROW_S = 20.0, 0.3  # a size is begun with that much time left
_PREPARED_BATCHES = 4
_MAX_CHUNKS = 8
_NO_ROOM = "do not fit"
Batches = dict[bool, list[MicroBatch]]


@dataclass
class Residence:
    """Device memory that weights, gradients and moments hold between steps."""

    num_bytes: int


@dataclass
class Contender:
    """A training step to be timed.

    Attributes:
        step: One optimizer step on all rows, in so many forward passes as its argument says.
        residence: What stays between steps; contenders that share a model share it.
        can_split: Whether a step may be made up of several passes.
        compiled: Whether torch.compile made it.
        chunks: Passes of a step: 1, or more where all rows at once do not fit.
    """

    step: Callable[[int], None]
    residence: Residence
    can_split: bool = False
    compiled: bool = False
    chunks: int = 1
    first_step_s: float = 0.0
    peak_gib: float = 0.0


@dataclass
class Model:
    """Something that trains, and what it holds.

    Attributes:
        steps: By contender: makes its step on rows of one piece and on rows of several.
        residence: Its memory between steps.
        parameters: How many it trains.
        is_ours: Whether it is the program's engine; else steps may be split, and may fail.
        compiled: Whether torch.compile made parts of it.
    """

    steps: dict[str, Callable[[Batches], Callable[[int], None]]]
    residence: Residence
    parameters: int
    is_ours: bool = False
    compiled: bool = False


def run(context: Context) -> None:
    """Fills one record for each micro-batch size, the most important one first.

    Raises:
        CheckFailedError: The peer trains another number of parameters, so the work is not the same; or a step of
            ours does not run.
    """
    timer = Timer(context.device)
    torch.manual_seed(context.seed)
    torch._dynamo.config.recompile_limit = 64  # each size is a shape of its own
    join_process_group(context.device)
    results = context.results
    results.update(clock=timer.clock, nominal_tflop_per_s=NOMINAL_TFLOP_PER_S if context.is_cuda else None)
    results.update(ceiling=square_product(timer, context.is_tiny), micro_batches=[], skipped=[], targets=[])
    with TemporaryDirectory() as folder:
        models = _models(context, Path(folder))
        results["parameters"] = {name: model.parameters for model in models for name in model.steps}
        if len(set(results["parameters"].values())) > 1:
            raise CheckFailedError(f"the contenders train different numbers of parameters: {results['parameters']}")
        for rows in TINY_ROWS if context.is_tiny else ROWS:
            if context.left_s() < _SETUP_S + rows * _ROW_S:
                results["skipped"].append({"rows": rows, "reason": f"{context.left_s():.0f} s were left"})
                continue
            record: dict[str, Any] = {}
            results["micro_batches"].append(record)
            _measure_size(context, timer, _config(context, rows, Path(folder)), models, record)
            results["targets"] = targets(results["micro_batches"])
    broken = [
        f"{record['rows']} rows: {name}: {reason}"
        for record in results["micro_batches"]
        for name, reason in record["not_measured"].items()
        if name.startswith("ours") and _NO_ROOM not in reason
    ]
    if broken:
        raise CheckFailedError("; ".join(broken))


def _config(context: Context, rows: int, folder: Path, backend: str = "auto") -> Config:
    sections: dict[str, Any] = {"deepspeed": {"config": write_small_buckets(folder)}} if context.is_tiny else {}
    return make_config(context.is_tiny, rows, **sections, kernels={"backend": backend})


def _models(context: Context, folder: Path) -> list[Model]:
    """The peers, then ours by backend; on a CPU nothing is compiled or interpreted, which takes minutes."""
    models = []
    name = "hf_sdpa_compile" if context.is_cuda else "hf_sdpa"
    for attention, compiles, gathers in (
        ("eager", False, {"hf_eager": False}),
        ("sdpa", context.is_cuda, {name: False, f"{name}_gather": True}),
    ):
        before = _allocated_bytes(context)
        config = _config(context, TINY_ROWS[0], folder)
        trainer = HfTrainer(config, config.tokenizer.vocab_size, attention, context.device, compiles)
        steps = {name: partial(_peer_step, trainer, gather) for name, gather in gathers.items()}
        residence = Residence(_allocated_bytes(context) - before)
        models.append(Model(steps, residence, trainer.num_parameters, compiled=compiles))
    for backend in ("auto", "triton", "torch") if context.is_cuda else ("auto",):
        before = _allocated_bytes(context)
        engine, plan = build_engine(_config(context, TINY_ROWS[0], folder, backend), context.device, context.seed)
        context.results.setdefault("kernels", {})[backend] = engine.model.kernels.names
        steps = {f"ours_{backend}": partial(_own_step, engine, False)}
        if backend == "auto":
            steps["ours_auto_several"] = partial(_own_step, engine, True)
        residence = Residence(_allocated_bytes(context) - before)
        models.append(Model(steps, residence, plan.parameters_trained, is_ours=True))
    return models


def _measure_size(context: Context, timer: Timer, config: Config, models: list[Model], record: dict[str, Any]) -> None:
    """One micro-batch size: warm-up of each contender, then interleaved rounds."""
    rows, length = config.train.global_batch_size, config.data.sequence_length
    batches = {
        several: micro_batches(config, context.device, _PREPARED_BATCHES, several, context.seed, context.is_tiny)
        for several in (False, True)
    }
    pieces_per_row = float(batches[True][0].packing.pieces_BT.amax(1).double().mean() + 1)
    record.update(rows=rows, sequence_length_tokens=length, pieces_per_row=pieces_per_row, not_measured={})
    contenders: dict[str, Contender] = {}
    for model in models:
        for name, make in model.steps.items():
            contender = Contender(make(batches), model.residence, can_split=not model.is_ours, compiled=model.compiled)
            reason = _warm_up(context, contender, rows)
            if reason:
                record["not_measured"][name] = reason
            else:
                contenders[name] = contender
    rounds, calls = (1, 1) if context.is_tiny else (3, 2)
    seconds = interleave(
        timer,
        {name: lambda c=contender: c.step(c.chunks) for name, contender in contenders.items()},
        rounds,
        calls,
        before=torch.cuda.empty_cache if context.is_cuda else None,
    )
    ceiling = context.results["ceiling"]["tflop_per_s"]
    record["contenders"] = {
        name: _rates(context, config, contenders[name], values, ceiling) for name, values in seconds.items()
    }
    record["ratios"] = dict(_ratios(seconds))
    _release(context)


def _own_step(engine: Engine, several: bool, batches: Batches) -> Callable[[int], None]:
    return engine_step(engine, batches[several])


def _peer_step(trainer: HfTrainer, gathers: bool, batches: Batches) -> Callable[[int], None]:
    rotating = itertools.cycle([peer_inputs(batch) for batch in batches[False]])
    return lambda chunks: trainer.step(next(rotating), chunks, gathers)


def engine_step(engine: Engine, batches: list[MicroBatch]) -> Callable[..., None]:
    """A step of the program's engine on the next of some prepared micro-batches."""
    rotating, seeds = itertools.cycle(batches), itertools.count(1)  # samples and dropout differ each time
    counts = {id(batch): GlobalCounts(float(batch.num_masked), batch.num_tokens) for batch in batches}

    def step(_: int = 1) -> None:
        batch = next(rotating)
        engine.step([(replace(batch, seed=next(seeds)), counts[id(batch)])], 1e-4)

    return step


def _warm_up(context: Context, contender: Contender, rows: int) -> str | None:
    """Finds the chunks that fit, notes memory; returns why the contender cannot be measured, or None."""
    message = ""
    while contender.chunks <= (min(_MAX_CHUNKS, rows) if contender.can_split else 1):
        others = _allocated_bytes(context) - contender.residence.num_bytes
        if context.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            begin = time.monotonic()
            contender.step(contender.chunks)
            _synchronize(context)
            contender.first_step_s = time.monotonic() - begin
            contender.step(contender.chunks)
            contender.peak_gib = peak_memory_gib(context.device) - (others / 2**30 if context.is_cuda else 0)
            contender.residence.num_bytes = _allocated_bytes(context) - others
            return None
        except torch.OutOfMemoryError as error:
            message = f"{rows} rows {_NO_ROOM}: {str(error).splitlines()[0]}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        _release(context)
        contender.chunks *= 2
    return message


def _rates(
    context: Context, config: Config, contender: Contender, seconds: list[float], ceiling: float
) -> dict[str, Any]:
    vocab_size, length = config.tokenizer.vocab_size, config.data.sequence_length
    step_s = spread(seconds)
    tokens_per_s = config.train.global_batch_size * length / step_s["median"]
    flops_per_token = training_flops_per_token(config.model, config.objective, vocab_size, length)
    tflop_per_s = tokens_per_s * flops_per_token / 1e12
    return {
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "tflop_per_s": tflop_per_s,
        "pct_of_nominal": 100 * tflop_per_s / NOMINAL_TFLOP_PER_S if context.is_cuda else None,
        "pct_of_ceiling": 100 * tflop_per_s / ceiling,
        "peak_gib": contender.peak_gib,
        "chunks": contender.chunks,
        "compiled": contender.compiled,
        "first_step_s": contender.first_step_s,
    }


def _ratios(seconds: dict[str, list[float]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ours over each peer in tokens/s: above 1 is faster."""
    for ours in seconds:
        for peer in seconds:
            if ours.startswith("ours") and peer.startswith("hf"):
                yield f"{ours} / {peer}", paired_ratio(seconds[peer], seconds[ours])


def targets(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at, of the sizes and contenders that were measured: name, value, target, and whether it is met."""
    found = []
    by_rows = {record["rows"]: record for record in records if "ratios" in record}
    for rows, peer, target in RATIO_TARGETS:
        ratio = by_rows.get(rows, {"ratios": {}})["ratios"].get(f"ours_auto / {peer}")
        if ratio:
            found.append((f"{rows} rows: ours_auto / {peer}", ratio["median"], target))
    for rows, target in RATE_TARGETS:
        rates = by_rows.get(rows, {"contenders": {}})["contenders"].get("ours_auto")
        if rates:
            found.append((f"{rows} rows: ours_auto, TFLOP/s", rates["tflop_per_s"], target))
    return [{"name": name, "value": v, "target": t, "met": v >= t} for name, v, t in found]


def _allocated_bytes(context: Context) -> int:
    return torch.cuda.memory_allocated() if context.is_cuda else 0


def _synchronize(context: Context) -> None:
    if context.is_cuda:
        torch.cuda.synchronize()


def _release(context: Context) -> None:
    gc.collect()
    if context.is_cuda:
        torch.cuda.empty_cache()


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    lines = []
    for record in results.get("micro_batches", []):
        for name, rates in record.get("contenders", {}).items():
            nominal = f", {rates['pct_of_nominal']:.1f} % of 989" if rates["pct_of_nominal"] else ""
            chunks = f", in {rates['chunks']} passes" if rates["chunks"] > 1 else ""
            lines.append((
                f"Large step, {record['rows']} rows: {name}",
                f"{rates['tokens_per_s']:,.0f} tokens/s, {rates['tflop_per_s']:.3g} TFLOP/s{nominal}, "
                f"{rates['pct_of_ceiling']:.1f} % of the product, {rates['peak_gib']:.3g} GiB{chunks}",
            ))  # fmt: skip
        for name, reason in record.get("not_measured", {}).items():
            lines.append((f"Large step, {record['rows']} rows: {name}", f"not measured: {reason}"))
        for name, ratio in record.get("ratios", {}).items():
            lines.append((f"**{record['rows']} rows: {name}**", f"**{ratio['median']:.2f}×**"))
    for target in results.get("targets", []):
        met = "met" if target["met"] else "not met"
        lines.append((f"target, {target['name']}", f"{target['value']:.3g} of {target['target']:.3g}: **{met}**"))
    lines += [(f"Large step, {r['rows']} rows", f"skipped: {r['reason']}") for r in results.get("skipped", [])]
    return lines
