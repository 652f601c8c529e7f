"""Fine-tuning against transformers' Trainer: the same weights, token ids and hyperparameters, on one core.

    python tests/benchmarks/finetune.py CHECKPOINT_FOLDER [--tasks cola,mrpc --data DIR] [--seeds 5]
    python tests/benchmarks/finetune.py --size small --throughput-steps 12 [--vocab vocab.txt]

The folder is one that ``electra export`` writes; ``--size`` makes one with random weights. First steps are timed,
both sides on the same batches; then, unless ``--throughput-steps`` is given, whole runs of each seed, dev scores
included. CPU time of one thread, contenders in turn, medians of paired ratios; real tokens are those without padding.
Prints tables and, last, ``ratio NAME VALUE target T`` and ``scores NAME agree``; exits 1 when a ratio is below its
target, medians of the scores are outside each other's spread, or the peer is not installed.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import torch
from processes import REPOSITORY
from timing import paired_ratio, spread

sys.path.insert(0, str(REPOSITORY))  # it need not be installed

from model.finetuning import FineTunedElectra, LinearHead
from model.kernels.select import select_kernels
from pipeline.config import Config
from pipeline.evaluation.features import Feature, collate
from pipeline.evaluation.finetune import FineTuning, layer_learning_rates, predict
from pipeline.evaluation.partial import PartialState
from pipeline.evaluation.pretrained import Pretrained, find_pretrained
from pipeline.evaluation.recipes import Recipe, recipes_for
from pipeline.evaluation.tasks import Task, load_tasks
from pipeline.evaluation.text import TextProcessor

TARGET, TASKS, WARM_UP, STEPS, SEED = 1.5, "authorship,continuation", 2, 12, 1
OURS, PEER, PADDED = "ours", "Trainer", "Trainer, padded to max_length"


class StepByStep(FineTuning):
    """Our fine-tuning, one step at a time."""

    def next_batch(self) -> list[Feature]:
        """What the next step trains on."""
        return self._batch()

    def one_step(self) -> None:
        """One update."""
        self._train_step()


@dataclass
class Bench:
    """One task as both sides see it; ``rows`` are the peer's, by number of the example."""

    task: Task
    recipe: Recipe
    pretrained: Pretrained
    processor: TextProcessor
    tokenizer: Any
    train: list[Any]
    dev: list[Any]
    rows: dict[str, list[dict[str, Any]]]
    folder: Path
    sampling: str
    tokenize_s: dict[str, float] = field(default_factory=dict)
    attention: str = "sdpa"

    @property
    def tokens(self) -> int:
        """Real tokens of a whole run."""
        return sum(map(len, self.train)) * self.recipe.epochs

    def model(self, seed: int) -> FineTunedElectra:
        """Ours, as ``pipeline.evaluation.runner`` makes it."""
        torch.manual_seed(seed)
        dropout = {"dropout": self.recipe.dropout, "attention_dropout": self.recipe.dropout}
        config = self.pretrained.model.model_copy(update=dropout)
        head = self.processor.head(config)
        model = FineTunedElectra(config, self.pretrained.vocab_size, select_kernels("auto"), head)
        self.pretrained.load_into(model)
        return model

    def ours(self, seed: int) -> StepByStep:
        """A run that has not begun."""
        return StepByStep(self.model(seed), self.processor, self.train, self.recipe, seed, "cpu")

    def peer_model(self, seed: int, attention: str) -> Any:
        """The peer's, its head with our weights of that seed."""
        from finetune_peer import PeerModel

        head = self.model(seed).head
        assert isinstance(head, LinearHead)
        return PeerModel(self.pretrained.folder, self.recipe, head.output, attention)

    def peer(self, seed: int, attention: str, pads_to: int | None = None, model: Any = None) -> Any:
        """A run of the peer that has not begun."""
        from finetune_peer import PeerTraining

        rows = [self.rows["train"][feature.example] for feature in self.train]
        model = model or self.peer_model(seed, attention)
        return PeerTraining(model, self.tokenizer, rows, self.recipe, seed, self.folder, pads_to, self.sampling)


@dataclass
class Run:
    """One side's run of one seed."""

    seconds: float
    score: float


