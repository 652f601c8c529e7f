"""Where a run's numbers come from, in MLflow's terms: datasets, commit, Slurm job, checkpoint, model version."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException

from data_shards.store import read_manifest
from pipeline.config import Config, CorpusConfig
from pipeline.stages import StageRecord, locate_tokenized
from pipeline.tracking_store import Store, TrackedRun

_CONTEXT = "mlflow.data.context"
_DIGEST_CHARACTERS = 36  # MLflow's limit
_JOB_IDS = "electra.slurm_job_ids"
_REFUSALS = {
    "FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE", "NOT_IMPLEMENTED", "PERMISSION_DENIED",
    "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST",
}  # fmt: skip
"""Answers of a registry that trying again would not change."""


def stage_tags(record: StageRecord, held: dict[str, str]) -> dict[str, str]:
    """Tags of a stage's run: attempts, machine, commit, Slurm job, digests of what it made.

    Args:
        record: Of the stage.
        held: Tags that the run has: the Slurm jobs of earlier attempts stay.
    """
    environment = record.environment
    tags = {"electra.attempts": str(record.attempts), "electra.host": str(environment.get("host"))}
    if commit := environment.get("git"):
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["mlflow.source.git.dirty"] = str(commit.endswith("-dirty")).lower()
    if command := environment.get("command"):
        tags["electra.command"] = command
    slurm = environment.get("slurm", {})
    tags |= {f"electra.{key.lower()}": value for key, value in slurm.items()}
    if job := slurm.get("SLURM_JOB_ID"):
        jobs = list(filter(None, held.get(_JOB_IDS, "").split(",")))
        tags[_JOB_IDS] = ",".join([*jobs, *([job] if job not in jobs else [])])
    tags |= {f"electra.{key}": str(value) for key, value in record.output.items() if key.endswith("sha256")}
    if "checkpoint_step" in record.output:
        tags["electra.checkpoint_step"] = str(record.output["checkpoint_step"])
    return tags


def corpora_inputs(config: Config, tokenized: dict[str, Any]) -> list[DatasetInput]:
    """The corpora that pretraining reads, one dataset each; the digest is of its shards and of the tokenizer.

    Args:
        config: The run.
        tokenized: Output of its tokenize stage.

    Raises:
        DataSettingError: A shard folder is absent.
    """
    corpora = {corpus.name: corpus for corpus in config.data.corpora}
    inputs = []
    for about in locate_tokenized(config, tokenized)["corpora"]:
        manifest, corpus = read_manifest(Path(about["folder"])), corpora[about["name"]]
        digest = hashlib.sha256(manifest.tokenizer_sha256.encode())
        for shard in manifest.shards:
            digest.update(f"{shard.name} {shard.bin_sha256} {shard.idx_sha256}\n".encode())
        profile = {
            "num_tokens": manifest.num_tokens(), "num_documents": manifest.num_documents(),
            "num_held_out_tokens": manifest.num_tokens("held_out"), "weight": corpus.weight,
            "tokenizer_sha256": manifest.tokenizer_sha256, "shards": about["folder"],
        }  # fmt: skip
        kind, source = _source_of(corpus)
        inputs.append(_dataset(corpus.name, digest.hexdigest(), kind, source, profile, "training"))
    return inputs


def _source_of(corpus: CorpusConfig) -> tuple[str, dict[str, Any]]:
    """Kind and content of a dataset's source, as MLflow's own datasets have it."""
    if corpus.hub is None:
        return "local", {"uri": corpus.path}
    return "hugging_face", {
        "path": corpus.hub, "config_name": corpus.hub_config, "split": corpus.hub_split,
        "revision": corpus.hub_revision, "data_dir": None, "data_files": None,
    }  # fmt: skip


def task_inputs(config: Config, record: StageRecord) -> list[DatasetInput]:
    """The tasks that evaluate scores; the digest is of the task file and of its data."""
    files = {Path(task).stem: task for task in config.evaluate.tasks if task.endswith((".yaml", ".yml"))}
    folder = config.evaluate.data_dir
    return [
        _dataset(name, digest, "local", {"uri": files.get(name) or str(folder / name if folder else name)}, {},
                 "evaluation")
        for name, digest in record.inputs["tasks"].items()
    ]  # fmt: skip


def _dataset(
    name: str, digest: str, kind: str, source: dict[str, Any], profile: dict[str, Any], context: str
) -> DatasetInput:
    dataset = Dataset(
        name, digest[:_DIGEST_CHARACTERS], kind, json.dumps(source), profile=json.dumps(profile) if profile else None
    )
    return DatasetInput(dataset, [InputTag(_CONTEXT, context)])


def scored_checkpoint(record: StageRecord, pretrain: TrackedRun | None) -> dict[str, str]:
    """Tags of an evaluate run that lead to the checkpoint it scored; its digest and step are outputs of the stage."""
    tags = {"electra.checkpoint": str(record.output["checkpoint"])} if "checkpoint" in record.output else {}
    if pretrain and "pretrain" in record.inputs:
        tags["electra.pretrain_run_id"] = pretrain.run_id
    return tags


def forked_from(config: Config) -> dict[str, str]:
    """Tags of a pretrain run that started from another run's checkpoint, with its run id where it is known."""
    if config.run.fork_from is None:
        return {}
    parent = config.run.dir / "runs" / config.run.fork_from.rpartition("@")[0] / "mlflow.json"
    tags = {"electra.forked_from": config.run.fork_from}
    with suppress(FileNotFoundError, ValueError, KeyError):
        tags["electra.forked_from_run_id"] = json.loads(parent.read_text(encoding="utf-8"))["runs"]["pretrain"]
    return tags


