"""A run that goes on from another one's checkpoint (``run.fork_from=NAME@STEP``): what both must have in common, and
what it takes over: weights, moments, the journal, rows that are left out, and which rows were read.

    parent     step 0 ───────────────────────── STEP ─── …       its batch, its weights of the corpora
    fork                                        STEP ─── …       its own, from the rows on that the parent did not read
"""

from pathlib import Path
from typing import Any

from data_shards.loader import RowsBefore
from data_shards.order import Mixture
from model.flops import generator_steps
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.journal import Journal, read_entries
from pipeline.log import logger
from pipeline.spikes import inherit_skips, read_skips, step_of_rows
from pipeline.stages import read_record, read_record_file, stage_folder

_WEIGHT = ("data.corpora.", ".weight")


def parent_folder(config: Config) -> Path:
    """Where the run that this one goes on from was pretrained."""
    assert config.run.fork_from
    return config.run.dir / "runs" / config.run.fork_from.rpartition("@")[0] / "pretrain"


def fork_step(config: Config) -> int:
    """The step that it goes on from."""
    assert config.run.fork_from
    return int(config.run.fork_from.rpartition("@")[2])


def load_parent(config: Config, is_first: bool) -> checkpoints.Checkpoint:
    """The checkpoint named by ``run.fork_from``; its journal up to that step becomes this run's.

    Raises:
        ConfigError: The two runs do not fit together.
    """
    if fork_step(config) >= config.train.steps:
        raise ConfigError(
            f"run.fork_from={config.run.fork_from} leaves nothing to train: train.steps={config.train.steps}; raise it"
        )
    parent, step = parent_folder(config), fork_step(config)
    record, own = read_record_file(parent / "stage.json"), read_record(config, "pretrain")
    if record and own and record.inputs["tokenizer"] != own.inputs["tokenizer"]:
        raise ConfigError(
            f"run.fork_from={config.run.fork_from}: that run has another tokenizer; its ids mean other words; set "
            "tokenizer.path to that run's"
        )
    science = record.inputs["science"] if record else {}
    _check_network(config, science)
    _check_training(config, science.get("objective.training", "joint") if record else config.objective.training)
    found = checkpoints.load(parent / "checkpoints", step, verify=is_first)
    _check_switch(config, science, step - found.state.get("skipped_steps", 0))
    if is_first:
        journal = Journal(stage_folder(config, "pretrain") / "journal.jsonl", -1)
        for entry in read_entries(parent / "journal.jsonl"):
            if entry["step"] <= found.step:
                journal.append(entry)
        journal.sync()
        inherit_skips(stage_folder(config, "pretrain"), parent, found.step)
    return found


def _check_network(config: Config, science: dict[str, Any]) -> None:
    """What the shapes of weights do not show."""
    for key in ("model.attention_heads", "model.activation"):
        ours = config.flat()[key]
        if science.get(key, ours) != ours:
            raise ConfigError(
                f"run.fork_from={config.run.fork_from}: that run has {key}={science[key]}, this one {ours}: the same "
                f"weights would be another network; set {key}={science[key]}"
            )
    eps = config.model.layer_norm_eps
    if science.get("model.layer_norm_eps", eps) != eps:
        logger.warning(
            "run.fork_from=%s: that run has model.layer_norm_eps=%g, this one %g",
            config.run.fork_from, science["model.layer_norm_eps"], eps,
        )  # fmt: skip


def _check_training(config: Config, training: str) -> None:
    if training != config.objective.training and "two_stage" in (training, config.objective.training):
        raise ConfigError(
            f"run.fork_from={config.run.fork_from}: that run has objective.training={training}, this one "
            f"{config.objective.training}; two stages cannot be entered or left on the way: start a run of its own"
        )


