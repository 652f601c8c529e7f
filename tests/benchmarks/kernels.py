"""Every backend of every fused operation: errors against float64, dropout's masks, times beside those of others.

Operations and backends are read from ``model.kernels.select``, so a new backend is measured without a change here.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import kernel_adamw
import kernel_attention
import kernel_pointwise
import kernel_predict
import torch
import torch._dynamo
from ceilings import device_copy, square_product
from kernel_case import dropout_record, random_dropout
from section import CheckFailedError, Context
from timing import Timer, Work, interleave, paired_ratio, spread

from model.kernels.select import OPERATIONS, find, table, why_not

CASES: dict[str, Callable[..., Iterator[Any]]] = {
    "attention": kernel_attention.cases,
    "add_norm": kernel_pointwise.add_norm,
    "bias_gelu": kernel_pointwise.bias_gelu,
    "embed": kernel_pointwise.embed,
    "predict": kernel_predict.predict,
    "detect": kernel_pointwise.detect,
    "adamw": kernel_adamw.adamw,
}
"""Of each operation: cases by device, whether they are tiny, and whether they are for times."""

ERROR_LIMITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
"""Of ||out - ref|| / ||ref||: rounding of the type stays well below, a wrong result well above."""

_PROCESSES = 8
_COMPILE_S = 40.0  # left to the section, below which nothing is compiled any more
_TIMES_S = 15.0  # likewise, for another case's times


def run(context: Context) -> None:
    """Fills ``accuracy``, ``dropout`` and ``times``, lists of records; what could not be had is in ``unavailable``
    (by the program's own word), ``unusable`` (it raised) and ``skipped`` (no time).

    Raises:
        CheckFailedError: An error over its limit (NaN counts as one), or dropout that is not as asked for.
    """
    assert CASES.keys() == OPERATIONS.keys(), "each operation has cases here"
    timer = Timer(context.device)
    torch.manual_seed(context.seed)
    torch._dynamo.config.recompile_limit = 64  # each case is a shape of its own
    results = context.results
    results.update(clock=timer.clock, error_limits=ERROR_LIMITS)
    results.update(accuracy=[], dropout=[], times=[], unusable=[], peers_unusable=[], skipped=[])
    _check_accuracy(context)
    for name in CASES:
        _check_dropout(context, name)
    ceilings = square_product(timer, context.is_tiny), device_copy(timer, context.is_tiny)
    results["ceilings"] = {"tflop_per_s": ceilings[0]["tflop_per_s"], "tb_per_s": ceilings[1]["tb_per_s"]}
    for name in CASES:
        _time(context, timer, name)
    listed = table(context.device) + table(context.device, approximate_gelu=True)
    results["unavailable"] = {f"{op}/{b}": reason for op, b, reason in listed if reason != "works"}
    problems = _problems(results)
    if problems:
        raise CheckFailedError("; ".join(problems))


def backends(operation: str, device: str, tanh_gelu: bool) -> dict[str, Any]:
    """The function of each backend that works here."""
    names = [name for listed, name, _ in table(device) if listed == operation]
    return {name: find(operation, name) for name in names if why_not(operation, name, device, tanh_gelu) is None}


def accuracy(operation: str, device: str, is_tiny: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Errors of each case and backend, without dropout and with it; ``error`` where it raised."""
    for case in CASES[operation](device, is_tiny, False):
        for backend, function in backends(operation, device, case.tanh_gelu).items():
            used = dtype
            if device == "cpu" and (operation, backend, dtype) == ("attention", "triton", torch.bfloat16):
                used = torch.float16  # Triton's interpreter multiplies the bits of bf16 matrices as integers
            draws_by_key = case.keep and backend not in case.draws_otherwise
            for dropout in [None, random_dropout(device)] if draws_by_key else [None]:
                record = {"operation": operation, "backend": backend, "case": case.name, "dtype": dtype_name(used)}
                record["dropout"] = dropout.probability if dropout else 0.0
                attempt = _attempt(lambda c=case, f=function, t=used, d=dropout: c.errors(f, t, d))
                yield record | (attempt if "error" in attempt else {"relative_errors": attempt})


def _check_accuracy(context: Context) -> None:
    """On a GPU in several processes: nearly all of the time is Triton's compiler's, which the times need too."""
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if context.is_cuda else [])]
    jobs = [(name, context.device, context.is_tiny, dtype) for name in CASES for dtype in dtypes]
    seeds = range(context.seed, context.seed + len(jobs))
    if not context.is_cuda:
        for job, seed in zip(jobs, seeds, strict=True):
            _file(context, _accuracy_of(job, seed))
        return
    pool = ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([pool.submit(_accuracy_of, job, seed) for job, seed in zip(jobs, seeds, strict=True)]):
            _file(context, done.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _accuracy_of(job: tuple[str, str, bool, torch.dtype], seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    return list(accuracy(*job))


def _file(context: Context, records: list[dict[str, Any]]) -> None:
    for record in records:
        context.results["unusable" if "error" in record else "accuracy"].append(record)


def _check_dropout(context: Context, operation: str) -> None:
    case = next(iter(CASES[operation](context.device, context.is_tiny, False)))
    for backend, function in backends(operation, context.device, case.tanh_gelu).items() if case.keep else ():
        record = {"operation": operation, "backend": backend, "case": case.name}
        record |= _attempt(lambda f=function, b=backend: dropout_record(case, f, b, context.device))
        context.results["unusable" if "error" in record else "dropout"].append(record)


def _time(context: Context, timer: Timer, operation: str) -> None:
    """Times of each case; inputs of one are freed before the next."""
    dtype = torch.float32 if context.is_tiny else torch.bfloat16
    for case in CASES[operation](context.device, context.is_tiny, True):
        if context.left_s() < _TIMES_S:
            context.results["skipped"].append({"operation": operation, "case": case.name, "reason": "no time left"})
            continue
        for record in _times(context, timer, operation, case, dtype):
            where = {"operation": operation, "case": case.name, "dtype": dtype_name(dtype)}
            context.results["times"].append(where | record)
        if context.is_cuda:
            torch.cuda.empty_cache()


def _times(context: Context, timer: Timer, operation: str, case: Any, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Median milliseconds of each contender, interleaved, and the share of the floor that it reaches."""
    own = backends(operation, context.device, case.tanh_gelu)
    works, peaks = {}, {}
    for name, make in _contenders(context, operation, case, dtype, own):
        attempt = _attempt(lambda m=make: {"works": _warm(m())})
        if "error" in attempt:
            where = {"operation": operation, "backend": name, "case": case.name, "dtype": dtype_name(dtype)}
            context.results["unusable" if name in own else "peers_unusable"].append(where | attempt)
        else:
            works[name], peaks[name] = attempt["works"]
    rounds, calls = (1, 1) if context.is_tiny else (4, 3)
    forward = interleave(timer, {name: pair[0] for name, pair in works.items()}, rounds, calls)
    differentiated = {name: pair[1] for name, pair in works.items() if pair[1]}
    both = interleave(timer, differentiated, rounds, calls) if differentiated else forward
    ceilings = context.results["ceilings"]["tb_per_s"] * 1e12, context.results["ceilings"]["tflop_per_s"] * 1e12
    floors = case.forward.floor_s(*ceilings), case.both.floor_s(*ceilings)
    peers = [name for name in works if name not in own]
    fastest = min(peers, key=lambda name: spread(both[name])["median"]) if peers else None
    for name in works:
        medians = spread(forward[name])["median"], spread(both[name])["median"]
        yield {
            "backend": name,
            "is_ours": name in own,
            "forward_ms": medians[0] * 1e3,
            "forward_backward_ms": medians[1] * 1e3,
            "floor_ms": [floor * 1e3 for floor in floors],
            "pct_of_floor": [100 * floor / median for floor, median in zip(floors, medians, strict=True)],
            "peak_mib": peaks[name],
            "fastest_peer": fastest,
            "speed_over_fastest_peer": paired_ratio(both[fastest], both[name]) if fastest else None,
            "speed_over_reference": paired_ratio(both["reference"], both[name]) if "reference" in both else None,
        }


def _contenders(
    context: Context, operation: str, case: Any, dtype: torch.dtype, own: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], tuple[Work, Work | None]]]]:
    """Own backends, then others, then what torch.compile makes of ours and of theirs while there is time for it."""
    device = context.device
    for name, function in own.items():
        yield name, lambda f=function: case.works(device, dtype, f)
    for name in case.peers:
        yield name, lambda n=name: case.peer_works(device, dtype, n)
    if not context.is_cuda or operation in ("attention", "adamw"):  # all scores in memory; a loop over tensors
        return
    eager = case.peers.get("eager")
    sources = {"compiled reference": lambda c: case.works(device, dtype, c(own["reference"]))}
    if case.keep and eager:  # its dropout is cheaper than the reference's
        sources["compiled eager"] = lambda c: case.calls(device, dtype, c(eager))
    for name, make in sources.items():
        if context.left_s() < _COMPILE_S:
            skipped = {"operation": operation, "case": f"{name}, {case.name}", "reason": "no time left"}
            context.results["skipped"].append(skipped)
        else:
            yield name, lambda m=make: m(lambda f: torch.compile(f, dynamic=False))


def _warm(works: tuple[Work, Work | None]) -> tuple[tuple[Work, Work | None], float | None]:
    """Calls both once; the second call's memory beyond what was there, in MiB."""
    for work in filter(None, works):
        work()
    if not torch.cuda.is_available():
        return works, None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (works[1] or works[0])()
    return works, (torch.cuda.max_memory_allocated() - before) / 2**20


def _attempt(attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an attempt returns, or the error of what does not run here."""
    try:
        return attempt()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def dtype_name(dtype: torch.dtype) -> str:
    """Without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _problems(results: dict[str, Any]) -> list[str]:
    problems = [problem for record in results["accuracy"] for problem in accuracy_problems(record)]
    problems += [f"{r['operation']}/{r['backend']}: {p}" for r in results["dropout"] for p in r["problems"]]
    return problems + [f"{r['operation']}/{r['backend']} does not run: {r['error']}" for r in results["unusable"]]


def accuracy_problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record of ``accuracy``."""
    limit = ERROR_LIMITS[record["dtype"]]
    where = f"{record['operation']}/{record['backend']} {record['case']} {record['dtype']} dropout {record['dropout']}"
    return [
        f"{where}: error of {name} {error:.2e} exceeds {limit:g}"
        for name, error in record["relative_errors"].items()
        if not error <= limit
    ]


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    worst: dict[tuple[str, str, str], float] = {}
    for record in results["accuracy"]:
        key = (record["operation"], record["backend"], record["dtype"])
        worst[key] = max([worst.get(key, 0.0), *record["relative_errors"].values()])
    lines = [(f"{op}/{backend} error, {dtype}", f"{error:.1e}") for (op, backend, dtype), error in worst.items()]
    for record in results["times"]:
        name = f"{record['operation']}/{record['backend']} {record['case']}"
        times = f"{record['forward_ms']:.3g} ms forward, {record['forward_backward_ms']:.3g} ms with backward"
        floor = f"{record['pct_of_floor'][1]:.0f} % of the floor"
        ratio = ""
        if record["is_ours"] and record["fastest_peer"]:
            ratio = f", {record['speed_over_fastest_peer']['median']:.2f}× {record['fastest_peer']}"
        lines.append((name, f"{times}, {floor}{ratio}"))
    lines += [(f"{r['operation']}/{r['backend']} {r['case']}", f"does not run: {r['error'][:120]}")
              for r in results["peers_unusable"]]  # fmt: skip
    lines += [(f"{r['operation']} {r['case']}", f"skipped: {r['reason']}") for r in results["skipped"]]
    return lines
