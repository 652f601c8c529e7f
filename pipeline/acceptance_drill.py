"""Whether training comes out as it should on this cluster: killed and resumed, and under every ZeRO stage.

The runs are tiny, of the bundled sample, under <run.dir>/acceptance/drill.
"""

import gc
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.batch import GlobalCounts
from model.electra import Electra
from model.statistics import Statistics
from pipeline.acceptance import Check, folder_of
from pipeline.acceptance_quick import agree_on_device
from pipeline.batches import MicroBatches, to_device
from pipeline.bench import SyntheticRows
from pipeline.chain import run_as_rank, run_stages
from pipeline.checkpoint import MANIFEST, OPTIMIZER, WEIGHTS, step_folder
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.devices import choose_kernels
from pipeline.distributed import Control, Process, init_process_group, processes_on_this_machine
from pipeline.engine import Engine
from pipeline.errors import FORESEEN
from pipeline.faults import VARIABLE
from pipeline.goodput import read_attempts
from pipeline.launch import threads_per_process
from pipeline.meeting import GROUP_LIMIT, Meeting, collective
from pipeline.plan import make_plan
from pipeline.pretrain import choose_algorithms
from pipeline.stages import read_record, stage_folder

_REPOSITORY = Path(__file__).resolve().parents[1]
_STEPS, _CHECKPOINT_EVERY, _KILLED_AT = 12, 4, 10  # by then the checkpoint of step 4 is published
_MOST_AT_WORK = 128  # processes; the sample is small, and more than these have micro-batches of weight 0
_UNBROKEN, _KILLED = "unbroken", "killed"
_PARITY_STEPS, _PARITY = 10, 1e-4
_TOKENIZE_S = 240.0


def _tiny(config: Config, process: Process, **keys: Any) -> Config:
    """The quickstart's model on this cluster; ``keys`` have ``__`` for the dot."""
    own = {
        "run.dir": str(folder_of(config) / "drill"),
        "data.corpora": [{"name": "sample", "path": str(_REPOSITORY / "data_shards" / "sample" / "letters.txt.xz")}],
        "data.num_workers": 1,
        "launch.device": config.launch.device,
        "launch.threads_per_process": config.launch.threads_per_process,
        "kernels.backend": config.kernels.backend,
        "train.global_batch_size": 4 * min(process.world_size, _MOST_AT_WORK),
        "train.micro_batch_size": 2,
        "optimizer.warmup_steps": 2,
        "train.deterministic": True,
        "evaluate.tasks": [],
        "tracking.uri": "none",
    } | {key.replace("__", "."): value for key, value in keys.items()}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in own.items())
    return load_config(_REPOSITORY / "configs" / "quickstart.yaml", overrides)


def _drill(config: Config, process: Process, name: str) -> Config:
    """One of the two runs that are to end alike, in the precision of the run to come.

    But fp16, whose first steps go into finding its loss scale: there would be no checkpoint to go on from.
    """
    precision = "fp32" if config.train.precision == "fp16" else config.train.precision
    return _tiny(
        config, process, run__name=name, train__steps=_STEPS, train__checkpoint_every=_CHECKPOINT_EVERY,
        train__log_every=1, train__held_out_rows=32, train__precision=precision,
        deepspeed__config=_deepspeed_json(1),
    )  # fmt: skip


