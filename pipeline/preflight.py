"""Whether a stage could start here: asked before an allocation is spent on it."""

from pathlib import Path

from data_shards.corpus import corpus_files
from pipeline.attempts import refuse_to_start
from pipeline.batches import open_rows
from pipeline.chain import decide
from pipeline.config import Config
from pipeline.deepspeed_config import build_deepspeed_config
from pipeline.distributed import resolve_device
from pipeline.engine import check_precision
from pipeline.errors import ConfigError
from pipeline.evaluation.pretrained import find_more, find_pretrained
from pipeline.evaluation.tasks import load_tasks
from pipeline.evaluation.units import plan_units
from pipeline.plan import make_plan
from pipeline.stages import shard_folders, stage_folder
from pipeline.tokenize import check_given_tokenizer, corpora_of, load_tokenize_output


def check_stage(config: Config, stage: str) -> None:
    """Raises the error that the stage would end with, as far as seconds can tell.

    Raises:
        ConfigError: A stage before that is not done, changed science, a wrong setting, no GPU.
        DataSettingError: No text, too little of it, no tokenizer.
        DamagedDataError: A shard that is not as long as its manifest says.
        StoppedByFile: A file STOP in the run's folder.
        DoNotRequeueError: Requeues of this Slurm job get nowhere.
    """
    build_deepspeed_config(config, make_plan(config, world_size=1))
    if stage == "tokenize":  # reads no text: hashing it takes as long as it takes
        for corpus in corpora_of(config):
            corpus_files(corpus)
        if config.tokenizer.path:
            check_given_tokenizer(config)
        return
    check_precision(config, resolve_device(config.launch.device))
    if stage == "evaluate" and isinstance(config.evaluate.checkpoint, Path):  # needs no stage before it
        decide(config, stage, keep_digests=False)
        _check_tasks(config)
        return
    output = load_tokenize_output(config)
    decision = decide(config, stage)
    if decision.action == "wait":
        raise ConfigError(f"{stage} cannot start: {decision.why}")
    if stage == "evaluate":
        _check_tasks(config)
    if stage == "pretrain":
        make_plan(config, world_size=1, vocab_size=output["vocab_size"])
        folders, weights = shard_folders(config, output, local=False)  # copies are a matter of the nodes
        open_rows(config, folders, weights)
        if decision.action != "reuse" and config.run.variant is None:  # a variant may wait for the ones before
            refuse_to_start(config)


def _check_tasks(config: Config) -> None:
    tasks = load_tasks(config)
    for task in tasks:
        task.check()
    for pretrained in [find_pretrained(config, installs=False), *find_more(config)]:
        plan_units(config, stage_folder(config, "evaluate"), pretrained, tasks)
