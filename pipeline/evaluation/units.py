"""Units: one task, one recipe, one seed each; which there are, and which are done.

<stage folder>/<checkpoint>/<task>/seed_<n>/             with a grid <task>/<point>/seed_<n>/
  result.json             written last; carries a fingerprint of all that the unit depends on
  predictions.jsonl       or predictions.json and null_odds.json
  failure.json            why it failed, if it did
  partial.safetensors     if it was stopped in the middle
  weights.safetensors     of the encoder, where another task starts from it
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.keys import content_key
from data_shards.store import write_json
from data_shards.temporaries import Watch
from pipeline.config import Config
from pipeline.errors import ConfigError, ElectraError
from pipeline.evaluation.claims import Claim, is_beating, take
from pipeline.evaluation.partial import fingerprint_of
from pipeline.evaluation.pretrained import Pretrained
from pipeline.evaluation.recipes import Recipe, recipes_for
from pipeline.evaluation.tasks import Task

_LOOK_AGAIN_S = 2.0


@dataclass(frozen=True, eq=False)
class Unit:
    """One fine-tuning run.

    Attributes:
        pretrained: What is fine-tuned.
        point: Label of the point of the grid; empty without one.
        fingerprint: Of all that its result depends on.
        needs: The unit whose encoder this one starts from.
        keeps_weights: Whether another unit starts from this one's encoder.
        place: Of its task in ``evaluate.tasks``.
    """

    pretrained: Pretrained
    task: Task
    recipe: Recipe
    point: str
    seed: int
    folder: Path
    fingerprint: str
    needs: "Unit | None" = None
    keeps_weights: bool = False
    place: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(filter(None, [self.pretrained.label, self.task.name, self.point, f"seed {self.seed}"]))

    @property
    def weights_path(self) -> Path:
        """Where its encoder is kept."""
        return self.folder / "weights.safetensors"

    def finished(self) -> dict[str, Any] | None:
        """The unit's result, if one with this fingerprint is there, and all that others need of it."""
        result = self._own("result.json")
        if result is None or not isinstance(result.get("metrics"), dict):
            return None
        if self.keeps_weights and fingerprint_of(self.weights_path) != self.fingerprint:
            return None
        tests = (self.folder / f"test_{name}.json" for name in self.task.tests())
        return result if all(path.exists() for path in tests) else None

    def failure(self) -> str | None:
        """Why it failed when it was last tried."""
        about = self._own("failure.json")
        return str(about.get("error")) if about else None

    def is_lost(self, process: str) -> bool:
        """Whether it failed and this process should not try it again.

        What the program foresees, such as a loss that diverges, is the unit's own fault. Other failures may be a sick
        machine's: one other process tries again.
        """
        about = self._own("failure.json")
        tried_by = about.get("tried_by", []) if about else []
        return bool(about) and (bool(about.get("foreseen")) or process in tried_by or len(tried_by) > 1)

    def write_failure(self, error: Exception, process: str) -> None:
        """Notes why it failed."""
        foreseen = isinstance(error, ElectraError)
        about = self._own("failure.json")
        content = {
            "fingerprint": self.fingerprint,
            "error": (str(error) if foreseen else f"{type(error).__name__}: {error}")[:2000],
            "foreseen": foreseen,
            "tried_by": [*(about or {}).get("tried_by", []), process],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "failure.json", content)

    def forget_failure(self) -> None:
        """Removes the note, so that the unit is tried again."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def _own(self, file: str) -> dict[str, Any] | None:
        try:
            content = json.loads((self.folder / file).read_text(encoding="utf-8"))
            return content if content["fingerprint"] == self.fingerprint else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent or damaged: the unit is done again
            return None


def plan_units(config: Config, folder: Path, pretrained: Pretrained, tasks: list[Task]) -> list[Unit]:
    """Every unit of a checkpoint, those that take longest first.

    Raises:
        ConfigError: A recipe that does not fit the model, or MNLI is to be started from and is not there.
    """
    recipes = {task.name: recipes_for(config.evaluate, task.config, pretrained.model) for task in tasks}
    starts = {recipe.init_from for of_task in recipes.values() for recipe in of_task.values()} - {None}
    _check_starts(config, starts, recipes)
    seeds, names = range(1, config.evaluate.seeds + 1), [task.name for task in tasks]
    units: dict[tuple[str, str, int], Unit] = {}
    for task in sorted(tasks, key=lambda task: task.name not in starts):  # those that others need come first
        for point, recipe in recipes[task.name].items():
            for seed in seeds:
                needs = units[recipe.init_from, "", seed] if recipe.init_from else None
                fingerprint = _fingerprint(pretrained, task, recipe, seed, needs)
                unit_folder = folder / pretrained.label / task.name / point / f"seed_{seed}"
                is_start, place = task.name in starts, names.index(task.name)
                units[task.name, point, seed] = Unit(
                    pretrained, task, recipe, point, seed, unit_folder, fingerprint, needs, is_start, place
                )
    return sorted(units.values(), key=lambda unit: -_cost(unit))


def _check_starts(config: Config, starts: set[str | None], recipes: dict[str, dict[str, Recipe]]) -> None:
    missing = [name for name in starts if name not in recipes]
    if missing:
        raise ConfigError(f"evaluate.mnli_init=true: {missing[0]} is not in evaluate.tasks; add it")
    if starts and (config.evaluate.grid_lr or config.evaluate.grid_layer_decay):
        raise ConfigError(
            "evaluate.mnli_init=true with a grid: which MNLI model to start from would be a choice of its own; "
            "choose evaluate.lr and evaluate.layer_decay first"
        )


def _fingerprint(pretrained: Pretrained, task: Task, recipe: Recipe, seed: int, needs: Unit | None) -> str:
    return content_key(
        {
            "checkpoint": pretrained.digest,
            **pretrained.inputs,
            "task": task.digest(),
            "recipe": recipe.to_dict(),
            "seed": seed,
            "needs": needs.fingerprint if needs else None,
        }
    )


def _cost(unit: Unit) -> int:
    """Proportional to the tokens of training, roughly."""
    return unit.task.num_examples("train") * unit.recipe.epochs * unit.recipe.max_length


class Shift:
    """The units that one process does, out of all that any process may do.

    It begins with its own share, so that processes which start together seldom want the same unit, and goes on with
    what the others have not begun.
    """

    def __init__(self, units: list[Unit], share: int, shares: int, may_leave: bool = False):
        """Units that failed before are tried again, once by each process that starts.

        Args:
            units: All of them, in the same order everywhere.
            share: Number of this process.
            shares: Of so many.
            may_leave: Whether to end when others, who do not wait for this process, are seen to do the rest.
        """
        own = [unit for number, unit in enumerate(units) if number % shares == share]
        self._units = own + [unit for number, unit in enumerate(units) if number % shares != share]
        self._may_leave, self._watch = may_leave, Watch()
        self.process = f"{os.uname().nodename}~{os.getpid()}"
        for unit in own:
            unit.forget_failure()

    def pending(self) -> list[Unit]:
        """Units that are neither done nor failed, nor wait for one that failed."""
        return [
            unit
            for unit in self._units
            if not unit.finished() and not any(u.is_lost(self.process) for u in (unit, unit.needs) if u)
        ]

    def claims(self, should_stop: Callable[[], object]) -> Iterator[tuple[Unit, Claim]]:
        """Units with a claim to each, until there are none, or this process is told to stop."""
        while (pending := self.pending()) and not should_stop():
            taken = next(filter(None, map(self._take, pending)), None)
            if taken:
                yield taken
            elif self._may_leave and all(is_beating(_in_hand(unit).folder, self._watch) for unit in pending):
                return
            else:
                time.sleep(_LOOK_AGAIN_S)

    def _take(self, unit: Unit) -> tuple[Unit, Claim] | None:
        if unit.needs and not unit.needs.finished():
            return None
        claim = take(unit.folder, self._watch)
        if claim and (unit.finished() or unit.is_lost(self.process)):  # since `pending` looked
            claim.__exit__(None, None, None)
            return None
        return (unit, claim) if claim else None


def _in_hand(unit: Unit) -> Unit:
    """The unit that somebody must be working on for this one to get done."""
    return unit.needs if unit.needs and not unit.needs.finished() else unit