def main() -> int:
    """Builds, measures, prints; 1 when a target is missed."""
    options = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            import accelerate  # noqa: F401
            import finetune_peer  # noqa: F401
        except ImportError as error:
            print(f"a peer is not installed: {error}", file=sys.stderr)
            return 1
        _print_head()
        benches = _prepare(options, Path(temporary))
        verdicts = []
        for bench in benches:
            _check_same(bench)
            verdicts += _time_steps(bench, options.throughput_steps or STEPS, options.throughput_steps is not None)
        if options.throughput_steps is None:
            for bench in benches:
                verdicts += _time_runs(bench, options.seeds)
    print()
    for line, _ in verdicts:
        print(line)
    return int(not all(holds for _, holds in verdicts))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT_FOLDER")
    parser.add_argument("--size", help="instead of a folder: random weights of this size, as model.size")
    parser.add_argument("--vocab", type=Path, help="vocab.txt for --size; else one is made of the tasks' words")
    parser.add_argument("--tasks", default=TASKS, help="classification, pairs or regression, by comma")
    parser.add_argument("--data", type=Path, help="as evaluate.data_dir; the default tasks need none")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-examples", type=int, help="use so many, drawn at random")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--sampling", default="random", help="the Trainer's train_sampling_strategy in whole runs")
    parser.add_argument("--throughput-steps", type=int, help="time so many steps and no whole run")
    options = parser.parse_args()
    if (options.checkpoint is None) == (options.size is None):
        parser.error("give CHECKPOINT_FOLDER, or --size")
    return options


def _print_head() -> None:
    from report import describe_machine, describe_versions

    from pipeline.environment import git_commit

    machine, versions = describe_machine("cpu"), describe_versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch_build", "transformers"))
    print(f"    python tests/benchmarks/finetune.py {shlex.join(sys.argv[1:])}\n")
    print(f"{machine['processor']}, {machine['torch_threads']} thread, fp32; {packages}; commit {git_commit()}")


def _prepare(options: argparse.Namespace, temporary: Path) -> list[Bench]:
    """The tasks, with everything that takes no part in training read and tokenized."""
    from finetune_peer import load_tokenizer, random_folder

    tasks = load_tasks(_config(options, temporary, temporary))
    checkpoint = options.checkpoint
    if checkpoint is None:
        texts = (text for task in tasks for example in task.examples("train") for text in example.texts)
        checkpoint = random_folder(temporary / "random", options.size, options.vocab, texts)
    elif (checkpoint / "discriminator" / "config.json").is_file():
        checkpoint = checkpoint / "discriminator"
    config = _config(options, temporary, checkpoint.resolve())
    pretrained = find_pretrained(config, installs=False)
    model = pretrained.model
    print(
        f"{model.hidden_layers} layers of {model.hidden_size}, {pretrained.vocab_size:,} ids, {model.max_positions} "
        f"positions{', random weights' if options.size else ''}"
    )
    tokenizer = load_tokenizer(checkpoint)
    benches = []
    for task in tasks:
        if task.kind not in ("classification", "pair", "regression"):
            sys.exit(f"{task.name}: tasks of kind {task.kind} have no peer here")
        (recipe,) = recipes_for(config.evaluate, task.config, model).values()
        benches.append(_tokenize(task, recipe, pretrained, tokenizer, options, temporary))
    return benches


def _config(options: argparse.Namespace, run_dir: Path, checkpoint: Path) -> Config:
    given = {"epochs": options.epochs, "lr": options.lr, "max_length": options.max_length}
    evaluate = {key: value for key, value in given.items() if value is not None} | {
        "tasks": options.tasks.split(","),
        "data_dir": options.data,
        "checkpoint": checkpoint,
        "both_orders": False,
        "batch_loss": "mean",  # what the Trainer clips the gradient of
    }
    required: dict[str, Any] = {
        "data": {"corpora": [{"name": "none", "path": "none"}], "sequence_length": 128},
        "tokenizer": {"vocab_size": 30522}, "model": {"size": "tiny"}, "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
    }  # fmt: skip
    return Config.model_validate(required | {"run": {"name": "benchmark", "dir": run_dir}, "evaluate": evaluate})


