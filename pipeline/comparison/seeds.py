"""Runs that differ in ``run.seed`` are one thing pretrained several times, and stand in one column.

Execution keys change neither weights nor scores, so that they may differ as well.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.comparison.differences import Difference, find_differences, list_of
from pipeline.comparison.run import Run

FEWEST_SEEDS = 3
"""Of a spread that is tested, and of a column of several runs; two runs stand beside each other."""

_Tolerance = Callable[[Difference], bool]


@dataclass(frozen=True)
class Column:
    """Runs whose numbers stand in one column.

    Attributes:
        name: Heads it.
        runs: One, or several with different seeds.
    """

    name: str
    runs: tuple[Run, ...]


def as_columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Columns in the order of their first runs; one for each run if else there would be only one.

    Runs of the same settings come first, so that two such groups whose execution keys differ stay two columns.
    """
    whole = _group(runs, _nothing)
    columns = _group(runs, _execution, whole)
    grouped = [id(run) for column in columns for run in column.runs]
    columns += [Column(run.name, (run,)) for run in runs if id(run) not in grouped]
    if len(columns) == 1:
        return tuple(Column(run.name, (run,)) for run in runs)
    places = {id(run): place for place, run in enumerate(runs)}
    return tuple(sorted(columns, key=lambda column: places[id(column.runs[0])]))


def keys_that_part(columns: Sequence[Column]) -> list[tuple[tuple[Run, ...], tuple[str, ...]]]:
    """Runs that would be one column if it were not for keys that change neither text, network nor training.

    Returns:
        These runs and the keys: of numerics, of the evaluate stage, or not known to this version.
    """
    runs = [run for column in columns for run in column.runs]
    whole = [column for column in columns if len(column.runs) > 1]
    parted = _group(runs, _beside_pretraining, whole)
    if len(parted) + len(runs) - sum(len(column.runs) for column in parted) == 1:
        return []  # all of them: they would stand beside each other all the same
    found = []
    for column in parted:
        differing = [each for each in _all_differences(*column.runs) if not _execution(each) and each.key != "run.seed"]
        if differing:
            found.append((column.runs, tuple(sorted({each.follows_from or each.key for each in differing}))))
    return found


def representative(column: Column) -> Run:
    """A run with the settings of a column: its seed, and an execution key that differs, is the list of all values."""
    first = column.runs[0]
    several = {
        key: ", ".join(sorted(values, key=lambda value: (len(value), value)))  # whole numbers by their size
        for key in first.settings
        if (key == "run.seed" or list_of(key)[0] == "execution")
        and len(values := {run.settings[key] for run in column.runs if key in run.settings}) > 1
    }
    return replace(first, settings=first.settings | several)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _group(runs: Sequence[Run], tolerated: _Tolerance, columns: Sequence[Column] = ()) -> list[Column]:
    """The columns of several runs: these, with what belongs to them of the other runs, and new ones."""
    groups = [list(column.runs) for column in columns]
    known = {id(run) for group in groups for run in group}
    for run in runs:
        if id(run) in known:
            continue
        own = next((group for group in groups if all(_differ_in_seed(run, other, tolerated) for other in group)), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    places = {id(run): place for place, run in enumerate(runs)}
    groups = [sorted(group, key=lambda run: places[id(run)]) for group in groups if len(group) >= FEWEST_SEEDS]
    return [Column(f"{group[0].name} ({len(group)} seeds)", tuple(group)) for group in groups]


def _differ_in_seed(one: Run, other: Run, tolerated: _Tolerance) -> bool:
    return {each.key for each in _all_differences(one, other) if not tolerated(each)} == {"run.seed"}


def _all_differences(*runs: Run) -> tuple[Difference, ...]:
    """Also those that follow from others: an execution key such as a budget has consequences that are none."""
    found = find_differences(runs)
    return found.own + found.following


def _nothing(_: Difference) -> bool:
    return False


def _execution(difference: Difference) -> bool:
    return difference.list == "execution"


def _beside_pretraining(difference: Difference) -> bool:
    return difference.stage not in ("tokenize", "pretrain")
