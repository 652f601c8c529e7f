"""The suite itself, on a CPU with tiny shapes: every section runs, and a failing one is told apart."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import apex_build
import gpu_suite
import kernels
from large_step import targets
from section import CheckFailedError, Context, NotRunError
from step_profile import idle, most_expensive

from model.kernels.dropout import Dropout
from model.kernels.select import OPERATIONS

FLOAT32_LIMIT = {"adamw": 1e-4}  # of a small change of large weights
SUITE = Path(__file__).with_name("gpu_suite.py")


def run_suite(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1600, check=False)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("suite") / "report.json"
    done = run_suite(out, "--device", "cpu", "--tiny", "--budget-s", "1500", "--seed", "0")
    return done, json.loads(out.read_text())


@pytest.fixture(scope="module")
def report(tiny_run) -> dict[str, Any]:
    return tiny_run[1]


@pytest.mark.timeout(1700)  # the suite's own and what it takes to start
def test_every_section_is_there_and_none_failed(tiny_run):
    done, report = tiny_run
    assert report["errors"] == [] and done.returncode == 0, done.stderr
    assert {name: section["status"] for name, section in report["sections"].items()} == {
        "ceilings": "ok",
        "apex_build": "not_run",  # never counted as passed
        "kernels": "ok",
        "large_step": "ok",
        "step_profile": "ok",
        "gpu_tests": "not_run",
        "determinism": "ok",
    }
    assert "CUDA" in report["sections"]["gpu_tests"]["reason"]
    assert report["machine"]["cores"] >= 1 and report["versions"]["torch"]


def test_table_shows_each_section(tiny_run):
    done, report = tiny_run
    assert "tiny shapes: not a measurement" in done.stdout
    for name in report["sections"]:
        assert f"| {name} | " in done.stdout


def test_ceilings(report):
    results = report["sections"]["ceilings"]["results"]
    assert results["square_product"]["tflop_per_s"] > 0 and results["copy"]["tb_per_s"] > 0
    assert [product["m_k_n"][1:] for product in results["model_products"]] == [
        [1024, 1024], [1024, 3072], [1024, 4096], [256, 256], [256, 768], [256, 1024],
    ]  # fmt: skip


def test_every_backend_agrees_with_float64(report):
    results = report["sections"]["kernels"]["results"]
    assert results["unusable"] == results["peers_unusable"] == results["skipped"] == []
    checked = {(record["operation"], record["backend"], record["dtype"]) for record in results["accuracy"]}
    half = dict.fromkeys(itertools.product(OPERATIONS, ("reference", "torch", "triton")), "bfloat16")
    half["attention", "triton"] = "float16"
    assert checked >= {(*key, dtype) for key in half for dtype in ("float32", half[key])}
    for record in results["accuracy"]:
        limit = 2e-2 if record["dtype"] != "float32" else FLOAT32_LIMIT.get(record["operation"], 2e-6)
        assert record["relative_errors"] and all(0 <= e < limit for e in record["relative_errors"].values()), record
    differentiated = {r["operation"] for r in results["accuracy"] if any("gradient" in n for n in r["relative_errors"])}
    assert differentiated == OPERATIONS.keys() - {"adamw"}
    assert {r["operation"] for r in results["accuracy"] if r["dropout"]} == {"attention", "add_norm", "embed"}


def test_every_backend_drops_what_the_key_says(report):
    records = report["sections"]["kernels"]["results"]["dropout"]
    dropping, backends = ("attention", "add_norm", "embed"), ("reference", "torch", "triton")
    assert {(r["operation"], r["backend"]) for r in records} == set(itertools.product(dropping, backends))
    assert all(r["draws_by_key"] and r["equals_definition"] and r["problems"] == [] for r in records)


def test_every_backend_is_timed_beside_others(report):
    records = report["sections"]["kernels"]["results"]["times"]
    assert {(r["operation"], r["backend"]) for r in records} >= set(
        itertools.product(OPERATIONS, ("reference", "torch", "triton"))
    )
    for record in records:
        assert record["forward_ms"] > 0 and record["forward_backward_ms"] > 0 and min(record["floor_ms"]) > 0
        assert record["fastest_peer"] not in ("reference", "torch", "triton", None)


def run_kernels(monkeypatch: pytest.MonkeyPatch, operation: str, wrong: Callable[..., Any]) -> dict[str, Any]:
    """The section with a wrong function in place of the ``torch`` backend of an operation."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(OPERATIONS[operation], "torch", wrong)
    others = [name for name in OPERATIONS if name != operation]
    for name in others:
        monkeypatch.delitem(OPERATIONS, name)
        monkeypatch.delitem(kernels.CASES, name)
    context = Context("cpu", True, 1, deadline=time.monotonic() + 100)
    kernels.run(context)
    return context.results


