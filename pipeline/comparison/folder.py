"""A run from its folder. Nothing stays there, and nothing is imported that takes long."""

from pathlib import Path
from typing import Any

from pipeline.comparison.curves import Curves, columns_of
from pipeline.comparison.run import Run, as_text, settings_of
from pipeline.config import flatten
from pipeline.config_file import parse_yaml
from pipeline.errors import ConfigError, DamagedError
from pipeline.evaluation.stored import read_results
from pipeline.goodput import read_attempts, total_seconds
from pipeline.journal import stream_entries
from pipeline.stages import STAGES, StageRecord, is_running, read_record_file


def read_folder(folder: Path) -> Run:
    """Reads ``<run.dir>/runs/<name>``.

    Raises:
        ConfigError: It is no run's folder.
        DamagedError: A file in it is not what was written.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder}: no config.yaml in it; give the folder of a run, <run.dir>/runs/<run.name>")
    try:
        values = flatten(parse_yaml(path.read_text(encoding="utf-8")))
    except Exception as error:  # whatever ruamel raises
        raise DamagedError(f"{path}: not the YAML that was written ({error}); restore it from a copy") from error
    records = {stage: record for stage in STAGES if (record := read_record_file(folder / stage / "stage.json"))}
    pretrain, tokenize = records.get("pretrain"), records.get("tokenize")
    settings = settings_of(values)
    if tokenize and "tokenizer_sha256" in tokenize.output:
        settings["tokenizer.sha256"] = tokenize.output["tokenizer_sha256"]
    identity = folder / "run_id"
    found = [results for file in sorted(folder.glob("evaluate/*/results.json")) if (results := read_results(file))]
    return Run(
        name=str(values.get("run.name") or folder.name),
        source=str(folder.resolve()),
        settings=settings,
        numerics={key: as_text(value) for key, value in flatten(pretrain.numerics if pretrain else {}).items()},
        curves=_with_results(columns_of(stream_entries(folder / "pretrain" / "journal.jsonl")), pretrain),
        facts=_facts(folder, pretrain, records),
        results=read_results(folder / "evaluate" / "results.json"),
        all_results=found,
        task_digests=records["evaluate"].inputs.get("tasks", {}) if "evaluate" in records else {},
        identity=identity.read_text(encoding="utf-8").strip() if identity.exists() else "",
    )


def _with_results(curves: Curves, pretrain: StageRecord | None) -> Curves:
    """The scores of a stage's end in the line of their step, as MLflow has them."""
    (places,) = (curves.axes["step"] == (pretrain.metrics_step if pretrain else -1)).nonzero()
    for name, value in (pretrain.metrics if pretrain and len(places) else {}).items():
        curves.metrics.setdefault(name, curves.axes["step"] * float("nan"))[places[-1]] = value
    return curves


def _facts(folder: Path, pretrain: StageRecord | None, records: dict[str, StageRecord]) -> dict[str, Any]:
    latest = next((records[stage] for stage in reversed(STAGES) if stage in records), None)
    seconds = total_seconds(read_attempts(folder / "pretrain"))
    whole = sum(seconds.values())
    state = f"{latest.stage} {latest.state}" if latest else "not started"
    if latest and latest.state == "running" and not is_running(folder):
        state = f"{latest.stage} killed"
    return {
        "status": state,
        "attempts": pretrain.attempts if pretrain else None,
        "git": pretrain.environment.get("git") if pretrain else None,
        "goodput_pct": 100 * seconds["productive"] / whole if whole else None,
    }
