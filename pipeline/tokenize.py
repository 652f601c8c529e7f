"""The tokenize stage: text to a tokenizer and shards, stored by content.

    files ──digest──▶ key ──▶ tokenizers/<key>/ ──▶ shards/<corpus>-<key>/ for each corpus

What exists under its key is used as it is: another run's tokenizer and shards
serve this one if their inputs are equal.
"""

import os
import signal
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_shards.build import FolderJob, Progress, Share, build_folder
from data_shards.corpus import Corpus, huge_files_warning, plan_tasks
from data_shards.digest import corpus_digest, digest_file
from data_shards.keys import content_key, given_tokenizer_inputs, shard_inputs, tokenizer_inputs
from data_shards.store import MANIFEST, Layout, Manifest, read_manifest
from data_shards.tokenizer import LIBRARY_NAME, MODEL_NAME, Tokenizer
from data_shards.tokenizer_files import TokenizerSettings, install, make_trained
from data_shards.workers import WorkerPool
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.distributed import STOP_SIGNALS, Process, discover_process, ignore_stop_signals, place_in_array
from pipeline.errors import ConfigError, StoppedEarly
from pipeline.keys import science_of
from pipeline.log import logger
from pipeline.stages import StageRecord, locate_tokenized, read_record, read_record_file, stage_folder

_PROGRESS_INTERVAL_S = 10.0


def share_of_work() -> Share:
    """This process's share of tokenisation, as Slurm's array and srun say; all of it elsewhere."""
    process = discover_process() or Process()
    number, count = place_in_array()
    return Share(number * process.world_size + process.rank, count * process.world_size)


def tokenize_inputs(config: Config, share: Share, keep_digests: bool = True) -> dict[str, Any]:
    """What the stage's result depends on; reads all text whose digest nobody has kept.

    Args:
        config: The run.
        share: Which text to read first, when other processes read it too.
        keep_digests: Whether this may write to the run's folder.
    """
    cache = config.run.dir / "digests"
    text = {
        corpus.name: corpus_digest(
            corpus,
            cache if keep_digests or cache.is_dir() else None,
            share.part,
            share.num_parts,
            num_workers(config),
        )
        for corpus in corpora_of(config)
    }
    inputs: dict[str, Any] = {"science": science_of(config, "tokenize"), "text": text}
    if config.tokenizer.path:
        inputs["tokenizer_file"] = _digest_of_given(config.tokenizer.path)
    return inputs


def _digest_of_given(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"tokenizer.path={path}: no such file; give one, or leave it out to train a tokenizer")
    return digest_file(path)


def check_given_tokenizer(config: Config) -> None:
    """Installs the given tokenizer in a folder that is thrown away, for the errors that this may raise."""
    given = config.tokenizer.path
    assert given is not None
    with TemporaryDirectory() as folder:
        install(Path(folder) / "tokenizer", given, config.tokenizer.lowercase)


def _stop(number: int, frame: Any) -> None:
    del frame
    ignore_stop_signals()
    raise StoppedEarly(
        f"tokenize stopped ({signal.Signals(number).name}); finished tasks are kept, the same command goes on"
    )


def is_complete(config: Config, record: StageRecord) -> bool:
    """Whether everything that the record names is still on disk."""
    folders = [Path(corpus["folder"]) for corpus in record.output.get("corpora", [])]
    return bool(folders) and all((folder / MANIFEST).exists() for folder in folders) and (
        Path(record.output["tokenizer"]).exists()
    )  # fmt: skip


def run_tokenize(config: Config, record: StageRecord, share: Share) -> None:
    """Makes the tokenizer and the shards that are missing; fills ``record``'s output and metrics.

    Any number of processes, on any nodes, may run this at the same time: each ends when all is there.
    """
    started = time.monotonic()
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    digests = record.inputs["text"]
    tokenizer = _obtain_tokenizer(config, record)
    _check_parents_tokenizer(config, tokenizer)
    logger.info("tokenizer: %s, %s ids", tokenizer.folder, f"{tokenizer.vocab_size:,}")

    manifests: list[tuple[Path, Manifest]] = []
    for corpus in corpora_of(config):
        inputs = shard_inputs(
            corpus, digests[corpus.name], tokenizer.digest, config.data.held_out_fraction, config.data.task_bytes,
            _layout(config),
        )  # fmt: skip
        key = content_key(inputs)
        folder = config.shards_dir / f"{corpus.name}-{key}"
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            logger.info("%s: %s tokens are there already, in %s", corpus.name, f"{manifest.num_tokens():,}", folder)
        else:
            _check_shards_dir_tokenizer(config, corpus, tokenizer)
            _warn_of_huge_files(config, corpus, share)
            job = FolderJob(folder, corpus, key, tokenizer.folder, config.data.held_out_fraction, _layout(config))
            manifest = build_folder(
                job, inputs, config.data.task_bytes, num_workers(config), share, _ProgressLine(corpus.name),
                _PROGRESS_INTERVAL_S, partial(_is_unchanged, config, corpus, digests[corpus.name]),
            )  # fmt: skip
            logger.info("%s: %s tokens written to %s", corpus.name, f"{manifest.num_tokens():,}", folder)
        _report_counts(manifest)
        manifests.append((folder, manifest))

    record.output = {
        "tokenizer": str(tokenizer.folder),
        "tokenizer_sha256": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "corpora": [{"name": m.corpus, "key": m.key, "folder": str(folder)} for folder, m in manifests],
    }
    record.metrics = {
        "data/tokens": float(sum(m.num_tokens() for _, m in manifests)),
        "data/documents": float(sum(m.num_documents() for _, m in manifests)),
        "data/held_out_tokens": float(sum(m.num_tokens("held_out") for _, m in manifests)),
        "data/tokenize_s": time.monotonic() - started,
    }