def register_model(
    store: Store, config: Config, record: StageRecord, evaluate: TrackedRun, pretrain: TrackedRun | None
) -> str:
    """Makes the checkpoint that a finished evaluation scored a version of the registered model.

    The model has the experiment's name. A digest is registered once; its scores are set anew. Weights are not
    uploaded: the version's source is the checkpoint's folder in a database of this machine's, and on a server,
    which takes no paths of its clients, the artifact of the pretrain run that has the checkpoint's manifest.

    Returns:
        What was done, in a sentence; a registry that refuses is no error.
    """
    if "checkpoint_sha256" not in record.output:
        return "evaluated by an earlier version: no model version"
    output = record.output
    owner = pretrain if pretrain and "pretrain" in record.inputs else evaluate
    tags = {
        "electra.run_name": config.run.name, "electra.model_size": config.model.size,
        "electra.evaluate_run_id": evaluate.run_id, "electra.checkpoint": output["checkpoint"],
        "electra.checkpoint_step": str(output["checkpoint_step"]),
        "electra.checkpoint_sha256": output["checkpoint_sha256"],
    }  # fmt: skip
    tags |= {name: f"{value:.6g}" for name, value in record.metrics.items()}
    name = config.tracking.experiment.replace("/", "-").replace(":", "-").strip("-.")
    try:
        return _register(store, name, Path(output["checkpoint"]), owner, tags)
    except MlflowException as error:
        if error.error_code not in _REFUSALS:
            raise
        return f"the model registry takes no version ({error}); the scores are metrics and tags of the runs alone"


def _register(store: Store, name: str, folder: Path, owner: TrackedRun, tags: dict[str, str]) -> str:
    client, digest = store.client, tags["electra.checkpoint_sha256"]
    wanted = f"name = '{name}' and tags.`electra.checkpoint_sha256` = '{digest}'"
    found = client.search_model_versions(wanted, max_results=1)
    if found:
        for key, value in tags.items():
            if found[0].tags.get(key) != value:
                client.set_model_version_tag(name, found[0].version, key, value)
        return f"model {name}, version {found[0].version}: scores compared"
    try:
        client.create_registered_model(name, description="Checkpoints that `electra evaluate` has scored.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    place = f"checkpoints/{folder.name}"
    if (manifest := folder / "MANIFEST.json").exists():
        client.log_artifact(owner.run_id, str(manifest), place)
    source = folder.as_uri() if store.is_sqlite else f"runs:/{owner.run_id}/{place}"
    version = client.create_model_version(
        name, source, owner.run_id, tags, description=f"The weights are in {folder}", await_creation_for=0
    )
    return f"model {name}, version {version.version}: {folder.name} of {tags['electra.run_name']}"
