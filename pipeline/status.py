"""What `electra status` shows: each stage's state, how far training is and when it ends, and what a rerun would do.

Answers in a moment whatever the run's length: of the journal, which another process may be writing, it reads the end.
"""

import json
import os
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_shards.digest import is_remembered
from pipeline.chain import plan_stages, stages_of
from pipeline.checkpoint import MANIFEST, list_steps, step_folder
from pipeline.config import Config
from pipeline.doctor.checks import size
from pipeline.errors import FORESEEN, DamagedError
from pipeline.evaluation.stored import read_results
from pipeline.goodput import Attempt, describe, read_attempts, total_seconds
from pipeline.journal import Entry
from pipeline.progress import format_duration
from pipeline.stages import STAGES, StageRecord, is_running, read_record, stage_folder
from pipeline.tokenize import corpora_of
from pipeline.tracking import read_tracking

_TAIL_BYTES = 1 << 18  # some two hundred lines
_RECENT_LINES = 20  # over which speed is taken
_SILENT_S = 600.0  # or ten times what a line has taken: after that no end is foretold
_SHOWN = (
    ("loss", "train/total_loss", ".4f"),
    ("generator", "train/generator_mlm_loss", ".4f"),
    ("discriminator", "train/discriminator_rtd_loss", ".4f"),
    ("auc", "train/discriminator_auc", ".3f"),
    ("held-out loss", "held_out/total_loss", ".4f"),
    ("tokens", "tokens", ".3e"),
    ("FLOPs", "flops", ".3e"),
    ("tokens/s", "speed/tokens_per_s", ",.0f"),
    ("MFU %", "speed/mfu_pct", ".1f"),
)


def describe_status(config: Config) -> dict[str, Any]:
    """All of it, as JSON types; times are seconds, or Unix seconds where the name says so.

    Raises:
        DamagedError: A record or the journal's end cannot be read.
    """
    runs = is_running(config.run_folder)
    records = {stage: read_record(config, stage) for stage in STAGES}
    stages: dict[str, Any] = {}
    for stage, record in records.items():
        state = record.state if record else "not started"
        stages[stage] = {
            "state": "killed" if state == "running" and not runs else state,
            "attempts": record.attempts if record else 0,
            "metrics": record.metrics if record else {},
        }
    stages["pretrain"] |= _describe_training(config, runs and stages["pretrain"]["state"] == "running")
    stages["evaluate"] |= _units_of(config)
    return {
        "run": config.run.name,
        "folder": str(config.run_folder),
        "running": runs,
        "process": _last_process(records),
        "stages": stages,
        "rerun": _what_a_rerun_would_do(config, runs),
        "mlflow": read_tracking(config),
    }


def _what_a_rerun_would_do(config: Config, runs: bool) -> dict[str, str]:
    if runs:
        return {"refused": "the run goes on; a run is made by one command at a time"}
    stages, found = stages_of(config), {}
    try:
        if not _is_text_known(config):
            stages, found = stages[1:], {"tokenize": "run or reuse, by the text, which was not read"}
        return found | {
            decision.stage: f"{decision.action}: {decision.why}" for decision in plan_stages(config, stages)
        }
    except FORESEEN as error:
        return {"refused": str(error)}


def _is_text_known(config: Config) -> bool:
    """Whether the text's digests are all there: to hash the text may take hours. What cannot be read is not hashed."""
    for corpus in corpora_of(config):
        with suppress(OSError, *FORESEEN):
            if not is_remembered(corpus, config.run.dir / "digests"):
                return False
    return True


def _last_process(records: dict[str, StageRecord | None]) -> dict[str, Any]:
    """Where the stage that was started last runs, or ran; empty before there is any."""
    started = [record for record in records.values() if record and record.environment]
    if not started:
        return {}
    last = next((record for record in started if record.state == "running"), started[-1])
    slurm = last.environment.get("slurm", {})
    return {"stage": last.stage, "host": last.environment.get("host"), "slurm_job": slurm.get("SLURM_JOB_ID"),
            "nodes": slurm.get("SLURM_JOB_NODELIST")}  # fmt: skip


