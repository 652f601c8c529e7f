"""Fixtures: a two-node Slurm, a checkout whose program is a stub, and a tiny project for the real program."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # whatever import mode pytest runs in
from slurm_cluster import ONE_RANK, Cluster, missing_programs

from tests.conftest import Electra

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/large.yaml"

# What makes a run of the large preset take seconds on a CPU.
SHRINK = [
    "model.size=tiny",
    "model.hidden_layers=2",
    "model.hidden_size=64",
    "model.attention_heads=2",
    "model.feed_forward_size=128",
    "model.embedding_size=64",
    "model.generator_width=0.5",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.checkpoint_every=3",
    "train.log_every=1",
    "train.precision=fp32",
    "optimizer.warmup_steps=2",
    "launch.device=cpu",
    "launch.threads_per_process=1",
    "tracking.uri=none",
]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2, with 4 CPUs and 8 pretended GPUs each."""
    with _start_cluster() as running:
        yield running


@pytest.fixture
def cluster_without_gpus() -> Iterator[Cluster]:
    """The same without GPUs."""
    with _start_cluster(has_gpus=False) as running:
        yield running


@contextmanager
def _start_cluster(has_gpus: bool = True) -> Iterator[Cluster]:
    if missing := missing_programs():
        reason = f"not installed: {', '.join(missing)} (Debian: apt install slurm-wlm munge)"
        pytest.fail(reason) if os.environ.get("ELECTRA_REQUIRE_ALL") == "1" else pytest.skip(reason)
    with Cluster(has_gpus=has_gpus) as running:
        # Python stays the one of the tests, whatever the developer's own slurm/site.env says.
        running.env |= {"ELECTRA_PYTHON": sys.executable, "ELECTRA_SITE_ENV": "/dev/null", "ELECTRA_QUICK_CHECK": "0"}
        yield running


@pytest.fixture(scope="session")
def stub_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, under a path with a space, whose pipeline package is the stub."""
    root = tmp_path_factory.mktemp("checkouts") / "a b"
    copy_scripts(root)
    (root / "pipeline").mkdir()
    (root / "configs").mkdir()
    (root / "pipeline" / "goodput.py").write_text("raise SystemExit(9)\n")  # whose failure changes nothing
    (root / "pipeline" / "__init__.py").touch()  # without it an installed `pipeline` would win
    shutil.copy(Path(__file__).parent / "stub_pipeline.py", root / "pipeline" / "__main__.py")
    for size in ("small", "base", "large"):
        (root / "configs" / f"{size}.yaml").touch()
    return root


@pytest.fixture(scope="session")
def limited_job(cluster: Cluster, stub_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A job whose time limit is near. Ask for it early: Slurm looks every half a minute, and signals up to that much
    earlier than the 300 s before the limit that the header asks for; of five minutes, that may be before any trap."""
    folder, flags = tmp_path_factory.mktemp("limited"), [*ONE_RANK, "--time=6"]
    return cluster.submit(stub_checkout / "slurm/pretrain_small.sh", "stub.hold=true", flags=flags, cwd=folder)


@pytest.fixture(scope="session")
def hanging_job(cluster: Cluster, stub_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A job of one minute that Slurm does not warn and that hears nothing. Ask for it a minute and a half before."""
    folder, flags = tmp_path_factory.mktemp("hanging"), [*ONE_RANK, "--time=1", "--signal=B:URG@1"]
    return cluster.submit(stub_checkout / "slurm/pretrain_small.sh", "stub.hang=true", flags=flags, cwd=folder)


@pytest.fixture(scope="session")
def real_checkout_with_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository under a path with a space, without git: scripts copied, packages linked."""
    root = tmp_path_factory.mktemp("checkouts") / "a b"
    copy_scripts(root)
    for name in ("pipeline", "model", "data_shards", "configs", "pyproject.toml"):
        (root / name).symlink_to(REPOSITORY / name)
    return root


def copy_scripts(root: Path) -> None:
    shutil.copytree(REPOSITORY / "slurm", root / "slurm", ignore=shutil.ignore_patterns("site.env"))


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory, electra: Electra) -> list[str]:
    """Tokenizes a tiny corpus with the large preset; the overrides for its run, "tiny", with a tiny model."""
    folder = tmp_path_factory.mktemp("tiny project")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(make_documents(size_bytes=300_000, seed=7)) + "\n")
    overrides = [
        f"run.dir={folder / 'runs'}",
        "run.name=tiny",
        f"data.corpora={json.dumps([{'name': 'tiny', 'path': str(corpus)}])}",
        "tokenizer.vocab_size=512",
        "data.sequence_length=64",
        "data.num_workers=1",
        *SHRINK,
    ]
    electra("tokenize", REPOSITORY / CONFIG, *overrides)
    return overrides


@pytest.fixture(scope="session")
def run_folder(tiny_project: list[str]) -> Callable[[str], Path]:
    """The folder of a run by its name."""
    root = Path(tiny_project[0].removeprefix("run.dir="))
    return lambda name: root / "runs" / name


@pytest.fixture(scope="session")
def evaluate_overrides() -> list[str]:
    """The smallest evaluation: one task, one seed, one epoch."""
    return ["evaluate.seeds=1", "evaluate.epochs=1", 'evaluate.tasks=["authorship"]']


def make_documents(size_bytes: int, seed: int) -> list[str]:
    """English-like documents: words of two to four syllables, drawn with Zipf's frequencies."""
    draw = random.Random(seed)
    syllables = [onset + vowel for onset in "bcdfghlmnprstvw" for vowel in "aeiou"]
    words = sorted({"".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)})
    draw.shuffle(words)
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence() -> str:
        text = " ".join(draw.choices(words, frequencies, k=draw.randint(4, 18)))
        return text.capitalize() + draw.choice(".....?!")

    documents, written = [], 0
    while written < size_bytes:
        documents.append("\n".join(sentence() for _ in range(draw.randint(2, 14))))
        written += len(documents[-1])
    return documents
