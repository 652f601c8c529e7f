"""What `electra status` and the end of a run show."""

from typing import Any

import click

from pipeline.chain import plan_stages, stages_of
from pipeline.config import Config
from pipeline.errors import FORESEEN
from pipeline.evaluation.stored import read_results
from pipeline.journal import read_entries
from pipeline.stages import STAGES, is_running, read_record, stage_folder
from pipeline.tracking import read_tracking, resolve_uri


def describe_status(config: Config) -> dict[str, Any]:
    """State of each stage, progress of training, MLflow ids, and what a rerun would do."""
    stages: dict[str, Any] = {}
    for stage in STAGES:
        record = read_record(config, stage)
        state = record.state if record else "not started"
        stages[stage] = {
            "state": "killed" if state == "running" and not is_running(config) else state,
            "attempts": record.attempts if record else 0,
            "metrics": record.metrics if record else {},
        }
    entries = read_entries(stage_folder(config, "pretrain") / "journal.jsonl")
    stages["pretrain"]["step"] = entries[-1]["step"] if entries else 0
    stages["pretrain"]["steps"] = config.train.steps
    stages["evaluate"] |= _units_of(config)
    try:
        decisions = plan_stages(config, stages_of(config))
        rerun = {decision.stage: f"{decision.action}: {decision.why}" for decision in decisions}
    except FORESEEN as error:
        rerun = {"refused": str(error)}
    return {
        "run": config.run.name,
        "folder": str(config.run_folder),
        "stages": stages,
        "rerun": rerun,
        "mlflow": read_tracking(config),
    }


def _units_of(config: Config) -> dict[str, Any]:
    """Units that are done, and the medians so far; nothing before the first one."""
    record = read_record(config, "evaluate")
    results = read_results(stage_folder(config, "evaluate") / "results_so_far.json")
    if record is None or results is None or results["fingerprint"] != record.fingerprint:
        return {}
    scores = {task: results["tasks"][task][metric]["median"] for task, metric in results["score"].items()}
    return {"units": results["units"], "scores_so_far": scores, "failed": results["failed"]}


def format_status(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [f"run {found['run']} in {found['folder']}"]
    for stage, about in found["stages"].items():
        progress = f"  step {about['step']:,} of {about['steps']:,}" if "step" in about else ""
        if "units" in about:
            scores = ", ".join(f"{task} {value:.4f}" for task, value in about["scores_so_far"].items())
            progress = f"  {about['units']['done']} of {about['units']['of']} units; medians so far: {scores or 'none'}"
            progress += "".join(f"\n    failed: {f['task']}, seed {f['seed']}: {f['error']}" for f in about["failed"])
        lines.append(f"  {stage:9} {about['state']:12}{progress}")
    lines += [f"  a rerun would {stage}: {action}" for stage, action in found["rerun"].items()]
    for stage, run_id in found["mlflow"].get("runs", {}).items():
        lines.append(f"  MLflow {stage:9} {run_id}")
    return "\n".join(lines)


def print_summary(config: Config) -> None:
    """Scores, the run's folder, and how to look at it in MLflow."""
    pretrain = read_record(config, "pretrain")
    metrics = pretrain.metrics if pretrain else {}
    click.echo()
    if metrics:
        click.echo(
            f"held-out text: loss on [MASK] {metrics['held_out/mask_token_loss']:.3f} nats, "
            f"unigram entropy {metrics['held_out/unigram_entropy']:.3f} nats"
        )
    if "held_out/discriminator_auc" in metrics:
        auc, error = metrics["held_out/discriminator_auc"], metrics["held_out/discriminator_auc_standard_error"]
        click.echo(
            f"               discriminator's AUC {auc:.4f}, standard error {error:.4f}, "
            f"{(auc - 0.5) / max(error, 1e-12):.1f} standard errors above chance"
        )
    if "held_out/prediction_accuracy" in metrics:
        click.echo(f"               originals predicted: {100 * metrics['held_out/prediction_accuracy']:.1f} %")
    results = read_results(stage_folder(config, "evaluate") / "results.json")
    if results:
        for task, scores in results["tasks"].items():
            for metric, values in scores.items():
                runs = ", ".join(f"{value:.3f}" for value in values["values"])
                click.echo(f"{task}: {metric} {values['median']:.3f} (median of {runs})")
    click.echo(f"run folder: {config.run_folder}")
    uri = resolve_uri(config)
    if uri and uri.startswith("sqlite:"):
        click.echo(f"open MLflow: mlflow ui --backend-store-uri '{uri}'")
    elif uri:
        click.echo(f"MLflow: {uri}")