def _describe_training(config: Config, trains: bool) -> dict[str, Any]:
    """Progress, the last line of the journal, what is left, the last checkpoint and the account of seconds."""
    folder, now_s = stage_folder(config, "pretrain"), time.time()
    entries = read_tail(folder / "journal.jsonl")
    attempts = read_attempts(folder)
    found: dict[str, Any] = {"step": entries[-1]["step"] if entries else 0, "steps": config.train.steps}
    if attempts:
        found["step"] = max(found["step"], attempts[-1].step if trains else 0)
        found["goodput"] = {"seconds": total_seconds(attempts), "text": describe(attempts)}
    if entries:
        last = entries[-1]
        found["last_line"] = last
        found["skipped_steps"] = last.get("train/skipped_steps", 0)
        found["last_line_age_s"] = now_s - last["time/unix_s"] if "time/unix_s" in last else None
    found |= estimate_rest(entries, found["step"], config.train.steps, attempts, now_s if trains else None)
    found["checkpoint"] = describe_checkpoint(folder / "checkpoints", now_s)
    found["requeues"] = _count_requeues(folder / "requeues.json")
    return found


def read_tail(path: Path, num_bytes: int = _TAIL_BYTES) -> list[Entry]:
    """The last whole lines of a journal, oldest first; one that is being written is left out.

    Args:
        path: The journal; none yet is an empty one.
        num_bytes: Of the file's end that are read.

    Raises:
        DamagedError: A whole line is not JSON.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(begin)
        lines = file.read(num_bytes).split(b"\n")[1 if begin else 0 : -1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DamagedError(f"{path}: a line near its end is not JSON; restore the file from a copy") from error


def estimate_rest(
    entries: list[Entry], step: int, steps: int, attempts: list[Attempt], now_s: float | None
) -> dict[str, float]:
    """Seconds that are left at the speed of the last lines.

    Args:
        entries: The end of the journal.
        step: How far the run is.
        steps: Of the whole run.
        attempts: Starts of the stage: what lies between two lines of different ones was no training.
        now_s: Unix time; None: it does not run, so nobody knows when it ends.

    Returns:
        ``seconds_per_step`` of training alone; ``training_left_s``, the same for all steps that are left; and while it
        trains and writes lines ``ends_unix_s``, with checkpoints, held-out scores and all else that steps wait for.
    """
    recent = entries[-_RECENT_LINES - 1 :]
    pairs = [(a, b) for a, b in pairwise(recent) if b["step"] > a["step"]]
    if not recent or step >= steps:
        return {}
    if not pairs:
        first = recent[-1]
        per_step_s = first["wall_s"] / first["step"]
        return {"seconds_per_step": per_step_s, "training_left_s": (steps - step) * per_step_s}
    per_step_s = sum(b["wall_s"] - a["wall_s"] for a, b in pairs) / sum(b["step"] - a["step"] for a, b in pairs)
    rest = {"seconds_per_step": per_step_s, "training_left_s": (steps - step) * per_step_s}
    begins = [attempt.began_unix_s for attempt in attempts]
    clock = [
        (b["time/unix_s"] - a["time/unix_s"], b["step"] - a["step"])
        for a, b in pairs
        if "time/unix_s" in a and "time/unix_s" in b
        and not any(a["time/unix_s"] <= begin <= b["time/unix_s"] for begin in begins)
    ]  # fmt: skip
    if now_s is None or not clock:
        return rest
    elapsed_s, made = (sum(values) for values in zip(*clock, strict=True))
    last = recent[-1]
    if now_s - last["time/unix_s"] > max(_SILENT_S, 10 * elapsed_s / len(clock)):
        return rest
    return rest | {"ends_unix_s": max(now_s, last["time/unix_s"] + (steps - last["step"]) * elapsed_s / made)}


def describe_checkpoint(folder: Path, now_s: float) -> dict[str, Any] | None:
    """The newest checkpoint; its files' sizes are compared with its manifest, not their content.

    Args:
        folder: The ``checkpoints`` folder.
        now_s: Unix time.
    """
    steps = list_steps(folder)
    if not steps:
        return None
    path = step_folder(folder, steps[-1])
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: about["size"] for name, about in files.items()}
        is_whole = all((path / name).stat().st_size == size for name, size in sizes.items())
        age_s = now_s - (path / MANIFEST).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # moved aside just now, or damaged
        return {"step": steps[-1], "age_s": None, "bytes": None, "is_whole": False}
    return {"step": steps[-1], "age_s": age_s, "bytes": sum(sizes.values()), "is_whole": is_whole}


def _count_requeues(path: Path) -> int:
    """Of the Slurm job that has, or had, the run last."""
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _units_of(config: Config) -> dict[str, Any]:
    """Units that are done, and the medians so far; nothing before the first one."""
    record = read_record(config, "evaluate")
    results = read_results(stage_folder(config, "evaluate") / "results_so_far.json")
    if record is None or results is None or results["fingerprint"] != record.fingerprint:
        return {}
    scores = {task: results["tasks"][task][metric]["median"] for task, metric in results["score"].items()}
    return {"units": results["units"], "scores_so_far": scores, "failed": results["failed"]}


def format_status(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [f"run {found['run']} in {found['folder']}", f"  {_format_process(found)}"]
    for stage, about in found["stages"].items():
        progress = _format_training(about) if stage == "pretrain" else ""
        if "units" in about:
            scores = ", ".join(f"{task} {value:.4f}" for task, value in about["scores_so_far"].items())
            progress = f"  {about['units']['done']} of {about['units']['of']} units; medians so far: {scores or 'none'}"
            progress += "".join(f"\n    failed: {f['task']}, seed {f['seed']}: {f['error']}" for f in about["failed"])
        lines.append(f"  {stage:9} {about['state']:12}{progress}")
    for stage, action in found["rerun"].items():
        lines.append(f"  a rerun would {'be ' if stage == 'refused' else ''}{stage}: {action}")
    for stage, run_id in found["mlflow"].get("runs", {}).items():
        lines.append(f"  MLflow {stage:9} {run_id}")
    return "\n".join(lines)


def _format_process(found: dict[str, Any]) -> str:
    process = found["process"]
    if not process:
        return "running" if found["running"] else "not running"
    job = f", Slurm job {process['slurm_job']} ({process['nodes']})" if process["slurm_job"] else ""
    verb = "running" if found["running"] else "not running; the last was"
    return f"{verb} {process['stage']} on {process['host']}{job}"


def _format_training(about: dict[str, Any]) -> str:
    step, steps = about["step"], about["steps"]
    lines = [f"  step {step:,} of {steps:,}" + (f" ({100 * step / steps:.1f} %)" if step else "")]
    if "training_left_s" in about:
        left = f"{format_duration(about['training_left_s'])} of training left at the present speed"
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(about.get("ends_unix_s", 0)))
        if about["state"] != "running":
            left += ", once it goes on"
        elif "ends_unix_s" in about:
            left += f"; ends {end} if nothing comes between"
        else:
            left += "; no line for long, or too few: when it ends is not known"
        lines.append(f"{left} ({about['seconds_per_step']:.3g} s a step)")
    if "last_line" in about:
        entry = about["last_line"]
        shown = [f"{name} {entry[key]:{form}}" for name, key, form in _SHOWN if entry.get(key) is not None]
        age = f", {_ago(about['last_line_age_s'])}" if about["last_line_age_s"] is not None else ""
        lines.append(f"journal at step {entry['step']:,}{age}: {', '.join(shown)}")
    if found := about["checkpoint"]:
        state = f"{size(found['bytes'])}, verified when written" if found["is_whole"] else "damaged"
        age = f", {_ago(found['age_s'])}" if found["age_s"] is not None else ""
        lines.append(f"checkpoint of step {found['step']:,}{age}: {state}")
    counts = [
        f"{about[key]} {what}" for key, what in (("skipped_steps", "steps skipped"), ("requeues", "requeues"))
        if about.get(key)
    ]  # fmt: skip
    if about["attempts"] > 1:
        counts.insert(0, f"started {about['attempts']} times")
    lines += [", ".join(counts)] if counts else []
    lines += [about["goodput"]["text"]] if "goodput" in about else []
    return "\n    ".join(lines)


def _ago(seconds: float) -> str:
    return f"{format_duration(max(0.0, seconds))} ago"


def is_over(found: dict[str, Any]) -> bool:
    """Whether nothing runs, and nothing will: all is done, a stage has failed, or a rerun would be refused.

    A run that has not begun waits for its job; one that was stopped or killed, for its requeue.
    """
    if found["running"] or "refused" in found["rerun"]:
        return not found["running"]
    states = [found["stages"][stage]["state"] for stage in found["rerun"]]
    is_done = states[-1] == "done" and {*states} <= {"done", "not started"}  # a folder is evaluated without the others
    return is_done or "failed" in states