def _check_switch(config: Config, science: dict[str, Any], applied_steps: int) -> None:
    """The second stage begins with the generator's weights: begun again, it would lose what it has learned."""
    switch = generator_steps(config.objective, config.train.steps)
    theirs = science.get("objective.generator_steps")
    if theirs is None:
        theirs = science.get("train.steps", 2 * switch) // 2
    if config.objective.training == "two_stage" and theirs != switch and applied_steps > min(theirs, switch):
        raise ConfigError(
            f"run.fork_from={config.run.fork_from}: that run's first stage has {theirs} steps, this one's {switch}, "
            f"and {applied_steps} updates are made: the switch cannot be moved; set objective.generator_steps={theirs}"
        )


def read_by_parent(config: Config, state: dict[str, Any]) -> dict[str, Any] | None:
    """What the parent had read of each corpus, as the fork's checkpoints keep it (``TrainingState.rows_before``).

    Args:
        config: The fork's.
        state: Of the parent's checkpoint.

    Returns:
        ``step`` from which on the fork's batch and weights hold, in steps of the parent's order of rows; ``corpora``,
        for each the ``number`` that keys its rows, ``rows`` of this run's length that were read, and its
        ``window_share``. None where nobody knows, or rows are made in another way.
    """
    parent, step = parent_folder(config), fork_step(config)
    record, own = read_record_file(parent / "stage.json"), read_record(config, "pretrain")
    if record is None or own is None or record.inputs["science"]["data.layout"] != config.data.layout:
        return None
    science = record.inputs["science"]
    begin, end = _WEIGHT
    keys = {key.removeprefix(begin).removesuffix(end): key for key in science if key.startswith(begin)}
    names, weights = sorted(keys), [science[keys[name]] for name in sorted(keys)]
    earlier = rows_before(names, weights, state.get("rows_before")) or RowsBefore.nothing(weights)
    mixture = Mixture(weights, earlier.rows)
    steps = step_of_rows(step, [skip for skip in read_skips(parent) if skip.after_step <= step])
    rows = mixture.rows_at(mixture.first + (steps - earlier.step) * science["train.global_batch_size"])
    corpora = (state.get("rows_before") or {}).get("corpora", {})  # those that the parent did without, too
    for name, number, count, share in zip(names, earlier.numbers, rows.tolist(), earlier.window_shares, strict=True):
        corpora |= {name: {"number": number, "rows": count, "window_share": share}}
    length, own_length = science["data.sequence_length"], config.data.sequence_length
    texts, own_texts = record.inputs["shards"], own.inputs["shards"]
    for name, about in corpora.items():
        is_other_text = texts.get(name, own_texts.get(name)) != own_texts.get(name, texts.get(name))
        about["rows"] = 0 if is_other_text else -(-about["rows"] * length // own_length)
    _warn_of_another_order(config, science)
    return {"step": steps, "corpora": corpora}


def _warn_of_another_order(config: Config, science: dict[str, Any]) -> None:
    ours = config.flat()
    order = ("run.seed", "data.sequence_length", "data.shuffle_window_gib")
    if other := [key for key in order if science.get(key, ours[key]) != ours[key]]:
        logger.warning(
            "run.fork_from=%s: with another %s rows come in another order: of this epoch some come again, and some not",
            config.run.fork_from, " and ".join(other),
        )  # fmt: skip


def rows_before(names: list[str], weights: list[float], read: dict[str, Any] | None) -> RowsBefore | None:
    """What ``read_by_parent`` found, for these corpora in the order of their names.

    A new corpus gets a number that nobody had. None where ``read`` is: in a run of its own, and in a fork that began
    before checkpoints kept this, which reads what its own batch and weights would have come to.
    """
    if read is None:
        return None
    known, whole = dict(read["corpora"]), sum(weights)
    unused = max((about["number"] for about in known.values()), default=-1) + 1
    for name, weight in zip(names, weights, strict=True):
        if name not in known:
            known[name] = {"number": unused, "rows": 0, "window_share": weight / whole}
            unused += 1
    of_each = [known[name] for name in names]
    rows, numbers, shares = (tuple(about[key] for about in of_each) for key in ("rows", "number", "window_share"))
    return RowsBefore(read["step"], rows, numbers, shares)