def _tokenize(
    task: Task, recipe: Recipe, pretrained: Pretrained, tokenizer: Any, options: argparse.Namespace, folder: Path
) -> Bench:
    from finetune_peer import give_our_ids, tokenize

    processor = TextProcessor(task, recipe, pretrained.tokenizer)
    features: dict[str, list[Any]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    for split in ("dev", "train"):
        texts = [example.texts for example in task.examples(split)]
        begin = time.process_time()
        features[split] = processor.features(split)
        middle = time.process_time()
        rows[split] = tokenize(tokenizer, texts, recipe.max_length)
        seconds = {OURS: middle - begin, PEER: time.process_time() - middle}
        cut = give_our_ids(task.name, features[split], rows[split])
        if cut:
            print(
                f"{task.name}, {split}: {cut} of {len(rows[split]):,} pairs were cut one token apart; the peer has ours"
            )
    train = features["train"]
    if options.train_examples and options.train_examples < len(train):
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))[: options.train_examples]
        seconds = {name: value * len(chosen) / len(train) for name, value in seconds.items()}
        train = [train[number] for number in sorted(chosen.tolist())]
    return Bench(
        task, recipe, pretrained, processor, tokenizer, train, features["dev"], rows, folder, options.sampling, seconds
    )


def _check_same(bench: Bench) -> None:
    """Both sides are one function before training, and their weights have the same rates."""
    from finetune_peer import learning_rates, peer_rates
    from finetune_peer import predict as peer_predict

    ours, peer = bench.model(SEED).eval(), bench.peer_model(SEED, "sdpa")
    features = bench.dev[:32]
    examples = collate(features, "cpu")
    with torch.no_grad():
        logits = ours.head(ours.encode_first(examples))
    theirs = peer_predict(peer, bench.peer(SEED, "sdpa", model=peer).collate, bench.rows["dev"][: len(features)])
    error = float((logits - theirs).abs().max() / logits.abs().max())
    if not error < 1e-3:
        sys.exit(f"{bench.task.name}: logits before training differ by {error:.1e}")
    if learning_rates(layer_learning_rates(ours, bench.recipe)) != peer_rates(peer, bench.recipe):
        sys.exit(f"{bench.task.name}: the two sides' learning rates differ")


def _time_steps(bench: Bench, steps: int, is_all: bool) -> list[tuple[str, bool]]:
    """Steps on identical batches; sets the faster attention of the peer."""
    ours = bench.ours(SEED)
    peers = {f"{PEER}, {attention}": bench.peer(SEED, attention) for attention in ("sdpa", "eager")}
    peers[PADDED] = bench.peer(SEED, "sdpa", bench.recipe.max_length)
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *peers)}
    slots: dict[str, int] = dict.fromkeys(seconds, 0)
    tokens = 0
    for number in range(WARM_UP + steps):
        batch = ours.next_batch()
        rows = [bench.rows["train"][feature.example] for feature in batch]
        taken = {}
        for name in list(seconds)[:: 1 if number % 2 == 0 else -1]:
            begin = time.process_time()
            if name == OURS:
                ours.one_step()
            else:
                peers[name].step(rows)
            taken[name] = time.process_time() - begin
        if number < WARM_UP:
            continue
        tokens += sum(lengths := [len(feature) for feature in batch])
        for name, value in taken.items():
            seconds[name].append(value)
            longest = bench.recipe.max_length if name == PADDED else max(lengths)
            slots[name] += sum(lengths) if name == OURS else longest * len(lengths)
    _print_steps(bench, seconds, slots, tokens)
    best = min((name for name in peers if name != PADDED), key=lambda name: sum(seconds[name]))
    bench.attention = best.rpartition(" ")[2]
    print(f"\nThe Trainer's faster attention here: {bench.attention}.")
    ratio = paired_ratio(seconds[best], seconds[OURS])["median"]
    padded = paired_ratio(seconds[PADDED], seconds[OURS])["median"]
    return [
        _verdict(f"{bench.task.name}/steps", ratio, TARGET if is_all else None),
        _verdict(f"{bench.task.name}/steps_padded_to_max_length", padded, None),
    ]