def _deepspeed_json(stage: int) -> str:
    return str(_REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json")


def data(config: Config, process: Process) -> list[Check]:
    """Rank 0 tokenizes the sample for both runs; what an earlier drill left is removed."""
    problem = ""
    with Meeting(process) as meeting:
        if process.rank == 0:
            shutil.rmtree(folder_of(config) / "drill", ignore_errors=True)
            try:
                for name in (_UNBROKEN, _KILLED):
                    run_stages(_drill(config, process, name), ("tokenize",), [], None)
            except (*FORESEEN, OSError) as error:
                problem = str(error)
        problem = meeting.exchange("tokenizing the sample", problem, _TOKENIZE_S)[0]
    if problem:
        return [Check("tokenize", "FAILED", problem)]
    return [Check("tokenize", "OK", "the bundled sample, for two runs")]


def unbroken(config: Config, process: Process) -> list[Check]:
    """A tiny run from start to end."""
    run = _drill(config, process, _UNBROKEN)
    run_as_rank(run, "pretrain", process, launched_here=False)
    return [Check("a tiny run", "OK", f"{_STEPS} steps, checkpoints every {_CHECKPOINT_EVERY}")]


def killed(config: Config, process: Process) -> list[Check]:
    """The same run; every process gets SIGKILL in the middle, as a power cut would have it."""
    os.environ[VARIABLE] = f"kill@step={_KILLED_AT}"
    run_as_rank(_drill(config, process, _KILLED), "pretrain", process, launched_here=False)
    return [Check("killed", "FAILED", "the processes have outlived their SIGKILL")]


def resumed(config: Config, process: Process) -> list[Check]:
    """The killed run goes on to its end; rank 0 compares with the unbroken one."""
    run = _drill(config, process, _KILLED)
    run_as_rank(run, "pretrain", process, launched_here=False)
    if process.rank:
        return []
    other = _drill(config, process, _UNBROKEN)
    attempts = read_attempts(stage_folder(run, "pretrain"))
    first_step, reached = attempts[-1].first_step, attempts[0].step
    if len(attempts) != 2 or not 0 < first_step < _STEPS:
        found = f"attempt 1 reached step {reached}, {len(attempts)} attempts, the last from step {first_step}"
        return [Check("resume", "FAILED", found, f"see {stage_folder(run, 'pretrain') / 'log.txt'}")]
    ours, theirs = _digests(run), _digests(other)
    numbers = {"killed_at": _KILLED_AT, "resumed_from": first_step, "resumed": ours, "unbroken": theirs}
    found = f"killed in step {_KILLED_AT}, went on from step {first_step}, ended at {_STEPS}"
    unequal = [name for name in ours if ours[name] != theirs[name]]
    if unequal:
        found = f"{found}; not equal to the unbroken run: {', '.join(unequal)}"
        return [Check("resume", "FAILED", found, "a product that is not exact? compare with --part quick", numbers)]
    return [Check("resume", "OK", f"{found}: weights {ours[WEIGHTS][:12]} as unbroken", numbers=numbers)]


def _digests(run: Config) -> dict[str, str]:
    """SHA-256 of the last checkpoint's tensors."""
    record = read_record(run, "pretrain")
    assert record and record.state == "done"
    manifest = step_folder(stage_folder(run, "pretrain") / "checkpoints", _STEPS) / MANIFEST
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return {name: files[name]["sha256"] for name in (WEIGHTS, OPTIMIZER)}


def parity(config: Config, process: Process) -> list[Check]:
    """The same ten steps in fp32 under each ZeRO stage."""
    torch.set_num_threads(threads_per_process(config, processes_on_this_machine(process)))
    choose_algorithms(True)
    losses: dict[int, list[float]] = {}
    with Meeting(process) as meeting:
        device, check = agree_on_device(meeting, config)
        if device is None:
            return [check]
        with collective(process, "training under ZeRO"):
            init_process_group(process, device, GROUP_LIMIT)
            control = Control(device, GROUP_LIMIT)
            for stage in range(4):
                settings = _tiny(config, process, train__steps=_PARITY_STEPS, train__precision="fp32",
                                 deepspeed__config=_deepspeed_json(stage))  # fmt: skip
                losses[stage] = _losses(settings, process, control, device)
                gc.collect()
            dist.destroy_process_group()
    off = {stage: max(_relative(*pair) for pair in zip(losses[stage], losses[0], strict=True)) for stage in (1, 2, 3)}
    numbers = {"losses": losses, "relative": off}
    found = f"{_PARITY_STEPS} losses of ZeRO 1, 2, 3 differ from stage 0 by " + ", ".join(
        f"{value:.1e}" for value in off.values()
    )
    if max(off.values()) > _PARITY:
        remedy = f"{_PARITY:g} is allowed: an all-reduce or a product is wrong; compare with --part quick"
        return [Check("ZeRO parity", "FAILED", found, remedy, numbers)]
    return [Check("ZeRO parity", "OK", found, numbers=numbers)]


def _relative(value: float, right: float) -> float:
    """How far apart they are; NaN is as far as can be."""
    apart = abs(value / right - 1)
    return math.inf if math.isnan(apart) else apart


def _losses(config: Config, process: Process, control: Control, device: str) -> list[float]:
    """The total loss of every step."""
    torch.manual_seed(config.run.seed)
    plan, objective = make_plan(config, process.world_size), config.objective
    model = Electra(config.model, objective, plan.vocab_size, choose_kernels(config, device))
    engine = Engine(config, plan, model, device)
    source = MicroBatches(config, plan, process, SyntheticRows(config), device)  # type: ignore[arg-type]
    found = []
    for step in range(config.train.steps):
        batches = [batch for _, batch in source.of_step(step)]
        own = [float(sum(batch.num_masked for batch in batches)), float(sum(batch.num_tokens for batch in batches))]
        counts = GlobalCounts(*control.sum(own))
        result = engine.step(((to_device(batch, device), counts) for batch in batches), config.optimizer.lr)
        sums = Statistics(control.sum_tensor(result.statistics.sums.cpu()))
        weights = objective.generator_loss_weight, objective.discriminator_loss_weight, objective.prediction_loss_weight
        found.append(sums.metrics(*weights)["train/total_loss"])
    return found
