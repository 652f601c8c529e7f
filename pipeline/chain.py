"""The chain: what each stage would do and why, and doing it.

`electra run` plans the stages in order, skips what is up to date, and starts the
rest; the single-stage commands and Slurm's tasks take the same way in.
"""

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_shards.build import Share
from pipeline import checkpoint as checkpoints
from pipeline import goodput
from pipeline.attempts import check_settings, refuse_to_start
from pipeline.config import Config
from pipeline.distributed import Process, array_job, leave_together
from pipeline.environment import describe_environment
from pipeline.errors import FORESEEN, ConfigError, DamagedError, ElectraError, PeerLostError, StoppedEarly
from pipeline.evaluation.stored import read_results
from pipeline.journal import read_entries
from pipeline.keys import EVALUATE_SELECTION, science_of
from pipeline.launch import launch, num_processes, threads_per_process
from pipeline.log import logger
from pipeline.sign_of_life import is_at_work, withdraw
from pipeline.stages import (
    STAGES,
    StageRecord,
    State,
    changed_since,
    differences,
    end_record,
    is_done_by_others,
    move_aside,
    read_record,
    refuse_changed_recipe,
    refuse_changed_science,
    run_lock,
    stage_folder,
    start_record,
    write_config,
)
from pipeline.tokenize import is_complete, run_tokenize, share_of_work, tokenize_inputs

Action = Literal["reuse", "resume", "run", "wait"]

SHARED = ("tokenize", "evaluate")
"""Stages whose work the elements of a job array share."""


# How long a process waits for the others before it exits; rank 0 may still be shipping to MLflow.
_PATIENCE_S, _PATIENCE_AFTER_ERROR_S = 150.0, 20.0


@dataclass(frozen=True)
class Decision:
    """What a command would do for a stage.

    Attributes:
        action: ``reuse`` (up to date), ``resume``, ``run``, or ``wait`` (for the stage before).
        why: One sentence.
        inputs: What the stage's fingerprint hashes.
    """

    stage: str
    action: Action
    why: str
    inputs: dict[str, Any]


def decide(config: Config, stage: str, keep_digests: bool = True, forced: bool = False) -> Decision:
    """What has to be done for a stage, by its record and its inputs; changes nothing but the digest cache.

    ``forced``: results of an evaluation by another recipe are no reason to refuse, as they will be moved aside.

    Raises:
        ConfigError: Science keys changed under a name that has results; names them and the ways on.
    """
    if stage == "tokenize":
        return _decide_tokenize(config, keep_digests)
    if stage == "evaluate" and isinstance(config.evaluate.checkpoint, Path):  # needs no stage before it
        if keep_digests:
            with suppress(OSError):
                (config.run.dir / "digests").mkdir(parents=True, exist_ok=True)
        return _decide_evaluate(config, None, forced)
    before = STAGES[STAGES.index(stage) - 1]
    upstream = read_record(config, before)
    if upstream is None or upstream.state != "done":
        return Decision(stage, "wait", f"after {before}", {})
    return _decide_pretrain(config, upstream) if stage == "pretrain" else _decide_evaluate(config, upstream, forced)


def _decide_tokenize(config: Config, keep_digests: bool) -> Decision:
    record = read_record(config, "tokenize")
    done = record is not None and record.state == "done" and is_complete(config, record)
    try:
        inputs = tokenize_inputs(config, share_of_work(), keep_digests)
    except (OSError, *FORESEEN) as error:
        # Shards outlive the text: when it is gone, or not visible here, finished shards still serve.
        if record and done and record.inputs["science"] == science_of(config, "tokenize"):
            return Decision("tokenize", "reuse", f"up to date; the text was not compared ({error})", record.inputs)
        raise
    if record is None:
        return Decision("tokenize", "run", "never started under this name", inputs)
    changed = differences(record.inputs, inputs)
    if changed and _has_checkpoints(config):
        raise refuse_changed_science(config, changed, "tokenize")
    if changed:
        return Decision("tokenize", "run", f"changed: {'; '.join(changed)}", inputs)
    if done:
        return Decision("tokenize", "reuse", "up to date", inputs)
    return Decision("tokenize", "resume", f"{record.state} before; finished tasks are kept", inputs)


