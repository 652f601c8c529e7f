"""The tokenize stage: text to a tokenizer and shards, stored by content.

    files ──digest──▶ key ──▶ tokenizers/<key>/ ──▶ shards/<corpus>-<key>/ for each corpus

What exists under its key is used as it is: another run's tokenizer and shards
serve this one if their inputs are equal.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from data_shards.build import (
    FolderJob,
    TaskResult,
    build_folder,
    content_key,
    shard_inputs,
    tokenizer_inputs,
    train_tokenizer,
)
from data_shards.corpus import Corpus, corpus_files, digest_file, digest_files
from data_shards.store import MANIFEST, Manifest, read_manifest, write_json
from data_shards.tokenizer import MODEL_NAME, Tokenizer, TokenizerSettings
from pipeline.config import Config
from pipeline.distributed import STOP_SIGNALS, ignore_stop_signals
from pipeline.errors import ConfigError, StoppedEarly
from pipeline.keys import science_of
from pipeline.log import logger
from pipeline.stages import StageRecord, read_record, stage_folder

_PROGRESS_INTERVAL_S = 10.0


def tokenize_inputs(config: Config, keep_digests: bool = True) -> dict[str, Any]:
    """What the stage's result depends on; reads every file whose digest was not kept before."""
    cache = _DigestCache(config.run.dir / "digests.json")
    files = {corpus.name: cache.digests(corpus) for corpus in corpora_of(config)}
    if keep_digests:
        cache.save()
    inputs: dict[str, Any] = {"science": science_of(config, "tokenize"), "files": files}
    if config.tokenizer.path:
        inputs["tokenizer_file"] = Tokenizer(config.tokenizer.path).digest
    return inputs


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


def run_tokenize(config: Config, record: StageRecord) -> None:
    """Trains the tokenizer and writes the shards that are missing; fills ``record``'s output and metrics."""
    started = time.monotonic()
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    corpora = corpora_of(config)
    weights = [corpus.weight for corpus in config.data.corpora]
    files: dict[str, list[str]] = record.inputs["files"]
    digests = [files[corpus.name] for corpus in corpora]
    held_out = config.data.held_out_fraction

    tokenizer_path = config.tokenizer.path or _obtain_tokenizer(config, corpora, weights, digests)
    tokenizer = Tokenizer(tokenizer_path)
    logger.info("tokenizer: %s, %s ids", tokenizer_path, f"{tokenizer.vocab_size:,}")

    manifests: list[tuple[Path, Manifest]] = []
    for corpus, corpus_digests in zip(corpora, digests, strict=True):
        inputs = shard_inputs(corpus, corpus_digests, tokenizer.digest, held_out, config.data.task_bytes)
        key = content_key(inputs)
        folder = config.shards_dir / f"{corpus.name}-{key}"
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            logger.info("%s: %s tokens are there already, in %s", corpus.name, f"{manifest.num_tokens():,}", folder)
        else:
            _check_shards_dir_tokenizer(config, corpus, tokenizer)
            job = FolderJob(folder, corpus, key, tokenizer_path, held_out)
            manifest = build_folder(job, inputs, config.data.task_bytes, num_workers(config), _Progress(corpus.name))
            logger.info("%s: %s tokens written to %s", corpus.name, f"{manifest.num_tokens():,}", folder)
        manifests.append((folder, manifest))

    record.output = {
        "tokenizer": str(tokenizer_path),
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
        )
        for corpus in config.data.corpora
    ]


def num_workers(config: Config) -> int:
    """``data.num_workers`` resolved."""
    workers = config.data.num_workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else workers


def _obtain_tokenizer(config: Config, corpora: list[Corpus], weights: list[float], digests: list[list[str]]) -> Path:
    """The tokenizer of these inputs, trained unless it exists."""
    settings = TokenizerSettings(
        kind=config.tokenizer.kind,
        vocab_size=config.tokenizer.vocab_size,
        normalization=config.tokenizer.normalization,
        character_coverage=config.tokenizer.character_coverage,
        sample_bytes=config.tokenizer.sample_bytes,
    )
    held_out = config.data.held_out_fraction
    key = content_key(tokenizer_inputs(settings, corpora, weights, digests, held_out))
    folder = config.run.dir / "tokenizers" / key
    if (folder / MODEL_NAME).exists():
        return folder / MODEL_NAME
    logger.info("tokenizer: training %s with %s ids", settings.kind, f"{settings.vocab_size:,}")
    return train_tokenizer(folder, settings, corpora, weights, held_out)


def _check_shards_dir_tokenizer(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """In a folder of shards that the user names, shards of this corpus by another tokenizer are no accident."""
    if config.data.shards_dir is None:
        return
    for path in sorted(config.data.shards_dir.glob(f"{corpus.name}-*/{MANIFEST}")):
        if read_manifest(path.parent).tokenizer_sha256 != tokenizer.digest:
            raise ConfigError(
                f"data.shards_dir={config.data.shards_dir}: {path.parent.name} was written with another tokenizer "
                f"than {tokenizer.path}; set tokenizer.path to that one, or choose another data.shards_dir"
            )


class _Progress:
    """One log line every ten seconds: tasks, MB/s, tokens/s, what is left."""

    def __init__(self, corpus: str):
        self._corpus, self._begin, self._last = corpus, time.monotonic(), time.monotonic()
        self._text_bytes = self._tokens = self._tasks = 0

    def __call__(self, done: int, total: int, result: TaskResult) -> None:
        self._text_bytes += result.text_bytes
        self._tokens += sum(shard.num_tokens for shard in result.shards)
        self._tasks += 1
        now = time.monotonic()
        if now - self._last < _PROGRESS_INTERVAL_S and done < total:
            return
        self._last, elapsed = now, now - self._begin
        left_s = (total - done) * elapsed / self._tasks
        logger.info(
            "%s: task %d of %d, %.1f MB/s, %s tokens/s, %.0f s left",
            self._corpus, done, total, self._text_bytes / 1e6 / elapsed, f"{self._tokens / elapsed:,.0f}", left_s,
        )  # fmt: skip


class _DigestCache:
    """SHA-256 of files by (path, size, modification time, inode), so that nothing is read twice."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, str] = {}
        self._changed = False
        if path.exists():
            try:
                self._known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                logger.warning("%s: unreadable; the files are read again", path)

    def digests(self, corpus: Corpus) -> list[str]:
        """Digest of each file of a corpus, in their order."""
        if corpus.format == "hub":
            return sorted(digest_files(corpus).values())
        return [self._digest(path) for path in corpus_files(corpus)]

    def _digest(self, path: str) -> str:
        status = os.stat(path)
        key = f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if key not in self._known:
            self._known[key] = digest_file(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """Writes the cache back."""
        if self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)


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
                f"{corpus['folder']}: these shards were written with another tokenizer than {tokenizer.path}; "
                "restore that file, or run tokenize again"
            )
    return record.output
