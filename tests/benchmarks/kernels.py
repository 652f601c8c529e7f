"""Every backend of every fused operation: errors against float64, dropout's statistics, times.

An operation takes part by an entry in ``OPERATIONS``; its backends are read from the program, so a
new one is measured without a change here.
"""

from typing import Any

import kernel_attention
import torch
from section import CheckFailedError, Context
from timing import Timer

OPERATIONS = {"attention": kernel_attention}

ERROR_LIMITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2}
"""Of ||out - ref|| / ||ref||: rounding of the type stays well below, a wrong result well above."""


def run(context: Context) -> None:
    """Fills ``accuracy``, ``dropout`` and ``times``, a list of records each.

    Raises:
        CheckFailedError: An error over its limit (NaN counts as one), or dropout that is not as asked for.
    """
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if context.is_cuda else [])
    timer = Timer(context.device)
    torch.manual_seed(context.seed)
    results = context.results
    results.update(clock=timer.clock, error_limits=ERROR_LIMITS, accuracy=[], dropout=[], times=[], unusable=[])
    for name, operation in OPERATIONS.items():
        for record in _attempt(results, operation.accuracy(context.device, context.is_tiny, dtypes)):
            results["accuracy"].append({"operation": name} | record)
        for record in _attempt(results, operation.dropout(context.device)):
            results["dropout"].append({"operation": name} | record)
        for record in _attempt(results, operation.times(timer, context.is_tiny)):
            results["times"].append({"operation": name} | record)
    problems = [problem for record in results["accuracy"] for problem in _accuracy_problems(record)]
    problems += [f"{r['operation']}/{r['backend']}: {p}" for r in results["dropout"] for p in r["problems"]]
    problems += [f"{r['backend']} does not run: {r['error']}" for r in results["unusable"]]
    if problems:
        raise CheckFailedError("; ".join(problems))


def _attempt(results: dict[str, Any], records: Any) -> Any:
    """Passes records on; those of a backend that raised go to ``unusable``."""
    for record in records:
        if "error" in record:
            results["unusable"].append(record)
        else:
            yield record


def _accuracy_problems(record: dict[str, Any]) -> list[str]:
    limit = ERROR_LIMITS[record["dtype"]]
    where = f"{record['operation']}/{record['backend']} {record['case']} {record['dtype']}"
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
        rates = f"{record['forward_ms']:.3g} ms forward, {record['forward_backward_ms']:.3g} ms with backward"
        lines.append((name, f"{rates} ({record['speed_over_reference']['median']:.2f}× reference)"))
    return lines
