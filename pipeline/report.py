"""What the end of a run shows."""

import click

from pipeline.config import Config
from pipeline.evaluation.stored import read_results
from pipeline.redaction import redact
from pipeline.stages import read_record, stage_folder
from pipeline.tracking import resolve_uri


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
        click.echo(f"MLflow: {redact(uri)}")