def _decide_pretrain(config: Config, upstream: StageRecord) -> Decision:
    if changed := changed_since(upstream, config):
        if _has_checkpoints(config):
            raise refuse_changed_science(config, changed, "tokenize")
        return Decision("pretrain", "wait", f"after tokenize, as these changed: {'; '.join(changed)}", {})
    inputs = {
        "science": science_of(config, "pretrain"),
        "tokenizer": upstream.output["tokenizer_sha256"],
        "shards": {corpus["name"]: corpus["key"] for corpus in upstream.output["corpora"]},
    }
    record = read_record(config, "pretrain")
    steps = checkpoints.list_steps(stage_folder(config, "pretrain") / "checkpoints")
    if record is None:
        return Decision("pretrain", "run", "never started under this name", inputs)
    changed = differences(record.inputs, inputs)
    if changed and steps:
        raise refuse_changed_science(config, changed, "pretrain")
    if changed:
        return Decision("pretrain", "run", f"changed: {'; '.join(changed)}", inputs)
    final_step = record.output.get("checkpoint_step")
    if record.state == "done" and final_step in steps:
        return Decision("pretrain", "reuse", f"up to date, at step {final_step:,}", inputs)
    if steps:
        return Decision("pretrain", "resume", f"from step {steps[-1]:,} of {config.train.steps:,}", inputs)
    _refuse_lost_checkpoints(config, record)
    return Decision("pretrain", "run", "started before, no checkpoint yet", inputs)


def _refuse_lost_checkpoints(config: Config, record: StageRecord) -> None:
    """Nothing is saved: right for a run that has just begun, and for no other."""
    folder = stage_folder(config, "pretrain")
    vanished = bool(read_entries(folder / "journal.jsonl")) and not (folder / "checkpoints").exists()
    own = [attempt for attempt in goodput.read_attempts(folder) if attempt.lineage == record.lineage]
    had_gone_on = config.run.fork_from is None and any(attempt.first_step for attempt in own)
    if record.state == "done" or vanished or had_gone_on:
        raise DamagedError(
            f"{folder / 'checkpoints'} holds no checkpoint although this run has had some; bring them back, or start "
            "from the beginning with --force pretrain, which moves the journal aside"
        )


def _decide_evaluate(config: Config, upstream: StageRecord | None, forced: bool) -> Decision:
    from pipeline.evaluation.tasks import load_tasks

    inputs: dict[str, Any] = {"science": science_of(config, "evaluate")}  # a folder is in it by its content
    if upstream is None:
        _refuse_other_settings(config)
    else:
        if foreign := changed_since(upstream, config):
            raise refuse_changed_science(config, foreign, "pretrain")
        inputs |= {"pretrain": upstream.inputs["science"], "checkpoint": upstream.output["checkpoint_sha256"]}
    inputs["tasks"] = {task.name: task.digest() for task in load_tasks(config)}
    record = read_record(config, "evaluate")
    if record is None:
        return Decision("evaluate", "run", "never started under this name", inputs)
    changed = differences(record.inputs, inputs)
    foreign = [line for line in changed if line.startswith("evaluate.") and not line.startswith(EVALUATE_SELECTION)]
    results = read_results(stage_folder(config, "evaluate") / "results.json")
    if foreign and not forced and (results or any(stage_folder(config, "evaluate").glob("**/seed_*/result.json"))):
        raise refuse_changed_recipe(config, foreign)
    if changed:
        return Decision("evaluate", "run", f"changed: {'; '.join(changed)}; finished units are kept", inputs)
    if record.state == "done" and results:
        return Decision("evaluate", "reuse", "up to date", inputs)
    return Decision("evaluate", "resume", f"{record.state} before; finished units are kept", inputs)