def _print_steps(bench: Bench, seconds: dict[str, list[float]], slots: dict[str, int], tokens: int) -> None:
    batch = bench.recipe.batch_size
    print(f"\n| {bench.task.name}: steps of {batch} examples | ms a step, median | real tokens/CPU s | padding |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        milliseconds = 1e3 * statistics.median(values)
        print(f"| {name} | {milliseconds:.1f} | {tokens / sum(values):,.0f} | {1 - tokens / slots[name]:.0%} |")


def _verdict(name: str, ratio: float, target: float | None) -> tuple[str, bool]:
    return f"ratio {name} {ratio:.2f} target {target or 'none'}", target is None or ratio >= target


def _time_runs(bench: Bench, seeds: int) -> list[tuple[str, bool]]:
    """Whole runs, our side and the peer's in turn."""
    runs: dict[str, list[Run]] = {OURS: [], PEER: []}
    sides = {OURS: _run_ours, PEER: _run_peer}
    for seed in range(1, seeds + 1):
        for name in list(sides)[:: 1 if seed % 2 else -1]:
            runs[name].append(sides[name](bench, seed))
        told = ", ".join(f"{name} {runs[name][-1].seconds:.1f} s {runs[name][-1].score:.4f}" for name in runs)
        print(f"{bench.task.name}, seed {seed}: {told}", file=sys.stderr)
    _print_runs(bench, runs)
    ratios = {
        "runs": paired_ratio([run.seconds for run in runs[PEER]], [run.seconds for run in runs[OURS]]),
        "runs_and_tokenization": paired_ratio(
            [run.seconds + bench.tokenize_s[PEER] for run in runs[PEER]],
            [run.seconds + bench.tokenize_s[OURS] for run in runs[OURS]],
        ),
    }
    ours, peers = ([run.score for run in runs[name]] for name in (OURS, PEER))
    agree = is_within(statistics.median(ours), peers) and is_within(statistics.median(peers), ours)
    verdict = "disagree" if not agree else "agree" if len(set(peers)) > 1 else "agree, all seeds alike: says nothing"
    return [
        _verdict(f"{bench.task.name}/runs", ratios["runs"]["median"], TARGET),
        _verdict(f"{bench.task.name}/runs_and_tokenization", ratios["runs_and_tokenization"]["median"], None),
        (f"scores {bench.task.name} {verdict}", agree),
    ]


def is_within(value: float, others: Sequence[float]) -> bool:
    """Whether it lies in their spread."""
    return min(others) <= value <= max(others)


def _run_ours(bench: Bench, seed: int) -> Run:
    model = bench.model(seed)
    training = FineTuning(model, bench.processor, bench.train, bench.recipe, seed, "cpu")
    partial = PartialState(bench.folder / "none.safetensors", "")
    begin = time.process_time()
    training.run(partial, lambda: None)
    seconds = time.process_time() - begin
    return Run(seconds, _score(bench, predict(model, bench.processor, bench.dev, bench.recipe, "cpu")))


def _run_peer(bench: Bench, seed: int) -> Run:
    from finetune_peer import predict as peer_predict

    model = bench.peer_model(seed, bench.attention)
    training = bench.peer(seed, bench.attention, model=model)
    seconds = training.run()
    logits = peer_predict(model, training.collate, bench.rows["dev"])
    head, no_examples = (lambda *_: logits), argparse.Namespace(first_P=None)  # its head has spoken already
    return Run(seconds, _score(bench, bench.processor.outputs(head, logits, no_examples, bench.dev)))  # type: ignore


def _score(bench: Bench, outputs: list[Any]) -> float:
    return bench.processor.outcome("dev", bench.dev, outputs).metrics[bench.task.config.metrics[0]]


def _print_runs(bench: Bench, runs: dict[str, list[Run]]) -> None:
    recipe, metric = bench.recipe, bench.task.config.metrics[0]
    print(
        f"\n| {bench.task.name}: {len(bench.train):,} examples, {recipe.epochs} epochs, {bench.tokens:,} real tokens, "
        f"lr {recipe.lr:g}, {len(runs[OURS])} seeds | training, CPU s | real tokens/CPU s, median (spread) "
        f"| tokenization, CPU s | dev {metric}, median (spread) |\n|---|---|---|---|---|"
    )
    for name, of_side in runs.items():
        speeds = spread([bench.tokens / run.seconds for run in of_side])
        scores = spread([run.score for run in of_side])
        label = name if name == OURS else f"{name}, {bench.attention}"
        print(
            f"| {label} | {statistics.median(run.seconds for run in of_side):.2f} "
            f"| {speeds['median']:,.0f} ({speeds['min']:,.0f} to {speeds['max']:,.0f}) "
            f"| {bench.tokenize_s[name]:.2f} "
            f"| {scores['median']:.4f} ({scores['min']:.4f} to {scores['max']:.4f}) |"
        )


if __name__ == "__main__":
    sys.exit(main())
