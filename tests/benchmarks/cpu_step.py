"""The training step of ELECTRA-Small on one CPU core, against a loop written with transformers.

    python tests/benchmarks/cpu_step.py [--text FILES] [--vocab vocab.txt] [--lengths 128,512]

The peer is ``ElectraForMaskedLM`` and ``ElectraForPreTraining`` with embeddings in common, torch's AdamW and gradient
clipping, in fp32; ours is the program's engine in fp32 and in bf16. In `lines` and `blocks` the peer takes the text as
its users do: each line, or what stands between blank lines, is a document, cut into pieces of a row's length, one to a
row, padded to the longest of a batch, with an attention mask; ours packs the same documents into rows without padding.
In `full` the rows of both are full, one piece each, and there is no mask.
Masking is done before the clock starts. What is compared is real tokens, padding not counted, per second of CPU time.

Instead, ``--memory`` compares the peak memory of a step, and ``--overhead`` measures what share of a step of a short
pretraining run is neither forward, backward nor update, in percent; there the target is the most. Prints a table and,
last, ``ratio NAME VALUE target T goal G``; exits 1 when a ratio misses its target.
"""

import argparse
import gc
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import torch
from processes import REPOSITORY, clean_environment
from timing import Timer, interleave, paired_ratio, spread

sys.path.insert(0, str(REPOSITORY))  # it need not be installed

import synthetic
from cpu_step_inputs import SEED, VOCAB_SIZE, Text, draw_batches, make_config, our_stepper, read_first, read_text
from cpu_step_peer import PeerTrainer

from model.batch import MicroBatch

TARGETS = {
    # case and precision: target, goal
    ("lines", "fp32"): (2.5, 3.5),
    ("lines", "bf16"): (5.0, 8.0),
    ("blocks", "fp32"): (None, None),  # as much as its padding gives, which may be none
    ("blocks", "bf16"): (None, None),
    ("full", "fp32"): (1.5, 2.0),
    ("full", "bf16"): (3.0, 4.0),
}
MEMORY_TARGET, MEMORY_LENGTH, MEMORY_ROWS = 2.0, 512, (64, 32, 16)
CASES, PRECISIONS = ("lines", "blocks", "full"), ("fp32", "bf16")
BATCHES = 8  # different ones of each side
CHECKPOINT_EVERY = 1000  # steps, as released
DOES_NOT_FIT = 3  # exit code of a process that measures memory


@dataclass(frozen=True)
class Ratio:
    """A line of the report; one without a target is for information."""

    name: str
    value: float
    target: float | None = None
    goal: float | None = None
    is_cost: bool = False
    """Whether the target is the most that it may be; else the least."""

    @property
    def holds(self) -> bool:
        """Whether the target is reached; NaN reaches none."""
        if self.target is None:
            return True
        return self.value <= self.target if self.is_cost else self.value >= self.target

    def __str__(self) -> str:
        return f"ratio {self.name} {self.value:.2f} target {self.target or 'none'} goal {self.goal or 'none'}"


def report(ratios: list[Ratio]) -> int:
    """Prints the lines; 1 when one misses its target, else 0."""
    print()
    for ratio in ratios:
        print(ratio)
    return int(not all(ratio.holds for ratio in ratios))


def main() -> int:
    """Builds, measures, prints; 1 when a target is missed."""
    options = _parse()
    torch.set_num_threads(1)
    if options.memory_of:
        return _use_memory(options)
    _print_head()
    if options.memory:
        return report(_compare_memory(options))
    if options.overhead:
        return report(_measure_overhead(options))
    with tempfile.TemporaryDirectory() as folder:
        text = read_text(Path(folder), options)
    synthetic.join_process_group("cpu")
    ratios = []
    for length in options.lengths:
        ratios += compare(text, length, options)
    return report(ratios)


