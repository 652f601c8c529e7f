"""What most tests share: a small made-up corpus, a config for it, and the real command line."""

import json
import os
import random
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forking import Forked, ForkedProgram

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, whichever test imports it first
torch.set_num_threads(1)  # the workers share the cores: of several threads each spins while it waits for the others

_LIMIT_S = 300.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need Slurm go first: they are the longest that one worker has."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Among several workers a file is one's, and so are all tests that need Slurm, which share a cluster."""
    from xdist.scheduler import LoadFileScheduling

    class OfOneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return OfOneCluster(config, log)


REPOSITORY = Path(__file__).resolve().parents[1]

TINY = """
run: {{name: tiny, dir: {run_dir}}}
launch: {{device: cpu, threads_per_process: 1}}
data:
  corpora: [{{name: made_up, path: {corpus}}}]
  sequence_length: 32
  held_out_fraction: 0.05
  num_workers: 1
tokenizer: {{vocab_size: 300}}
model: {{size: tiny, hidden_layers: 2, hidden_size: 32, attention_heads: 2, feed_forward_size: 64, embedding_size: 24}}
train:
  steps: 20
  global_batch_size: 8
  micro_batch_size: 2
  precision: fp32
  checkpoint_every: 5
  log_every: 1
  held_out_rows: 16
optimizer: {{lr: 5e-4, warmup_steps: 5}}
evaluate: {{seeds: 2, epochs: 1, batch_size: 16, max_length: 32}}
tracking: {{uri: none}}
"""


def make_text(documents: int, seed: int = 7) -> str:
    """Documents of invented words with Zipf's frequencies, blank lines between them."""
    draw = random.Random(seed)
    syllables = [onset + vowel for onset in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(800)]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def sentence() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(5, 15))) + "."

    return "\n\n".join("\n".join(sentence() for _ in range(draw.randint(2, 8))) for _ in range(documents)) + "\n"


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 kB of text."""
    path = tmp_path_factory.mktemp("corpus") / "made_up.txt"
    path.write_text(make_text(300), encoding="utf-8")
    return path


@pytest.fixture
def config_path(tmp_path: Path, corpus_path: Path) -> Path:
    """A config whose run.dir is the test's own."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(run_dir=tmp_path / "out", corpus=corpus_path), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path) -> Path:
    """A config whose tokenize stage is done once for the tests of a file, which choose run names of their own."""
    folder = tmp_path_factory.mktemp("shared")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(run_dir=folder / "out", corpus=corpus_path), encoding="utf-8")
    return path


def command(*arguments: object, forks: bool = False) -> list[str]:
    """The command line; with ``forks`` it imports everything first, and forks its ranks."""
    return [sys.executable, "-m", "tests.forking" if forks else "pipeline", *map(str, arguments)]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what Slurm, torchrun or MLflow may have left in it."""
    dropped = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MLFLOW_", "ELECTRA_LAUNCHED", "TRITON_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | more


Electra = Callable[..., subprocess.CompletedProcess[str]]

_READ_WHEN_USED = ("ELECTRA_", "RANK", "WORLD_SIZE", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
"""Variables that no import reads: to a fork they may be given."""


@pytest.fixture(scope="session")
def forked_program() -> Iterator[ForkedProgram]:
    program = ForkedProgram()
    yield program
    program.close()


@pytest.fixture(scope="session")
def electra(forked_program: ForkedProgram, tmp_path_factory: pytest.TempPathFactory) -> Electra:
    """Runs the real command line; ``code`` is the exit code that is expected.

    It is a fork of a process that has imported everything, and executes the lines ``first`` before it begins; with
    variables given that an import may read, it is a start anew.
    """
    outputs = tmp_path_factory.mktemp("said")

    def run(*arguments: object, code: int = 0, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        given, own = command(*arguments), clean_environment(**environment)
        if all(name.startswith(_READ_WHEN_USED) for name in environment):
            said = forked_program.run(given[3:], own, outputs / uuid.uuid4().hex, _LIMIT_S, first)
            done = subprocess.CompletedProcess(given, *said)
        else:
            assert not first
            done = subprocess.run(given, env=own, capture_output=True, text=True, timeout=_LIMIT_S)
        assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        if code:
            assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def start_electra(forked_program: ForkedProgram, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Forked]:
    """Starts it beside the test, always as a fork, in a session of its own."""
    outputs = tmp_path_factory.mktemp("said")

    def start(*arguments: object, **environment: str) -> Forked:
        given, own = command(*arguments)[3:], clean_environment(**environment)
        return forked_program.start(given, own, outputs / uuid.uuid4().hex)

    return start


def free_port() -> int:
    """A TCP port that is free now on this host, and below those of which the system gives one to whoever asks.

    Workers of one session of pytest have each their own: seconds may pass before the port is taken.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    while True:
        port = random.SystemRandom().randrange(4096 + 1476 * worker, 4096 + 1476 * (worker + 1))
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def read_journal(run_dir: Path, name: str) -> list[dict]:
    path = run_dir / "runs" / name / "pretrain" / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a two-class task that the first word decides; returns the task file."""

    def write(name: str = "first_word", kind: str = "classification") -> Path:
        draw = random.Random(3)
        for split, count in (("train", 48), ("dev", 16)):
            rows = []
            for number in range(count):
                label = draw.choice("ab")
                text = {"a": "bada", "b": "zozo"}[label] + " " + " ".join(draw.choices(["fi", "ku", "mere"], k=4))
                row = {"id": f"{split}-{number}", "text": text, "label": label}
                rows.append(row | ({"other": "lala"} if kind == "pair" else {}))
            (tmp_path / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = "[text, other]" if kind == "pair" else "[text]"
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\nkind: {kind}\ntrain: {name}_train.jsonl\ndev: {name}_dev.jsonl\ntext: {fields}\n"
            "metrics: [accuracy, f1]\n"
        )
        return path

    return write
