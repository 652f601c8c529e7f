"""The benchmark of the step on a CPU itself: it runs with tiny shapes, and its report is read."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARK = Path(__file__).with_name("cpu_step.py")


@pytest.fixture
def cpu_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as it sets it itself; taken back afterwards
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import cpu_step

    return cpu_step


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), "--tiny", "--megabytes", "0.1", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_all_cases():
    done = run_benchmark("--lengths", "24", "--batch-tokens", "96", "--rounds", "1")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    lines = re.findall(r"^ratio (\S+) (\d+\.\d+) target (\S+) goal (\S+)$", done.stdout, re.M)
    assert {name: (target, goal) for name, _, target, goal in lines} == {
        "lines/24/fp32": ("2.5", "3.5"),
        "lines/24/bf16": ("5.0", "8.0"),
        "lines/24/bf16_to_autocast": ("none", "none"),
        "blocks/24/fp32": ("none", "none"),
        "blocks/24/bf16": ("none", "none"),
        "blocks/24/bf16_to_autocast": ("none", "none"),
        "full/24/fp32": ("1.5", "2.0"),
        "full/24/bf16": ("3.0", "4.0"),
        "full/24/bf16_to_autocast": ("none", "none"),
    }, done.stdout
    targets = [(float(value), float(target)) for _, value, target, _ in lines if target != "none"]
    if all(value != target for value, target in targets):  # else rounding hides which
        assert done.returncode == int(any(value < target for value, target in targets)), done.stdout
    padding = dict(re.findall(r"^(\w+), 4 rows of 24: peer's padding (\d+\.\d)%", done.stdout, re.M))
    assert float(padding["lines"]) > float(padding["blocks"]) > 0 and float(padding["full"]) == 0


@pytest.mark.parametrize(
    ("value", "target", "code"), [(2.49, 2.5, 1), (2.5, 2.5, 0), (math.nan, 2.5, 1), (0.1, None, 0)]
)
def test_exit_code(cpu_step, capsys, value, target, code):
    assert cpu_step.report([cpu_step.Ratio("good", 9.0, 2.0), cpu_step.Ratio("case", value, target)]) == code
    assert f"ratio case {value:.2f} target {target or 'none'} goal none\n" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "code"), [(0.9, 0), (1.0, 0), (1.1, 1)])
def test_exit_code_where_the_target_is_the_most(cpu_step, value, code):
    assert cpu_step.report([cpu_step.Ratio("cost", value, 1.0, is_cost=True)]) == code


def test_overhead_is_what_no_part_of_the_step_took(cpu_step):
    from cpu_step_overhead import overhead

    seconds = {"loop": 102.0, "forward": 30.0, "backward": 60.0, "update": 5.0, "checkpoint": 2.0, "journal": 1.0}
    assert overhead(seconds, steps=10, checkpoint_every=10) == pytest.approx(7 / 102)
    assert overhead(seconds, steps=10, checkpoint_every=1000) == pytest.approx(5.02 / 100.02)


def test_padded_rows_and_their_labels(cpu_step):
    from cpu_step_peer import peer_batch
    from row_peers import make_collator

    from data_shards.special import TRAINED

    torch.manual_seed(1)
    rows = [np.array([TRAINED.cls, *range(10, 40), TRAINED.sep]), np.array([TRAINED.cls, 41, 42, TRAINED.sep])]
    collate = make_collator(0.5, TRAINED, 100)
    batch = peer_batch(collate, rows)
    assert batch.attention_mask_BT is not None and batch.attention_mask_BT.sum(1).tolist() == [32, 4]
    assert batch.input_ids_BT.shape == (2, 32) and batch.num_tokens == 36
    is_masked_BT = batch.labels_BT != -100
    assert is_masked_BT.any() and not is_masked_BT[batch.attention_mask_BT == 0].any()
    original_BT = torch.where(is_masked_BT, batch.labels_BT, batch.input_ids_BT)
    assert original_BT[0, :32].tolist() == rows[0].tolist()
    assert peer_batch(collate, rows[:1]).attention_mask_BT is None


def test_both_sides_get_the_documents(cpu_step):
    from cpu_step_inputs import Text

    from data_shards.special import TRAINED

    documents = [np.arange(5, 5 + size, dtype=np.uint16) for size in (3, 15, 8)]
    text = Text(documents, TRAINED)
    pieces = text.pieces(10)
    assert [len(piece) for piece in pieces] == [5, 9, 10, 10]  # 3; 15 = 8 + 7; 8
    assert all(piece[0] == TRAINED.cls and piece[-1] == TRAINED.sep for piece in pieces)
    assert sum(len(piece) - 2 for piece in pieces) == sum(map(len, documents))
    with_borders, without = (text.windows(10, has_borders).reshape(-1) for has_borders in (True, False))
    assert np.flatnonzero(with_borders == TRAINED.sep).tolist() == [3, 19]
    assert without.tolist() == np.concatenate(documents)[:20].tolist()