def corpora_of(config: Config) -> list[Corpus]:
    """The configured corpora as data_shards knows them."""
    return [
        Corpus(
            name=corpus.name,
            path=corpus.path or corpus.hub or "",
            format="hub" if corpus.hub else corpus.format,
            documents=corpus.documents,
            text_column=corpus.text_column,
            hub_config=corpus.hub_config,
            hub_split=corpus.hub_split,
            hub_revision=corpus.hub_revision,
        )
        for corpus in config.data.corpora
    ]


def num_workers(config: Config) -> int:
    """``data.num_workers`` resolved."""
    workers = config.data.num_workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else workers


def _is_unchanged(config: Config, corpus: Corpus, digest: str) -> bool:
    """Whether a corpus still has its digest; reads again only files that changed by size, time or inode."""
    return corpus_digest(corpus, config.run.dir / "digests", num_threads=num_workers(config)) == digest


def _layout(config: Config) -> Layout:
    if config.data.layout == "packed":
        return Layout()
    return Layout("paper", config.data.sequence_length, config.run.seed)


def _obtain_tokenizer(config: Config, record: StageRecord) -> Tokenizer:
    """The tokenizer of these inputs, made unless it exists.

    Of several processes each trains it, and the first to finish has made it for all: to wait for one of them
    would be to wait for ever if that one never gets its turn.
    """
    given, held_out = config.tokenizer.path, config.data.held_out_fraction
    settings = TokenizerSettings(
        kind=config.tokenizer.kind,
        vocab_size=config.tokenizer.vocab_size,
        lowercase=config.tokenizer.lowercase,
        character_coverage=config.tokenizer.character_coverage,
        sample_bytes=config.tokenizer.sample_bytes,
        sample_seed=config.tokenizer.sample_seed,
    )
    digests = record.inputs["text"]
    listed = [(corpus, about.weight, digests[corpus.name])
              for corpus, about in zip(corpora_of(config), config.data.corpora, strict=True)]  # fmt: skip
    # By content: the result must not depend on the order in the file. In earlier versions it did.
    texts = sorted(listed, key=lambda text: (text[2], text[0].name))
    if given:
        inputs = [given_tokenizer_inputs(record.inputs["tokenizer_file"], given.suffix, config.tokenizer.lowercase)]
    else:
        inputs = [tokenizer_inputs(settings, order, held_out) for order in (listed, texts)]
    folders = [config.run.dir / "tokenizers" / content_key(each) for each in inputs]
    for folder in folders:
        if folder.is_dir():
            return Tokenizer(folder)
    folder = folders[-1]
    if given:
        install(folder, given, config.tokenizer.lowercase)
    else:
        logger.info("tokenizer: training %s with %s ids", settings.kind, f"{settings.vocab_size:,}")
        corpora, weights = [corpus for corpus, _, _ in texts], [weight for _, weight, _ in texts]
        with WorkerPool(1) as pool:  # a stop need not wait for it
            pool.wait([pool.submit(make_trained, folder, settings, corpora, weights, held_out)])
    return Tokenizer(folder)


