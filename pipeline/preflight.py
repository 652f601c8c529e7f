"""Whether a stage could start here: asked before an allocation is spent on it."""

from pathlib import Path

from pipeline.config import Config
from pipeline.distributed import resolve_device
from pipeline.errors import ConfigError
from pipeline.plan import make_plan
from pipeline.stages import read_record, stage_folder
from pipeline.tokenize import load_tokenize_output, tokenize_inputs


def check_stage(config: Config, stage: str) -> None:
    """Raises the error that the stage would end with, as far as seconds can tell.

    Raises:
        ConfigError: Missing input, wrong setting, no GPU where one is needed.
        DamagedDataError: A shard that is not as long as its manifest says.
    """
    make_plan(config, world_size=1)
    if stage == "tokenize":
        tokenize_inputs(config)
        return
    resolve_device(config.launch.device)
    if stage == "pretrain":
        _check_shards(config)
        return
    pretrain = read_record(config, "pretrain")
    if pretrain is None or pretrain.state != "done":
        raise ConfigError(
            f"{stage_folder(config, 'pretrain')}: pretraining of run {config.run.name!r} is not finished; "
            "run `electra pretrain` with this config first"
        )
    from pipeline.evaluation.tasks import load_tasks

    for task in load_tasks(config):
        task.digest()


def _check_shards(config: Config) -> None:
    from data_shards.loader import RowLoader

    output = load_tokenize_output(config)
    folders = [Path(corpus["folder"]) for corpus in output["corpora"]]
    weights = [corpus.weight for corpus in config.data.corpora]
    RowLoader(folders, weights, config.data.sequence_length, config.train.global_batch_size, config.run.seed)