def _parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = sorted((REPOSITORY / "data_shards" / "sample").glob("*.xz"))
    parser.add_argument("--text", nargs="+", type=Path, default=sample, help="blank lines between documents; .xz too")
    parser.add_argument("--megabytes", type=float, default=4, help="most text to use")
    parser.add_argument("--vocab", type=Path, help="BERT's vocab.txt; by default one of the text's own words")
    parser.add_argument("--lengths", type=numbers, default=[128, 512], help="tokens of a row")
    parser.add_argument("--batch-tokens", type=numbers, help="of each length; 16 rows of 128 and 8 of 512 by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=list(PRECISIONS))
    parser.add_argument("--peer-attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the benchmark itself")
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead")
    parser.add_argument("--memory-rows", type=numbers, default=MEMORY_ROWS, help="the first at which the peer fits")
    parser.add_argument("--overhead", action="store_true", help="measure the loop around the step instead")
    parser.add_argument("--overhead-steps", type=int, default=40)
    parser.add_argument("--memory-of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch_tokens = options.batch_tokens or [2048 if length <= 128 else 4096 for length in options.lengths]
    if len(options.batch_tokens) != len(options.lengths):
        parser.error("--batch-tokens: as many as --lengths")
    return options


def _print_head() -> None:
    from report import describe_machine, describe_versions

    from pipeline.environment import git_commit

    machine, versions = describe_machine("cpu"), describe_versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch_build", "transformers", "deepspeed"))
    print(f"    python tests/benchmarks/cpu_step.py {shlex.join(sys.argv[1:])}\n")
    print(f"{machine['processor']}, {machine['torch_threads']} thread; {packages}; commit {git_commit()}", flush=True)


@dataclass
class Steps:
    """A contender: each call is a training step on the next of its batches."""

    step: Callable[[Any], object]
    batches: list[Any]
    num_tokens: list[int]
    tokens_of_calls: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        number = len(self.tokens_of_calls) % len(self.batches)
        self.step(self.batches[number])
        self.tokens_of_calls.append(self.num_tokens[number])


def compare(text: dict[str, Text], length: int, options: argparse.Namespace) -> list[Ratio]:
    """Times both cases at one length."""
    rows = options.batch_tokens[options.lengths.index(length)] // length
    configs = {precision: make_config(options, length, rows, precision) for precision in options.precisions}
    steppers, parameters = {}, set()
    for precision, config in configs.items():
        torch.manual_seed(SEED)
        peer = PeerTrainer(config, options.peer_attention, uses_autocast=precision == "bf16")
        step, num_parameters = our_stepper(config)
        parameters |= {num_parameters, peer.num_parameters}
        steppers |= {f"ours {precision}": step, f"peer {precision}": peer.step}
    if "peer fp32" not in steppers:  # the peer of all ratios
        config = make_config(options, length, rows, "fp32")
        steppers["peer fp32"] = PeerTrainer(config, options.peer_attention, uses_autocast=False).step
    if len(parameters) > 1:
        raise SystemExit(f"the sides train different numbers of parameters: {parameters}")
    ratios = []
    for case in options.cases:
        ours, peers = draw_batches(text, case, next(iter(configs.values())), BATCHES)
        print(f"\n{case}, {rows} rows of {length}: {_about(ours, peers)}; {max(parameters):,} parameters")
        contenders = {
            name: Steps(step, batches, [int(batch.num_tokens) for batch in batches])
            for name, step in steppers.items()
            for batches in [ours if name.startswith("ours") else peers]
        }
        ratios += _time(f"{case}/{length}", case, contenders, options)
    del steppers
    gc.collect()
    return ratios


def _about(ours: list[MicroBatch], peers: list[Any]) -> str:
    slots = sum(batch.input_ids_BT.numel() for batch in peers)
    real = sum(batch.num_tokens for batch in peers)
    padding = 1 - real / slots
    rows = sum(len(batch.token_ids_BT) for batch in ours)
    pieces = sum(int((batch.positions_BT == 0).sum()) for batch in ours)
    mine = sum(int(batch.num_tokens) for batch in ours)
    steps = f"{mine / len(ours):,.0f} tokens a step, the peer {real / len(peers):,.0f}"
    return f"peer's padding {padding:.1%}, ours packed with {pieces / rows:.2f} pieces a row; ours {steps}"


def _time(name: str, case: str, contenders: dict[str, Steps], options: argparse.Namespace) -> list[Ratio]:
    """Times the contenders in turn; the table's lines are printed."""
    seconds = interleave(Timer("cpu"), contenders, options.rounds, calls=1)  # type: ignore[arg-type]
    per_token = {  # of two calls the second is timed
        side: [s / tokens for s, tokens in zip(values, contenders[side].tokens_of_calls[1::2], strict=True)]
        for side, values in seconds.items()
    }
    print("\n| step | tokens/s/core, median | least | most | s a step, median |\n|---|---|---|---|---|")
    for side, values in per_token.items():
        rate, step = spread([1 / value for value in values]), spread(seconds[side])["median"]
        print(f"| {side} | {rate['median']:,.0f} | {rate['min']:,.0f} | {rate['max']:,.0f} | {step:.3f} |", flush=True)

    def ratio(slower: str, faster: str) -> float:
        return paired_ratio(per_token[slower], per_token[faster])["median"]

    ratios = []
    for precision in options.precisions:
        target, goal = TARGETS[case, precision]
        ratios.append(Ratio(f"{name}/{precision}", ratio("peer fp32", f"ours {precision}"), target, goal))
        if precision == "bf16":
            ratios.append(Ratio(f"{name}/bf16_to_autocast", ratio("peer bf16", "ours bf16")))
    return ratios


def _compare_memory(options: argparse.Namespace) -> list[Ratio]:
    """Peak memory of a step of each side, at the first number of rows at which the peer fits."""
    for rows in options.memory_rows:
        peer = _peak_bytes("peer", rows)
        if peer is None:
            print(f"{rows} rows of {MEMORY_LENGTH}: the peer does not fit into this machine's memory")
            continue
        ours = _peak_bytes("ours", rows)
        if ours is None:
            raise SystemExit(f"{rows} rows of {MEMORY_LENGTH}: ours does not fit where the peer does")
        print(f"{rows} rows of {MEMORY_LENGTH}, fp32: peer {peer / 2**30:.2f} GiB, ours {ours / 2**30:.2f} GiB")
        return [Ratio(f"memory/{rows}x{MEMORY_LENGTH}", peer / ours, MEMORY_TARGET)]
    raise SystemExit("the peer fits at none of --memory-rows")


def _peak_bytes(side: str, rows: int) -> int | None:
    """What a process of its own uses; None when it gets no more memory."""
    given = [argument for argument in sys.argv[1:] if argument != "--memory"]
    command = [sys.executable, __file__, *given, "--memory-of", side, "--memory-rows", str(rows)]
    done = subprocess.run(command, env=clean_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == DOES_NOT_FIT:
        return None
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def _use_memory(options: argparse.Namespace) -> int:
    """Runs two steps, the second with moments; prints the peak above what the imports took, in bytes."""
    synthetic.join_process_group("cpu")
    available = _status_bytes("/proc/meminfo", "MemAvailable")
    # Address space, which is more than what is resident: an allocation fails before the machine runs out.
    limit = _status_bytes("/proc/self/status", "VmSize") + int(0.95 * available)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        text = read_text(Path(folder), options)
    config = make_config(options, MEMORY_LENGTH, options.memory_rows[0], "fp32")
    before = _status_bytes("/proc/self/status", "VmRSS")
    try:
        ours, peers = draw_batches(text, "full", config, 1)
        if options.memory_of == "ours":
            steps = Steps(our_stepper(config)[0], ours, [0])
        else:
            steps = Steps(PeerTrainer(config, options.peer_attention, uses_autocast=False).step, peers, [0])
        for _ in range(2):
            steps()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return DOES_NOT_FIT
    print(_status_bytes("/proc/self/status", "VmHWM") - before)
    return 0


def _measure_overhead(options: argparse.Namespace) -> list[Ratio]:
    """The share of the loop around the steps of the first length and precision, with a journal entry every 10."""
    from cpu_step_overhead import LOOP, fill_vocabulary, loop_seconds, overhead, write_documents
    from text_to_shards import make_tokenizer

    length, tokens, precision = options.lengths[0], options.batch_tokens[0], options.precisions[0]
    rows, steps = tokens // length, options.overhead_steps
    train = {"steps": steps, "global_batch_size": rows, "micro_batch_size": rows, "precision": precision}
    with tempfile.TemporaryDirectory() as name:
        write_documents(Path(name) / "text.txt", documents := read_first(options))
        make_tokenizer(Path(name) / "made", "wordpiece", documents, options.vocab)
        vocabulary = fill_vocabulary(Path(name) / "made" / "vocab.txt", VOCAB_SIZE)
        corpora = [{"name": "text", "path": f"{name}/text.txt"}]
        sections: dict[str, Any] = {
            "run": {"name": "overhead", "dir": name},
            "launch": {"device": "cpu", "processes": 1, "threads_per_process": 1},
            "data": {"corpora": corpora, "sequence_length": length, "num_workers": 1},
            "tokenizer": {"kind": "wordpiece", "path": vocabulary, "vocab_size": VOCAB_SIZE},
            "train": train | {"log_every": 10, "checkpoint_every": steps},
            "tracking": {"uri": "none"},
        }
        seconds = loop_seconds(make_config(options, length, rows, precision, **sections))
    print(f"\n{steps} steps of {rows} rows of {length}, {precision}\n\n| part | ms a step | share |\n|---|---|---|")
    for part, value in seconds.items():
        print(f"| {part} | {1e3 * value / steps:.2f} | {value / seconds[LOOP]:.2%} |")
    share = overhead(seconds, steps, CHECKPOINT_EVERY)
    return [Ratio("overhead_pct", 100 * share, 1.0, is_cost=True)]


def _status_bytes(path: str, name: str) -> int:
    """A figure of Linux's, which gives it in KiB."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(main())
