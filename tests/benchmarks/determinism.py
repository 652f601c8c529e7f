"""Whether a killed and resumed run is bitwise the run that was never stopped, and what determinism costs.

The runs go through the command line as a user's do: one without a stop; one whose processes are
killed once its checkpoint of the middle is there, and started again by the same command.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from large_step import engine_step
from processes import REPOSITORY, clean_environment
from section import CheckFailedError, Context
from synthetic import (
    TINY_MODEL,
    build_engine,
    join_process_group,
    make_config,
    micro_batches,
    write_corpus,
    write_small_buckets,
)
from timing import Timer, interleave, paired_ratio, spread

from pipeline.checkpoint import MANIFEST, step_folder
from pipeline.journal import read_entries, without_volatile

STEPS, STOP = 40, 20
CUBLAS_WORKSPACE = ":4096:8"  # one of the two values with which cuBLAS is deterministic
_POLL_S = 0.01


def run(context: Context) -> None:
    """Fills ``bitwise`` and ``cost``; a failure of the one does not keep the other from its numbers.

    Raises:
        ExceptionGroup: What failed; a difference between the two runs is a CheckFailedError.
    """
    errors = []
    with TemporaryDirectory() as folder:
        for part in (_compare_runs, _measure_cost):
            try:
                part(context, Path(folder))
            except Exception as error:
                errors.append(error)
    if errors:
        raise ExceptionGroup("; ".join(str(error) for error in errors), errors)


def _check_bitwise(context: Context) -> None:
    different = [part for part, is_equal in context.results["bitwise"].items() if not is_equal]
    if different:
        raise CheckFailedError(
            f"killed and resumed, the run differs in {', '.join(different)}: {context.results['first_difference']}"
        )


def _compare_runs(context: Context, folder: Path) -> None:
    write_corpus(folder / "corpus.txt", 200_000 if context.is_tiny else 2_000_000, context.seed)
    config = folder / "config.yaml"
    config.write_text(json.dumps(_settings(context, folder), indent=1))  # JSON is YAML
    straight, resumed = folder / "runs/straight/pretrain", folder / "runs/resumed/pretrain"
    with PipelineRun(context, config, straight) as never_stopped:
        never_stopped.wait_until((straight / "journal.jsonl").exists)  # the shards are there: both runs use them
        with PipelineRun(context, config, resumed) as first_attempt:
            first_attempt.wait_until(lambda: _is_saved(resumed, STOP))
        if _is_saved(resumed, STEPS):
            raise CheckFailedError("the run ended before it could be killed; more steps are needed")
        journal_at_kill = len(read_entries(resumed / "journal.jsonl"))
        with PipelineRun(context, config, resumed) as second_attempt:
            second_attempt.finish()
        never_stopped.finish()
    if f"restored step {STOP} " not in (resumed / "log.txt").read_text():
        raise CheckFailedError(f"the second attempt did not restore step {STOP}")
    first, second = (
        [json.dumps(without_volatile(entry)) for entry in read_entries(run / "journal.jsonl")]
        for run in (straight, resumed)
    )
    files, resumed_files = _checksums(straight), _checksums(resumed)
    context.results["runs"] = {
        "steps": STEPS,
        "restored_step": STOP,
        "journal_entries": len(first),
        "journal_entries_when_killed": journal_at_kill,
        "model": "tiny" if context.is_tiny else "small",
    }
    context.results["bitwise"] = {"journal": first == second and len(first) == STEPS} | {
        name: files[name] == resumed_files[name] for name in ("weights.safetensors", "optimizer.safetensors")
    }
    pairs = itertools.zip_longest(first, second)
    context.results["first_difference"] = next((pair for pair in pairs if pair[0] != pair[1]), None)
    _check_bitwise(context)


def _settings(context: Context, folder: Path) -> dict[str, Any]:
    """A run of seconds: ELECTRA-Small on GPU, a tiny model on CPU."""
    tiny = context.is_tiny
    settings: dict[str, Any] = {
        "run": {"dir": str(folder), "seed": 1},
        "launch": {"processes": 1, "device": context.device} | ({"threads_per_process": 1} if tiny else {}),
        "data": {
            "corpora": [{"name": "made_up", "path": str(folder / "corpus.txt")}],
            "sequence_length": 64 if tiny else 128,
            "num_workers": 1,
        },
        "tokenizer": {"vocab_size": 500 if tiny else 2000},
        "model": TINY_MODEL if tiny else {"size": "small"},
        "train": {
            "steps": STEPS,
            "global_batch_size": 8 if tiny else 128,
            "micro_batch_size": 4 if tiny else 64,
            "precision": "fp32" if tiny else "bf16",
            "checkpoint_every": STOP,
            "log_every": 1,
            "held_out_rows": 0,
            "deterministic": True,
        },
        "optimizer": {"lr": 5e-4, "warmup_steps": 4},
        "tracking": {"uri": "none"},
    }
    if tiny:
        settings["deepspeed"] = {"config": str(write_small_buckets(folder))}
    return settings


def _is_saved(run: Path, step: int) -> bool:
    return (step_folder(run / "checkpoints", step) / MANIFEST).exists()


def _checksums(run: Path) -> dict[str, str]:
    manifest = json.loads((step_folder(run / "checkpoints", STEPS) / MANIFEST).read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


class PipelineRun:
    """A ``python -m pipeline run`` in progress; leaving its context kills it."""

    def __init__(self, context: Context, config: Path, run: Path):
        """Starts it; the run's name is that of the folder above ``run``, a stage's folder."""
        self._context, self._log = context, config.parent / f"{run.parent.name}.txt"
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "run", str(config), f"run.name={run.parent.name}"],
                cwd=REPOSITORY,
                env=clean_environment() | {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills it if it still runs; its training process dies with it, as the launcher promises."""
        self._process.kill()
        self._process.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as ``condition`` holds, which must happen while it runs."""
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"the run ended with {self._process.returncode}:\n{self._log_tail()}")
            time.sleep(_POLL_S)

    def finish(self) -> None:
        """Waits for the end, which must be a success."""
        code = self._process.wait(timeout=max(1.0, self._context.left_s()))
        if code != 0:
            raise RuntimeError(f"`python -m pipeline run` ended with {code}:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return self._log.read_text(encoding="utf-8")[-3000:]


def _measure_cost(context: Context, folder: Path) -> None:
    """Step time with and without deterministic algorithms, interleaved in one process."""
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == CUBLAS_WORKSPACE, "set before CUDA starts, for both sides"
    timer = Timer(context.device)
    join_process_group(context.device)
    sections = {"deepspeed": {"config": write_small_buckets(folder)}} if context.is_tiny else {}
    config = make_config(context.is_tiny, 4 if context.is_tiny else 64, **sections)
    batches = micro_batches(config, context.device, 4, True, context.seed, context.is_tiny)
    engine, _ = build_engine(config, context.device, context.seed)
    step = engine_step(engine, batches)

    def with_determinism(is_deterministic: bool) -> None:
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            step(1)
        finally:
            torch.use_deterministic_algorithms(False)

    contenders = {name: lambda n=name: with_determinism(n == "deterministic") for name in ("deterministic", "default")}
    rounds, calls = (1, 1) if context.is_tiny else (5, 2)
    seconds = interleave(timer, contenders, rounds, calls)
    context.results["cost"] = {
        "clock": timer.clock,
        "rows": config.train.global_batch_size,
        "sequence_length_tokens": config.data.sequence_length,
        "deterministic_step_s": spread(seconds["deterministic"]),
        "default_step_s": spread(seconds["default"]),
        "deterministic_over_default": paired_ratio(seconds["deterministic"], seconds["default"]),
    }


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    lines = [
        (f"killed at step {STOP} of {STEPS}, resumed: {part}", "bitwise equal" if is_equal else "DIFFERENT")
        for part, is_equal in results.get("bitwise", {}).items()
    ]
    if "cost" in results:
        ratio = results["cost"]["deterministic_over_default"]["median"]
        lines.append((f"step time, deterministic over default, {results['cost']['rows']} rows", f"{ratio:.2f}×"))
    return lines
