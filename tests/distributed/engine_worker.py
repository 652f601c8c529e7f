"""A few short trainings on the program's engine by one process and by several; rank 0 writes what happened as JSON.

    python -m tests.distributed.engine_worker FOLDER WORLDS      WORLDS: JSON, cases by number of processes

Ranks are forked from a process that has imported everything; a world of N of them writes FOLDER/N.json.

The model is a stand-in with the names of the real one and the same way of freezing: a network that is not
trained gets gradients of 0. Its tensors are of odd sizes, so that flat partitions cut and pad them.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import GlobalCounts
from model.flops import Trains
from model.kernels.select import select_kernels
from model.statistics import Statistics
from pipeline import pieces
from pipeline.config import Config
from pipeline.distributed import discover_process, exit_process, init_process_group
from pipeline.engine import Engine, StepResult
from pipeline.plan import make_plan
from tests.conftest import REPOSITORY, free_port
from tests.forking import import_all

ROWS, WIDTH, IDS = 5, 7, 11
MICRO_BATCHES = 2  # of a step, whatever the number of processes


class Rows(NamedTuple):
    """In place of a micro-batch."""

    ids: Tensor
    targets: Tensor
    seed: int


class Tower(nn.Module):
    """Layers named as an encoder's."""

    def __init__(self, layers: int):
        super().__init__()
        self.embeddings_project = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 13), nn.Tanh(), nn.Linear(13, WIDTH)) for _ in range(layers)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.embeddings_project(hidden)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class Tables(nn.Module):
    """A table and a LayerNorm, named as the real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(IDS, WIDTH)
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer_norm(self.token(ids))


class StandIn(nn.Module):
    """Two networks that share nothing, each with a regression as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = select_kernels()
        self.embeddings, self.generator_embeddings = Tables(), Tables()
        self.generator, self.discriminator = Tower(2), Tower(2)
        self.generator_head, self.discriminator_head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, batch: Rows, counts: GlobalCounts, trains: Trains = "both"):
        ids, targets = batch.ids, batch.targets
        generated = self.generator_head(self.generator(self.generator_embeddings(ids)))
        detected = self.discriminator_head(self.discriminator(self.embeddings(ids)))
        losses = [F.mse_loss(value.float(), targets, reduction="sum") for value in (generated, detected)]
        shares = [float(trains != "discriminator"), 3 * float(trains != "generator")]
        loss = sum(loss * share for loss, share in zip(losses, shares, strict=True)) / counts.tokens
        sums = torch.zeros_like(Statistics.zeros(loss.device).sums)
        sums[0] = loss.detach()
        return loss, sums, generated, detected


def make_config(case: dict[str, Any]) -> Config:
    """The config of a case: stage, precision, optimizer, whether trained in two stages."""
    two_stage = {"training": "two_stage", "generator_steps": 3} if case.get("two_stage") else {}
    return Config.model_validate({
        "data": {"corpora": [{"name": "none", "path": "none"}], "sequence_length": 8},
        "model": {"size": "tiny", "generator_width": 1, "generator_depth": 1},
        "objective": two_stage,
        "train": {
            "steps": 100, "global_batch_size": MICRO_BATCHES, "micro_batch_size": 1,
            "precision": case.get("precision", "fp32"),
        },
        "optimizer": {"lr": 0.01, "gradient_clip": case.get("clip", 1.0), **case.get("optimizer", {})},
        "deepspeed": {
            "config": case.get("deepspeed", REPOSITORY / "configs" / "deepspeed" / f"zero{case['stage']}.json")
        },
    })  # fmt: skip


class Training:
    """An engine and the inputs of its steps."""

    def __init__(self, case: dict[str, Any], rank: int, world_size: int):
        torch.manual_seed(5)
        config = make_config(case)
        self.engine = Engine(config, make_plan(config, world_size), StandIn(), "cpu")  # type: ignore[arg-type]
        self.rank, self.world_size = rank, world_size

    def step(self, number: int, trains: Trains = "both", scale: float = 1.0) -> StepResult:
        batches = []
        for place in range(self.rank, MICRO_BATCHES, self.world_size):
            draw = torch.Generator().manual_seed(100 * number + place)
            ids = torch.randint(0, IDS, (ROWS,), generator=draw)
            targets = torch.linspace(-scale, scale, 3 * IDS).view(IDS, 3)[ids]
            rows = Rows(ids, targets, seed=10 * number + place)
            batches.append((rows, GlobalCounts(1.0, float(ROWS * MICRO_BATCHES))))
        return self.engine.step(batches, 0.01, trains, measures_norms=True)  # type: ignore[arg-type]

    def state(self) -> dict[str, list[float]]:
        """Whole, on every process; what the first one puts together from pieces is the same."""
        whole = {f"{kind}/{name}": value.flatten() for kind, name, value in self.engine.full_state()}
        gathered = {key: torch.full_like(value, torch.nan) for key, value in whole.items()}
        for kind, name, offset, values in self.engine.state_pieces():
            place = gathered[f"{kind}/{name}"][offset : offset + len(values)]
            assert place.isnan().all(), f"{kind} of {name} came twice"
            place.copy_(values)
        assert self.rank or all(torch.equal(gathered[key], value) for key, value in whole.items())
        assert not self.rank or all(value.isnan().all() for value in gathered.values())
        return {key: value.tolist() for key, value in whole.items()}


