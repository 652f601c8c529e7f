"""A run that goes on from another one's checkpoint (``run.fork_from=NAME@STEP``): what both must have in common, and
what it takes over: weights, moments, the journal, rows that are left out, and which rows were read.

    parent     step 0 ───────────────────────── STEP ─── …       its batch, its weights of the corpora
    fork                                        STEP ─── …       its own, from the rows on that the parent did not read
"""

import json
from pathlib import Path
from typing import Any

from data_shards.loader import RowsBefore
from data_shards.order import Mixture
from data_shards.store import write_json
from model.flops import generator_steps
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedError
from pipeline.journal import Journal, read_entries
from pipeline.log import logger
from pipeline.spikes import inherit_skips, read_skips, step_of_rows
from pipeline.stages import read_record, read_record_file, stage_folder

_WEIGHT = ("data.corpora.", ".weight")
_FILE = "rows_before.json"


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


def rows_before(config: Config) -> RowsBefore | None:
    """What a fork's parent had read of each corpus; None in a run of its own.

    It is kept in the run's folder from the fork's first checkpoint on. A fork that is older than that file reads the
    rows that its own batch and weights would have come to.

    Raises:
        DamagedError: The file cannot be read; without it the run would read other rows.
    """
    folder = stage_folder(config, "pretrain")
    if config.run.fork_from is None:
        return None
    if not checkpoints.list_steps(folder / "checkpoints"):
        (folder / _FILE).unlink(missing_ok=True)
        if read := _read_by_parent(config):
            write_json(folder / _FILE, read)
    return _of_corpora([corpus.name for corpus in config.data.corpora], folder)


def _read_by_parent(config: Config) -> dict[str, Any] | None:
    """Rows, counted in this run's length; None where nobody knows, or rows were made in another way."""
    parent, step = parent_folder(config), fork_step(config)
    record = read_record_file(parent / "stage.json")
    if record is None or record.inputs["science"]["data.layout"] != config.data.layout:
        return None
    science = record.inputs["science"]
    begin, end = _WEIGHT
    keys = {key.removeprefix(begin).removesuffix(end): key for key in science if key.startswith(begin)}
    names = sorted(keys)
    earlier = _of_corpora(names, parent) or RowsBefore(0, (0,) * len(names), tuple(range(len(names))))
    mixture = Mixture([science[keys[name]] for name in names], earlier.rows)
    steps = step_of_rows(step, [skip for skip in read_skips(parent) if skip.after_step <= step])
    rows = mixture.rows_at(mixture.first + (steps - earlier.step) * science["train.global_batch_size"])
    theirs, ours = science["data.sequence_length"], config.data.sequence_length
    corpora = _load(parent)["corpora"] if (parent / _FILE).exists() else {}
    for name, number, count in zip(names, earlier.numbers, rows.tolist(), strict=True):
        corpora[name] = {"number": number, "rows": -(-count * theirs // ours)}
    return {"step": steps, "corpora": corpora}


def _of_corpora(names: list[str], folder: Path) -> RowsBefore | None:
    """What the file in ``folder`` says of these corpora, by name; a new one gets a number that nobody had."""
    if not (folder / _FILE).exists():
        return None
    content = _load(folder)
    known = content["corpora"]
    unused = max(about["number"] for about in known.values()) + 1
    for name in sorted(set(names) - known.keys()):
        known[name] = {"number": unused, "rows": 0}
        unused += 1
    found = [known[name] for name in sorted(names)]
    return RowsBefore(content["step"], tuple(f["rows"] for f in found), tuple(f["number"] for f in found))


def _load(folder: Path) -> dict[str, Any]:
    path = folder / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        corpora = {
            name: {"number": int(about["number"]), "rows": int(about["rows"])}
            for name, about in content["corpora"].items()
        }
        return {"step": int(content["step"]), "corpora": corpora}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: unreadable ({error}); restore it from a copy") from error