def _check_parents_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """A fork goes on with its parent's ids; without this, that would be found out when all text is tokenized."""
    if not config.run.fork_from or checkpoints.list_steps(stage_folder(config, "pretrain") / "checkpoints"):
        return
    parent = config.run.dir / "runs" / config.run.fork_from.partition("@")[0]
    trained, made = (read_record_file(parent / stage / "stage.json") for stage in ("pretrain", "tokenize"))
    if trained is None or trained.inputs["tokenizer"] == tokenizer.digest:
        return
    remedy = " to that one"
    if made and made.output.get("tokenizer_sha256") == trained.inputs["tokenizer"]:
        folder = Path(locate_tokenized(config, made.output)["tokenizer"])
        remedy = f"={folder / (MODEL_NAME if (folder / MODEL_NAME).exists() else LIBRARY_NAME)}"
    raise ConfigError(
        f"run.fork_from={config.run.fork_from}: that run has another tokenizer than {tokenizer.folder}, so its ids "
        f"mean other words; set tokenizer.path{remedy}"
    )


def _check_shards_dir_tokenizer(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """In a folder of shards that the user names, shards of this corpus by another tokenizer are no accident."""
    if config.data.shards_dir is None:
        return
    for path in sorted(config.data.shards_dir.glob(f"{corpus.name}-*/{MANIFEST}")):
        if read_manifest(path.parent).tokenizer_sha256 != tokenizer.digest:
            raise ConfigError(
                f"data.shards_dir={config.data.shards_dir}: {path.parent.name} was written with another tokenizer "
                f"than {tokenizer.folder}; set tokenizer.path to that one, or choose another data.shards_dir"
            )


def _warn_of_huge_files(config: Config, corpus: Corpus, share: Share) -> None:
    tasks = plan_tasks(corpus, config.data.task_bytes)
    warning = huge_files_warning(corpus, tasks, num_workers(config) * share.num_parts)
    if warning:
        logger.warning("%s", warning)


def _report_counts(manifest: Manifest) -> None:
    """Says what reading met with, besides documents."""
    counts = manifest.counts
    if counts["encoding_errors"]:
        logger.warning(
            "%s: %s of %s documents held bytes that are not UTF-8, now U+FFFD; tasks/*.json in the shard folder name "
            "the first ones", manifest.corpus, f"{counts['encoding_errors']:,}", f"{counts['documents']:,}",
        )  # fmt: skip
    if counts["cut"]:
        logger.warning(
            "%s: %s documents were longer than 4 MiB and were cut; is data.corpora's `documents` right?",
            manifest.corpus, f"{counts['cut']:,}",
        )  # fmt: skip
    if counts["empty"]:
        logger.info("%s: %s empty documents were passed over", manifest.corpus, f"{counts['empty']:,}")


class _ProgressLine:
    """Logs one line for all processes that fill a folder: tasks, MB/s, tokens/s, time left; and once, much damage."""

    def __init__(self, corpus: str):
        self._corpus, self._warned = corpus, False

    def __call__(self, progress: Progress) -> None:
        elapsed = max(progress.elapsed_s, 1e-3)
        left = "? left"
        if progress.tasks_done == progress.tasks:
            left = "done"
        elif progress.input_bytes:
            left = f"{_duration(progress.input_bytes_left * elapsed / progress.input_bytes)} left"
        logger.info(
            "%s: %d of %d tasks, %.1f MB/s, %s tokens/s, %s",
            self._corpus, progress.tasks_done, progress.tasks, progress.text_bytes / 1e6 / elapsed,
            f"{progress.tokens / elapsed:,.0f}", left,
        )  # fmt: skip
        if progress.damage and not self._warned and progress.tasks_done < progress.tasks:
            self._warned = True
            logger.warning("%s: %s; an error unless the rest makes up for it", self._corpus, progress.damage)


def _duration(seconds: float) -> str:
    for unit, unit_s in (("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.0f} s"


def load_tokenize_output(config: Config) -> dict[str, Any]:
    """What tokenize made for this run: tokenizer, vocabulary size, shard folders.

    Raises:
        ConfigError: Tokenize has not finished, or its tokenizer is not the one of the shards.
    """
    record = read_record(config, "tokenize")
    if record is None or record.state != "done":
        raise ConfigError(
            f"{stage_folder(config, 'tokenize')}: no finished tokenize stage for run {config.run.name!r}; "
            "run `electra tokenize` with this config first"
        )
    changed = [
        key for key, value in science_of(config, "tokenize").items() if record.inputs["science"].get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"run {config.run.name!r} was tokenized with another {', '.join(changed)}; run `electra tokenize` "
            "with this config, under a new run.name if there are checkpoints"
        )
    tokenizer = Tokenizer(record.output["tokenizer"])
    for corpus in record.output["corpora"]:
        if read_manifest(Path(corpus["folder"])).tokenizer_sha256 != tokenizer.digest:
            raise ConfigError(
                f"{corpus['folder']}: these shards were written with another tokenizer than {tokenizer.folder}; "
                "restore that file, or run tokenize again"
            )
    return record.output
