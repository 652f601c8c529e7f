"""The benchmark of fine-tuning itself, with random weights and few steps: both sides run, and its lines are read."""

import os
import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).with_name("finetune.py")
SHORT = ("--size", "tiny", "--tasks", "continuation", "--max-length", "24", "--train-examples", "64", "--epochs", "1")


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_whole_runs_and_steps():
    done = run_benchmark(*SHORT, "--seeds", "1")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert "| continuation: 64 examples, 1 epochs, " in done.stdout, done.stdout
    ratios = dict(re.findall(r"^ratio continuation/(\w+) (\d+\.\d+) target ", done.stdout, re.M))
    assert ratios.keys() == {"steps", "steps_padded_to_max_length", "runs", "runs_and_tokenization"}
    assert all(float(ratio) > 0 for ratio in ratios.values())
    assert re.search(r"^scores continuation (agree|disagree)\b", done.stdout, re.M)
    missed = float(ratios["runs"]) < 1.5 or "scores continuation disagree" in done.stdout
    assert done.returncode == int(missed) or ratios["runs"] == "1.50"  # as it is rounded
