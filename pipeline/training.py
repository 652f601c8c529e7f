"""A training in progress: its counters, its journal entries, its checkpoints."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from model.objective import Trains
from model.statistics import Statistics
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.devices import peak_memory_gib
from pipeline.distributed import Control, Process
from pipeline.engine import MOMENTS, Engine, StepResult
from pipeline.errors import DoNotRequeueError, StartAgainError
from pipeline.faults import Faults, Kind, Phase
from pipeline.goodput import Class, Ledger
from pipeline.health import ChanceWatch, SlowWatch
from pipeline.journal import Entry, Journal, read_entries
from pipeline.log import logger
from pipeline.plan import Plan, with_steps_before
from pipeline.progress import Progress
from pipeline.replicas import deviating, digest_of
from pipeline.snapshot import BackgroundCopy, BackgroundWriter, Snapshot
from pipeline.spikes import SpikeWatch, go_back, saved_by
from pipeline.two_stage import stage_at
from pipeline.watch import Watch


def _no_sums() -> list[float]:
    return Statistics.zeros().sums.tolist()


@dataclass
class TrainingState:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: Steps behind us, skipped ones included.
        skipped_steps: Steps without an update.
        bad_steps: Those of them with NaN or inf, fp16's search for its loss scale not counted.
        trained_s: Seconds spent in steps, over all attempts, without waiting for a checkpoint's copy.
        open_sums: Statistics since the last journal entry.
        score: Held-out loss at this very step, where it was taken.
        scored_rows: Digest of the rows that it is of: other rows, other scores.
        loss_scale: State of fp16's loss scale.
        rows_before: What a fork's parent had read, see ``pipeline.fork``.
    """

    step: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0
    trained_s: float = 0.0
    open_sums: list[float] = field(default_factory=_no_sums)
    score: float | None = None
    scored_rows: str | None = None
    loss_scale: dict[str, float] | None = None
    rows_before: dict[str, Any] | None = None

    @property
    def applied_steps(self) -> int:
        """Updates made."""
        return self.step - self.skipped_steps


_CLASS: dict[Phase, Class] = {
    "start": "startup", "data": "data", "exchange": "overhead", "step": "productive", "log": "overhead",
    "held_out": "evaluation", "save": "checkpoint", "stop": "drain",
}  # fmt: skip


class Guards(NamedTuple):
    """What looks after a training: faults on purpose, heartbeats, the account of its seconds."""

    faults: Faults
    watch: Watch
    ledger: Ledger


