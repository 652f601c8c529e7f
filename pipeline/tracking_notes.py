"""The note of a run in MLflow: what ran, what came out, and the command that makes it again."""

import shlex
from typing import Any

from pipeline.config import Config
from pipeline.journal import Entry
from pipeline.stages import STAGES, StageRecord

NOTE = "mlflow.note.content"
_MARK = "<!-- written by electra; without this line the note is yours -->"
_MOST_CHARACTERS = 7000
_LOSSES = {
    "train/total_loss": "total",
    "train/generator_mlm_loss": "generator",
    "train/discriminator_rtd_loss": "discriminator",
}


def note_tag(held: str | None, lines: list[str]) -> dict[str, str]:
    """The tag with a note, unless a user has written one."""
    if held is not None and not held.startswith(_MARK):
        return {}
    return {NOTE: "\n".join([_MARK, "", *lines])[:_MOST_CHARACTERS]}


def describe_run(config: Config, records: dict[str, StageRecord], entry: Entry | None) -> list[str]:
    """Markdown about all stages.

    Args:
        config: The run.
        records: Of the stages that were started.
        entry: Last line of the journal; None while training goes on, when it would change all the time.
    """
    model, objective = config.model, config.objective
    rows = {
        "model": f"{model.size}: {model.hidden_layers} layers of {model.hidden_size}, {objective.name}, "
        f"{objective.training}",
        "stages": ", ".join(_state(records[stage]) for stage in STAGES if stage in records),
    }
    if "tokenize" in records and (tokens := records["tokenize"].metrics.get("data/tokens")):
        rows["text"] = f"{tokens:,.0f} tokens"
    if entry:
        rows |= {
            "trained": f"step {entry['step']:,} of {config.train.steps:,}, {entry['tokens']:,} tokens, "
            f"{entry['wall_s']:,.0f} s",
            "FLOPs": f"{entry['flops']:.3g} nominal"
            + (f", {entry['flops_paper']:.3g} as the paper counts" if entry.get("flops_paper") else ""),
            "loss": ", ".join(f"{name} {entry[key]:.4f}" for key, name in _LOSSES.items() if entry.get(key)),
        }
    if "evaluate" in records:
        rows |= _scores(records["evaluate"].metrics)
    table = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    return [f"**{config.run.name}**", "", *table, "", *_reproduce(records)]


def _state(record: StageRecord) -> str:
    attempts = f" in {record.attempts} attempts" if record.attempts > 1 else ""
    return f"{record.stage} {record.state}{attempts}"


def _scores(metrics: dict[str, float]) -> dict[str, str]:
    """Medians with the spread over seeds."""
    rows = {}
    for name, median in metrics.items():
        if name.startswith("eval/") and not name.endswith(("_mean", "_std", "_ci95_low", "_ci95_high")):
            spread, low = metrics.get(f"{name}_std"), metrics.get(f"{name}_ci95_low")
            rows[name] = f"{median:.4f}" + (f", std {spread:.4f} over seeds" if spread is not None else "")
            if low is not None:
                rows[name] += f", 95 % of the mean {low:.4f} to {metrics[f'{name}_ci95_high']:.4f}"
    return rows


def _reproduce(records: dict[str, StageRecord]) -> list[str]:
    environment = next((records[stage].environment for stage in reversed(STAGES) if stage in records), {})
    command = command_of(environment)
    if command is None:
        return []
    commit = environment.get("git")
    of_commit = "an unknown commit" if not commit else f"commit `{commit.removesuffix('-dirty')}`"
    edited = ", **with edits that are in no commit**" if (commit or "").endswith("-dirty") else ""
    return [
        f"The same run again, at {of_commit}{edited}, in `{environment.get('working_folder')}`:",
        "",
        f"    {command}",
        "",
        "or with the artifact `config.yaml`, which has every value.",
    ]


def command_of(environment: dict[str, Any]) -> str | None:
    """``electra run CONFIG key=value …`` from the command of any stage; None where none was recorded."""
    words = shlex.split(environment.get("command", ""))[2:]  # after `electra` and its command
    files = [word for word in words if "=" not in word and word[0] != "-" and word not in STAGES]
    if not files:
        return None
    return shlex.join(["electra", "run", files[0], *(word for word in words if "=" in word and word[0] != "-")])