def train(case: dict[str, Any], training: Training) -> dict[str, Any]:
    """Steps as the case says; the losses are summed over processes by the caller's own arithmetic."""
    phases: list[Trains] = case.get("trains", ["both"] * case.get("steps", 10))
    states, steps = [training.state()], []
    for number, trains in enumerate(phases):
        result = training.step(number, trains, case.get("scale", 1.0))
        loss = result.statistics.sums[0].clone()
        torch.distributed.all_reduce(loss)
        steps.append({"loss": loss.item(), "norm": result.gradient_norm, "applied": result.applied, **result.norms})
        if case.get("keeps_states"):
            states.append(training.state())
    return {"steps": steps, "states": [*states, training.state()]}


def resume(case: dict[str, Any], training: Training, rank: int, world_size: int) -> dict[str, Any]:
    """Ten steps at once, and five, then the state taken to a fresh engine, then five."""
    phases: list[Trains] = case.get("trains", ["both"] * 10)
    whole = train(case | {"trains": phases}, training)["states"][-1]
    first, second = (Training(case, rank, world_size) for _ in range(2))
    for number in range(5):
        first.step(number, phases[number])
    kept = {(kind, name): value.clone() for kind, name, value in first.engine.full_state()}
    second.engine.load_full_state(lambda kind, name: kept[kind, name].clone(), applied_steps=5)
    for number in range(5, 10):
        second.step(number, phases[number])
    return {"whole": whole, "resumed": second.state()}


def copy(training: Training) -> dict[str, Any]:
    """The discriminator set to the generator, and one bias to a number."""
    for number in range(3):
        training.step(number)
    names = [name for name in training.engine.shapes() if name.startswith("generator")]
    before = training.state()
    training.engine.copy_weights({target(name): name for name in names})
    training.engine.set_weights(lambda name: torch.full((3,), 0.25) if name == "generator_head.bias" else None)
    state = training.state()
    rows = Rows(torch.arange(ROWS), torch.zeros(ROWS, 3), seed=0)
    forward = training.engine.evaluate(rows, GlobalCounts(1.0, 1.0))  # type: ignore[arg-type]
    generated, detected = forward[1:]
    assert generated is not None and detected is not None
    difference = (generated - detected).float()  # the generator's output differs by its bias alone
    return {"before": before, "after": state, "difference": difference.flatten().tolist()}


def target(name: str) -> str:
    """The discriminator's parameter in the place of the generator's."""
    return name.replace("generator_embeddings", "embeddings").replace("generator", "discriminator")


def be_rank(out: Path, cases: dict[str, dict[str, Any]]) -> None:
    """One process, as its environment says."""
    process = discover_process()
    assert process
    torch.set_num_threads(1)
    pieces._CHUNK_NUMBERS = 40  # so that some pieces travel together, and not all
    init_process_group(process, "cpu")
    found = {}
    for name, case in cases.items():
        training = Training(case, process.rank, process.world_size)
        if case.get("does") == "resume":
            found[name] = resume(case, training, process.rank, process.world_size)
        elif case.get("does") == "copy":
            found[name] = copy(training)
        else:
            found[name] = train(case, training)
    if process.rank == 0:
        out.write_text(json.dumps(found))
    exit_process(0)


def fork_rank(rank: int, size: int, port: int, out: Path, cases: dict[str, dict[str, Any]]) -> int:
    """Starts one process of a world; returns its id."""
    pid = os.fork()
    if pid == 0:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        try:
            be_rank(out, cases)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # it has not come to its own end
    return pid


def main(folder: Path, worlds: dict[str, dict[str, dict[str, Any]]]) -> int:
    """All worlds at once; returns how many processes failed."""
    import_all()
    ranks = []
    for size, cases in worlds.items():
        port = free_port()
        ranks += [fork_rank(rank, int(size), port, folder / f"{size}.json", cases) for rank in range(int(size))]
    return sum(os.waitpid(rank, 0)[1] != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