def wrong_kernels() -> dict[str, tuple[str, Callable[..., Any], str]]:
    """Operation, a wrong function, and what the section has to say about it."""
    right = {operation: found["torch"] for operation, found in OPERATIONS.items()}

    def without_gradient(x, bias, approximate):
        return right["bias_gelu"](x, bias.detach(), approximate) + 0 * bias

    def another_key(*arguments):
        *others, dropout = arguments
        return right["embed"](*others, dropout and Dropout(dropout.probability, dropout.key ^ 1))

    def next_token(*arguments):
        found = right["predict"](*arguments)
        return replace(found, sampled_N=(found.sampled_N + 1) % 150)

    def without_copies(*arguments):
        right["adamw"](*arguments[:-1], None)

    def raising(*_):
        raise ValueError("no such kernel")

    def no_number(*arguments):
        return right["attention"](*arguments) * torch.nan

    return {
        "one percent off": ("add_norm", lambda *a: 1.01 * right["add_norm"](*a), "error of output"),
        "gradient missing": ("bias_gelu", without_gradient, "error of gradient of bias"),
        "another key": ("embed", another_key, "the mask is not the key's"),
        "samples of others": ("predict", next_token, "error of sampled"),
        "copies not written": ("adamw", without_copies, "error of half copies nan"),
        "raises": ("detect", raising, "detect/torch does not run: ValueError: no such kernel"),
        "not a number": ("attention", no_number, "error of output nan"),
    }


@pytest.mark.parametrize("fault", wrong_kernels())
def test_a_wrong_kernel_fails_the_section(monkeypatch: pytest.MonkeyPatch, fault: str):
    operation, wrong, message = wrong_kernels()[fault]
    with pytest.raises(CheckFailedError, match=message):
        run_kernels(monkeypatch, operation, wrong)


def test_a_right_kernel_does_not(monkeypatch: pytest.MonkeyPatch):
    results = run_kernels(monkeypatch, "detect", OPERATIONS["detect"]["torch"])
    assert {record["backend"] for record in results["accuracy"]} == {"reference", "torch"}


def test_resumed_run_is_bitwise_the_same(report):
    results = report["sections"]["determinism"]["results"]
    assert results["bitwise"] == {"journal": True, "weights.safetensors": True, "optimizer.safetensors": True}
    assert results["runs"]["restored_step"] == 20 <= results["runs"]["journal_entries_when_killed"] < 40
    assert results["cost"]["deterministic_over_default"]["median"] > 0


def test_large_step_compares_the_same_work(report):
    results = report["sections"]["large_step"]["results"]
    assert [record["rows"] for record in results["micro_batches"]] == [4, 8] and results["skipped"] == []
    assert len(set(results["parameters"].values())) == 1
    assert set(results["parameters"]) == {"hf_eager", "hf_sdpa", "hf_sdpa_gather", "ours_auto", "ours_auto_several"}
    for record in results["micro_batches"]:
        assert record["not_measured"] == {}
        assert record["pieces_per_row"] > 1
        assert not any(contender["compiled"] for contender in record["contenders"].values())
        assert len(record["ratios"]) == 6
        assert all(min(ratio["values"]) > 0 for ratio in record["ratios"].values())


def test_targets_are_told_of_the_sizes_that_were_measured():
    ratios = {"ours_auto / hf_eager": {"median": 2.3}, "ours_auto / hf_sdpa_compile": {"median": 1.29}}
    records = [{"rows": 64, "ratios": ratios, "contenders": {"ours_auto": {"tflop_per_s": 480.0}}}, {"rows": 16}]
    assert [(target["target"], target["met"]) for target in targets(records)] == [
        (2.2, True), (1.3, False), (473.0, True),
    ]  # fmt: skip


def test_profile_names_the_most_expensive(report):
    (step,) = report["sections"]["step_profile"]["results"]["steps"]
    times = [kernel["ms"] for kernel in step["most_expensive"]]
    assert len(times) == 25 and times == sorted(times, reverse=True) and times[-1] > 0


def test_idle_time_is_what_no_kernel_covers():
    events = [("a", 10.0, 20.0), ("b", 15.0, 18.0), ("a", 25.0, 30.0), ("c", 30.0, 40.0), ("b", 50.0, 60.0)]
    assert idle(events) == {"span_ms": 0.05, "idle_pct": pytest.approx(30.0), "longest_gap_us": 10.0}
    found = most_expensive(events)
    assert [(k["name"], k["calls"], k["ms"]) for k in found["most_expensive"]] == [
        ("a", 2, 0.015), ("b", 2, 0.013), ("c", 1, 0.01),
    ]  # fmt: skip
    assert found["launches"] == 5


def test_triton_is_interpreted_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    section = gpu_suite.SECTIONS["kernels"]
    assert "TRITON_INTERPRET" not in gpu_suite._environment(section, "cuda", "packages")
    assert gpu_suite._environment(section, "cpu", "packages")["TRITON_INTERPRET"] == "1"
    assert gpu_suite._environment(section, "cuda", "packages")["PYTHONPATH"].endswith(":packages")


def test_apex_is_built_from_its_own_source_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    context = Context("cuda", False, 1, deadline=time.monotonic() + 100)
    monkeypatch.delenv(apex_build.SOURCE, raising=False)
    with pytest.raises(NotRunError, match="names no source tree"):
        apex_build.run(context)
    monkeypatch.setenv(apex_build.SOURCE, str(tmp_path))
    with pytest.raises(CheckFailedError, match="layer_norm_cuda"):
        apex_build.run(context)


def test_failures_are_recorded_section_by_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "report.json"
    done = run_suite(out, "--device", "cuda", "--only", "ceilings,kernels")
    report = json.loads(out.read_text())
    assert done.returncode == 1
    assert [error["section"] for error in report["errors"]] == ["ceilings", "kernels"]
    assert "no usable GPU" in report["errors"][0]["message"]
    assert report["sections"]["large_step"]["status"] == "not_run"
