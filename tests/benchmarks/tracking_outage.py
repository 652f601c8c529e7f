"""What tracking costs a step: MLflow in a file, on a server, on servers that are slow, refuse, die or are not there.

    OMP_NUM_THREADS=1 python tests/benchmarks/tracking_outage.py [--rounds 5] [--seconds 12]

A tiny model's steps of a tenth of a second, each with a line for MLflow: dozens of times as many as in earnest.
Seconds of a wall clock between the lines of the journal, for waiting is what is measured; each round runs every way
once, the order turns, and a ratio is the median over rounds of a way's mean step to that of `none`, no tracking, in the
same round. `none_again` is the same once more: its ratios are the noise. Each run is told to stop after some seconds:
its last pass to MLflow then takes seconds, and not minutes as at a run's end. The last lines are ratios of mean steps;
exits 1 when one is over its target.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from processes import REPOSITORY
from report import describe_machine, describe_versions

sys.path.insert(0, str(REPOSITORY))  # it need not be installed

from pipeline.environment import git_commit
from pipeline.errors import StoppedEarly
from tests.conftest import TINY, clean_environment, command, free_port, make_text
from tests.pipeline.mlflow_server import Proxy, Server

SETTLED = 20  # steps; the first ones wait for what is made once
MOST = 1.05


@contextmanager
def proxy_of(server: Server, **traits: object) -> Iterator[str]:
    """The address of a proxy with these traits; the server is back afterwards."""
    proxy = Proxy(server, **traits)  # pyright: ignore[reportArgumentType]
    try:
        yield proxy.uri
    finally:
        proxy.close()
        if not server.is_running:
            server.start()


@contextmanager
def address(uri: str) -> Iterator[str]:
    """Of something that takes no starting."""
    yield uri


def ways(server: Server, folder: Path) -> dict[str, Callable[[], object]]:
    """What ``tracking.uri`` names, by the name of the way."""
    return {
        "none": lambda: address("none"),
        "none_again": lambda: address("none"),
        "sqlite": lambda: address(f"sqlite:///{folder}/mlflow.db"),
        "server": lambda: address(server.uri),
        "slow": lambda: proxy_of(server, delay_s=5.0),
        "refusing": lambda: proxy_of(server, refusals=(401, 500)),
        "killed": lambda: proxy_of(server, kills_at="runs/log-batch"),
        "absent": lambda: address(f"http://127.0.0.1:{free_port()}"),
    }


def step_seconds(config: Path, name: str, uri: str, seconds: float) -> list[float]:
    """Between the lines of the journal of one run."""
    arguments = [config, f"run.name={name}", f"tracking.uri={uri}", "train.steps=100000", "train.checkpoint_every=500",
                 f"train.stop_after_seconds={seconds}"]  # fmt: skip
    done = subprocess.run(
        command("pretrain", *arguments), env=clean_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != StoppedEarly.exit_code:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    lines = (config.parent / "out" / "runs" / name / "pretrain" / "journal.jsonl").read_text().splitlines()
    times = [json.loads(line)["time/unix_s"] for line in lines]
    return [after - before for before, after in pairwise(times)][SETTLED:]


def measure(rounds: int, seconds: float, folder: Path) -> dict[str, list[list[float]]]:
    """Step times of each way, by round."""
    (folder / "text.txt").write_text(make_text(300), encoding="utf-8")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(run_dir=folder / "out", corpus=folder / "text.txt"), encoding="utf-8")
    server = Server(folder)
    server.start()
    found: dict[str, list[list[float]]] = {}
    try:
        for number in range(-1, rounds):  # the first round fills caches
            names = list(ways(server, folder))
            for name in names[number % len(names) :] + names[: number % len(names)]:
                run = f"{name}-{number}"
                electra_tokenizes(config, run)
                with ways(server, folder)[name]() as uri:  # pyright: ignore
                    steps_s = step_seconds(config, run, uri, seconds)
                if number >= 0:
                    found.setdefault(name, []).append(steps_s)
    finally:
        server.kill()
    return found


def electra_tokenizes(config: Path, name: str) -> None:
    """Which takes a moment once the shards are there."""
    subprocess.run(
        command("tokenize", config, f"run.name={name}"), env=clean_environment(), capture_output=True, check=True
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run, its start included")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rounds, options.seconds, Path(folder))
    machine, torch_build = describe_machine("cpu"), describe_versions()["torch_build"]
    print(f"    python tests/benchmarks/tracking_outage.py {shlex.join(sys.argv[1:])}\n")
    print(f"{machine['processor']}, {machine['cores']} cores; torch {torch_build}; commit {git_commit()}\n")
    print("| tracking | median step, ms | longest step, ms | mean step to `none`: median | lowest | highest |")
    print("|---|---|---|---|---|---|")
    medians = {}
    for name, of_rounds in found.items():
        ratios = [fmean(own) / fmean(none) for own, none in zip(of_rounds, found["none"], strict=True)]
        medians[name] = statistics.median(ratios)
        seconds = [second for own in of_rounds for second in own]
        print(
            f"| {name} | {1e3 * statistics.median(seconds):.1f} | {1e3 * max(seconds):.0f} | "
            f"{medians[name]:.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
        )
    print()
    for name, ratio in medians.items():
        if name != "none":
            print(f"ratio step_time/{name} {ratio:.3f} target {MOST} goal none")
    return int(any(ratio > MOST for ratio in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