def _refuse_other_settings(config: Config) -> None:
    """A folder needs no model of the run, but the command rewrites config.yaml, and the run's checkpoints need that."""
    record = read_record(config, "pretrain")
    if record and (foreign := changed_since(record, config)):
        raise ConfigError(
            f"run {config.run.name!r} has been trained, and these keys changed under it:\n  "
            + "\n  ".join(foreign)
            + "\nnothing was touched. A folder can be evaluated under any name: set run.name=NEW"
        )


def _has_checkpoints(config: Config) -> bool:
    return bool(checkpoints.list_steps(stage_folder(config, "pretrain") / "checkpoints"))


def stages_of(config: Config, until: str = STAGES[-1]) -> tuple[str, ...]:
    """The stages of a run: evaluate only when there are tasks."""
    stages = STAGES[: STAGES.index(until) + 1]
    return stages if config.evaluate.tasks else tuple(stage for stage in stages if stage != "evaluate")


def plan_stages(config: Config, stages: tuple[str, ...], force: str | None = None) -> list[Decision]:
    """The decisions for several stages, none of them started; after one that will run, the others wait."""
    decisions: list[Decision] = []
    for stage in stages:
        previous = decisions[-1] if decisions else None
        if stage == force:
            decisions.append(Decision(stage, "run", "forced; the old outputs are moved aside", {}))
        elif previous and previous.action != "reuse":
            decisions.append(Decision(stage, "wait", f"after {previous.stage}", {}))
        else:
            decisions.append(decide(config, stage, keep_digests=False))
    return decisions


def run_stages(config: Config, stages: tuple[str, ...], arguments: list[str], force: str | None) -> None:
    """Runs the stages that are not up to date, each in its processes on this machine.

    Args:
        config: The run.
        stages: In order.
        arguments: Config file and overrides, for the processes that are started.
        force: Stage whose outputs, and the later ones', are moved aside first.
    """
    from pipeline.tracking import Shipper, needs_shipping

    with ExitStack() as stack:
        stack.enter_context(run_lock(config))
        if force and force != "evaluate":
            move_aside(config, force)
        shipper: Shipper | None = None
        spent_s = 0.0
        for stage in stages:
            decision = decide(config, stage, forced=stage == force)
            if decision.action == "wait":
                raise ConfigError(f"{stage} cannot start: {decision.why}; `electra run` does the stages in order")
            if stage == force == "evaluate":  # not before: what cannot start leaves the results where they are
                move_aside(config, stage)
                decision = decide(config, stage)
            if decision.action == "reuse":
                logger.info("%s: %s", stage, decision.why)
                continue
            if stage == "tokenize" and "pretrain" in stages:
                check_settings(config)
            logger.info("%s: %s (%s)", stage, decision.action, decision.why)
            write_config(config, stage)
            shipper = shipper or stack.enter_context(Shipper(config))
            began = time.monotonic()
            _run_here(config, stage, decision, arguments, spent_s)
            spent_s += time.monotonic() - began
        if shipper is None and needs_shipping(config):
            stack.enter_context(Shipper(config))


def _run_here(config: Config, stage: str, decision: Decision, arguments: list[str], spent_s: float) -> None:
    """``spent_s``: seconds that this command has spent on the stages before."""
    processes = num_processes(config, stage)
    if stage == "tokenize":
        execute_stage(config, decision, Process())
        return
    restarts = config.launch.restarts if stage == "pretrain" else 0
    folder = stage_folder(config, "pretrain") / "checkpoints"
    threads = threads_per_process(config, processes)
    os.environ.update(goodput.begin_allocation(spent_s))
    code = launch([stage, *arguments], processes, threads, restarts, lambda: checkpoints.list_steps(folder)[-1:])
    if stage == "pretrain":
        goodput.end_allocation(stage_folder(config, stage), code=code)
    if code == 0:
        return
    record = read_record(config, stage)
    if record and record.state == "running":  # it died without a word
        end_record(config, record, "stopped" if code == StoppedEarly.exit_code else "failed")
    failure = StoppedEarly("") if code == StoppedEarly.exit_code else ElectraError("")
    failure.exit_code = code
    raise failure  # the process has said why