class Training:
    """What a run has done so far, and how it is written down."""

    def __init__(
        self, config: Config, plan: Plan, engine: Engine, control: Control, process: Process, state: TrainingState,
        folder: Path, device: str, peak_flops: float, guards: Guards,
    ):  # fmt: skip
        self.config, self.engine, self.control = config, engine, control
        self.process, self.state, self.folder, self.device = process, state, folder, device
        self.journal = Journal(folder / "journal.jsonl", state.step) if process.rank == 0 else None
        self.progress = Progress(plan.steps, state.step, process.rank)
        entries = read_entries(folder / "journal.jsonl") if self.journal else []
        self.plan = with_steps_before(plan, config, entries)  # only who has a journal counts
        self._chance, self._spikes = ChanceWatch(config, entries), SpikeWatch(config.train, entries)
        self._slow = SlowWatch(control.gather(socket.gethostname()))
        self.spike = ""  # what the last line of the journal showed; rank 0 alone knows
        self._peak_flops = peak_flops
        self.saved_step = state.step  # restored from there; at step 0 there is nothing to lose
        self.faults, self.watch, self.ledger = guards
        self._saved_at, self.is_overdue = time.monotonic(), False
        self._copy, self._writer, self._snapshot = BackgroundCopy(device == "cpu"), BackgroundWriter(), None
        self._failed_writes = 0
        self._pending: list[torch.Tensor] = []
        self._logged_step, self._logged_s = state.step, state.trained_s
        self._phase: Phase = "start"
        self.step = state.step + 1  # the one that is being made, or has just been
        self._phase_began = time.monotonic()
        self._spent_s: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)  # since the last journal entry

    def enter(self, phase: Phase, step: int) -> set[Kind]:
        """From here on time belongs to another part of a step; all ranks enter the same ones in the same order.

        Args:
            phase: Which part.
            step: The one that is being made, or that has just been made.

        Returns:
            Faults on purpose that whoever enters has to commit.
        """
        now = time.monotonic()
        self._spent_s[self._phase] += now - self._phase_began
        self._phase, self._phase_began, self.step = phase, now, step
        if phase in ("step", "data", "exchange"):
            self.ledger.enter_step(_CLASS[phase], step)
        else:
            self.ledger.enter(_CLASS[phase])
        self.watch.mark(phase, step)
        return self.faults.strike(phase, step)

    def begin(self) -> None:
        """The first step follows."""
        self.ledger.reached(self.state.step, is_first=True)
        logger.info("start-up took %.1f s; training from step %d", self.ledger.startup_s, self.state.step)
        if self.config.train.check_replicas_every and self.engine.stage == 3 and self.process.rank == 0:
            logger.warning(
                "train.check_replicas_every=%d compares nothing under ZeRO 3, where each process holds other weights; "
                "set it to null, or take ZeRO 0 to 2", self.config.train.check_replicas_every,
            )  # fmt: skip
        own = self.control.broadcast(checkpoints.list_steps(self.folder / "checkpoints") if self.journal else None)
        if self.config.run.fork_from and not own:
            self.saved_step = -1
            self.save()  # the parent may still train, and remove its own
        self.enter("start", self.state.step + 1)

    def close(self) -> None:
        """Waits for a copy and a write that go on, whatever has ended the training."""
        for background in (self._copy, self._writer):
            with suppress(Exception):  # the loop has met it
                background.wait()
        self.engine.before_change = lambda: None
        self.progress.close()
        self.ledger.write()

    @property
    def trains(self) -> Trains:
        """Who learned in the last update, or will in the first."""
        return stage_at(self.config, max(0, self.state.applied_steps - 1)).trains

    @property
    def is_logged(self) -> bool:
        """Whether the step behind us writes a journal entry."""
        return self.state.step % self.config.train.log_every == 0 or self.state.step == self.config.train.steps

    def account(self, result: StepResult, seconds: float) -> None:
        """Takes in a step's sums; they stay on the device until somebody needs them."""
        self.state.trained_s += seconds
        self.state.score = None
        self.progress.advance()
        self.ledger.reached(self.state.step)
        if result.applied:
            self._pending.append(result.statistics.sums)
            return
        self.state.skipped_steps += 1
        if result.scaled_down:
            logger.info("step %d: too large for fp16; the update is skipped, the loss scale lowered", self.state.step)
            return
        self.state.bad_steps += 1
        self._check_bad_steps()

    def _check_bad_steps(self) -> None:
        """A step had NaN or inf: nothing was changed by it. Too many of them end the run."""
        logger.warning(
            "step %d: NaN or inf in the gradients; the update is skipped (%d so far)",
            self.state.step, self.state.bad_steps,
        )  # fmt: skip
        if self.state.bad_steps > self.config.train.max_skipped_steps:
            self.settle(allowed_failures=1)
            raise DoNotRequeueError(
                f"{self.state.bad_steps} steps with NaN or inf, more than "
                f"train.max_skipped_steps={self.config.train.max_skipped_steps}; none of them has changed the "
                "weights. Lower optimizer.lr and fork the run from a good one "
                f"(run.name=NEW run.fork_from={self.config.run.name}@STEP)"
            )

    def log(self, result: StepResult, lr: float, held_out: dict[str, float], scored_rows: str | None) -> None:
        """Writes the means since the last entry to the journal and shows them.

        Args:
            result: Of the step behind us.
            lr: Its learning rate.
            held_out: Scores after it, if they were taken.
            scored_rows: Digest of the held-out rows.
        """
        self._fold()
        self.state.score = held_out.get("held_out/total_loss") if self.trains != "generator" else None
        self.state.scored_rows = scored_rows
        state, plan, objective = self.state, self.plan, self.config.objective
        sums = Statistics(torch.tensor(state.open_sums, dtype=torch.float64))
        steps, seconds = state.step - self._logged_step, state.trained_s - self._logged_s
        tokens_per_s = steps * plan.tokens_per_step / seconds
        flops_per_s = (plan.flops_at(state.step) - plan.flops_at(self._logged_step)) / seconds
        entry: Entry = {
            "step": state.step,
            "tokens": plan.tokens_at(state.step),
            "flops": plan.flops_at(state.step),
            "flops_paper": plan.flops_paper_at(state.step),
            "wall_s": state.trained_s,
            **sums.metrics(
                objective.generator_loss_weight, objective.discriminator_loss_weight, objective.prediction_loss_weight
            ),
            "train/grad_norm": result.gradient_norm,
            **result.norms,
            "train/learning_rate": lr,
            "train/skipped_steps": state.skipped_steps,
            **held_out,
            "speed/tokens_per_s": tokens_per_s,
            "speed/tokens_per_s_per_device": tokens_per_s / plan.world_size,
            "speed/mfu_pct": 100 * flops_per_s / (self._peak_flops * plan.world_size),
            "memory/peak_gib": peak_memory_gib(self.device),
            "time/data_s": self._spent_s["data"] / steps,
            "time/overhead_s": (self._spent_s["exchange"] + self._spent_s["log"]) / steps,
            "time/checkpoint_s": self._spent_s["save"] / steps,
            "goodput/productive_pct": self.ledger.productive_pct,
            "time/unix_s": time.time(),
        }
        if self.journal:
            self.journal.append(entry)
            self.progress.report(entry, (plan.steps - state.step) * seconds / steps)
            self._chance.observe(entry)
            if spike := self._spikes.observe(entry):
                self.spike = spike
                logger.warning("%s", spike)
        self._slow.observe(self.control.gather((self.engine.busy_s() + self._spent_s["data"]) / steps))
        state.open_sums = _no_sums()
        self._spent_s = dict.fromkeys(self._spent_s, 0.0)
        self._logged_step, self._logged_s = state.step, state.trained_s

    def save(self) -> None:
        """Begins to copy the state of this very step, unless it is saved already, and to write it as a checkpoint.

        Raises:
            OSError: The last two could not be written.
        """
        if self.state.step == self.saved_step:
            return
        self._fold()
        self.enter("save", self.state.step)
        self.compare_replicas()
        self.settle(allowed_failures=1)
        self.state.loss_scale = self.engine.loss_scale
        pieces = self.engine.state_pieces()
        if self.journal:
            unwritten = self._sync(self.journal)
            self._snapshot = self._snapshot or Snapshot(self.engine.shapes(), MOMENTS, self.device)
            self._copy.begin(partial(self._snapshot.take, pieces))
            self._writer.begin(partial(self._write, self._snapshot, vars(self.state).copy(), unwritten))
        else:
            self._copy.begin(partial(list, pieces))  # none: this process sends
        self.engine.before_change = self._wait_for_copy
        self.saved_step, self._saved_at, self.is_overdue = self.state.step, time.monotonic(), False

    def _wait_for_copy(self) -> None:
        """Amid a step, which does not take longer for it: what is waited for is the checkpoint's time."""
        began = time.monotonic()
        self.ledger.enter("checkpoint")
        self._copy.wait()
        self.ledger.enter_step(_CLASS[self._phase], self.step)
        waited_s = time.monotonic() - began
        self._phase_began += waited_s
        self._spent_s["save"] += waited_s
        self.state.trained_s -= waited_s

    @staticmethod
    def _sync(journal: Journal) -> OSError | None:
        try:
            journal.sync()
        except OSError as error:
            return error
        return None

    def _write(self, snapshot: Snapshot, state: dict[str, Any], unwritten: OSError | None) -> None:
        """In the writer's thread, while training goes on; no checkpoint is ahead of its journal."""
        train, began, step = self.config.train, time.monotonic(), state["step"]
        before = train.log_every if train.spike_rollbacks else None
        retention = checkpoints.Retention(train.keep_checkpoints, train.keep_every, train.keep_best, before)
        try:
            if unwritten:
                raise unwritten
            self._copy.wait()
            folder = self.folder / "checkpoints"
            checkpoints.save(folder, state, snapshot, retention, lambda phase: self.faults.strike(phase, step))
        except OSError as error:
            logger.warning("checkpoint of step %d: %s; earlier checkpoints are intact", step, error)
            raise
        logger.info("checkpoint of step %d written in %.1f s", step, time.monotonic() - began)

    def roll_back(self) -> None:
        """Goes back before a spike and leaves out the rows since; all processes call it.

        Returns where this run has no checkpoint from before the spike: training goes on.

        Raises:
            StartAgainError: Done.
            DoNotRequeueError: It was done ``train.spike_rollbacks`` times before.
        """
        self.settle(allowed_failures=1)
        problem, self.spike = "", ""
        is_possible, before = True, self.state.step - self.config.train.log_every
        if self.process.rank == 0:
            is_possible = bool(saved_by(self.folder, before))
            if is_possible:
                problem = go_back(self.folder, self.state.step, before, self.config.train.spike_rollbacks)
        problem, is_possible = self.control.broadcast((problem, is_possible))
        if problem:
            raise DoNotRequeueError(problem)
        if not is_possible:
            logger.warning("no checkpoint of this run is from before the spike: training goes on")
            return
        raise StartAgainError("rows after a loss spike are left out now; the same command goes on from before it")

    def compare_replicas(self) -> None:
        """Compares the weights of all processes, where all hold the same ones.

        Raises:
            StartAgainError: They differ; names the processes that deviate.
        """
        every = self.config.train.check_replicas_every
        if every is None or self.engine.stage == 3 or self.control.world_size == 1:
            return
        found = self.control.gather((digest_of(self.engine.model.parameters()), socket.gethostname()))
        ranks = deviating([digest for digest, _ in found])
        if ranks:
            self.settle(allowed_failures=1)
            names = ", ".join(f"rank {rank} on {found[rank][1]}" for rank in ranks)
            raise StartAgainError(
                f"after step {self.state.step:,} the weights of {names} differ from the others': silent corruption; "
                "nothing of it is saved, the same command goes on from the last checkpoint. Have the node tested"
            )

    def settle(self, allowed_failures: int = 0) -> None:
        """Waits until the checkpoint that was begun last is written; all processes call it.

        Raises:
            OSError: That failed, and so did ``allowed_failures`` before it.
        """
        self._copy.wait()  # as a part of it that needs the others, it fails as exchanges do
        error = self.control.broadcast(self._writer.wait())
        self._failed_writes = self._failed_writes + 1 if error else 0
        if self._failed_writes > allowed_failures:
            raise OSError(
                f"a checkpoint could not be written ({error}); earlier ones are intact: mend the disk and start again"
            )

    @property
    def is_save_due(self) -> bool:
        """Whether the last checkpoint is older than ``train.checkpoint_seconds``, by this process's clock."""
        limit = self.config.train.checkpoint_seconds
        return limit is not None and time.monotonic() - self._saved_at > limit

    def _fold(self) -> None:
        """Adds the pending sums of all processes to the open ones, step by step in one fixed order."""
        if self._pending:
            steps = self.control.sum_tensor(torch.stack(self._pending).cpu())
            open_sums = torch.tensor(self.state.open_sums, dtype=torch.float64)
            for sums in steps:
                open_sums = open_sums + sums
            self.state.open_sums = open_sums.tolist()
            self._pending.clear()