def execute_stage(config: Config, decision: Decision, process: Process) -> None:
    """Runs a stage in this process, which may be one of several; rank 0 keeps the record.

    A story that returns False leaves the rest to other jobs of an array, and the record to the last of them.
    """
    stage = decision.stage
    if process.rank == 0:
        shared = array_job() if stage in SHARED else ""
        record = start_record(config, stage, decision.inputs, describe_environment(), shared)
    else:
        record = _record_of_other_rank(config, stage, decision)
    try:
        is_over = _STORIES[stage](config, record, process)
    except BaseException as error:
        if process.rank == 0:
            _end_early(config, record, "stopped" if isinstance(error, StoppedEarly) else "failed")
        raise
    if process.rank == 0 and not is_over:
        _end_early(config, record, "stopped")
    elif process.rank == 0:
        if not is_done_by_others(config, record):
            end_record(config, record, "done")
        logger.info("%s: done", stage)


def _ship_the_end(config: Config, stage: str) -> None:
    """The element of an array that ships to MLflow may have ended before the last one."""
    from pipeline.tracking import Shipper, needs_shipping

    record = read_record(config, stage)
    if record is not None and record.state != "running" and needs_shipping(config):
        write_config(config, stage)
        with Shipper(config):
            pass


def _end_early(config: Config, record: StageRecord, state: State) -> None:
    """Ends the record of a stage that is not done, unless other elements of an array go on with it or have done it.

    Who leaves takes its own sign of life away before it looks for others', so the last one to leave sees none.
    """
    if record.stage in SHARED:
        withdraw(config.run_folder)
        if is_at_work(config.run_folder, shared_only=True):
            return
    if not is_done_by_others(config, record):
        end_record(config, record, state)


def _record_of_other_rank(config: Config, stage: str, decision: Decision) -> StageRecord:
    """Rank 0 owns the record; the others need only what an earlier attempt settled."""
    record = read_record(config, stage)
    if record is None or record.inputs != decision.inputs:
        return StageRecord(stage, "running", decision.inputs)
    return record


def _tokenize(config: Config, record: StageRecord, process: Process) -> bool:
    del process
    run_tokenize(config, record, share_of_work())
    return True


def _pretrain(config: Config, record: StageRecord, process: Process) -> bool:
    from pipeline.pretrain import run_pretrain

    run_pretrain(config, record, process)
    return True


def _evaluate(config: Config, record: StageRecord, process: Process) -> bool:
    from pipeline.evaluate import run_evaluate

    return run_evaluate(config, record, process)


_STORIES = {"tokenize": _tokenize, "pretrain": _pretrain, "evaluate": _evaluate}


def run_as_rank(config: Config, stage: str, process: Process, launched_here: bool) -> None:
    """One process of a stage that srun, torchrun or ``electra`` started.

    Args:
        config: The run.
        stage: What to run.
        process: Which of the processes this is.
        launched_here: Whether an ``electra`` process above holds the lock and ships to MLflow.
    """
    from pipeline.tracking import Shipper

    decision = decide(config, stage)
    if decision.action == "wait":
        raise ConfigError(f"{stage} cannot start: {decision.why}")
    if decision.action == "reuse":
        logger.info("%s: %s", stage, decision.why)
        return
    if stage == "pretrain":
        refuse_to_start(config, process.rank)
    try:
        with ExitStack() as stack:
            share = share_of_work() if stage in SHARED else Share()
            if process.rank == 0 and not launched_here:
                stack.enter_context(run_lock(config, shared=stage in SHARED))
                if share.part == 0:
                    write_config(config, stage)
                    stack.enter_context(Shipper(config))
            if share.part and process.rank == 0:
                stack.callback(_ship_the_end, config, stage)
            execute_stage(config, decision, process)
    except StoppedEarly as stopped:
        leave_together(_PATIENCE_S)
        raise type(stopped)(str(stopped) if process.rank == 0 else "") from None
    except PeerLostError:
        raise  # there is nobody to wait for
    except ElectraError:
        leave_together(_PATIENCE_AFTER_ERROR_S)  # which may be this process's alone
        raise
    leave_together(_PATIENCE_S)
