"""The suite itself, on a CPU with tiny shapes: every section runs, and a failing one is told apart."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).with_name("gpu_suite.py")


def run_suite(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("suite") / "report.json"
    done = run_suite(out, "--device", "cpu", "--tiny", "--budget-s", "350")
    return done, json.loads(out.read_text())


@pytest.fixture(scope="module")
def report(tiny_run) -> dict[str, Any]:
    return tiny_run[1]


def test_every_section_is_there_and_none_failed(tiny_run):
    done, report = tiny_run
    assert report["errors"] == [] and done.returncode == 0, done.stderr
    assert {name: section["status"] for name, section in report["sections"].items()} == {
        "ceilings": "ok",
        "kernels": "ok",
        "gpu_tests": "not_run",  # never counted as passed
        "determinism": "ok",
        "large_step": "ok",
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


def test_kernels_agree_with_float64(report):
    results = report["sections"]["kernels"]["results"]
    checked = {(record["backend"], record["dtype"]) for record in results["accuracy"]}
    assert checked >= {(backend, dtype) for backend in ("reference", "torch") for dtype in ("float32", "bfloat16")}
    assert results["unusable"] == []
    for record in results["accuracy"]:
        assert set(record["relative_errors"]) == {"output"} | {f"gradient of {n}" for n in ("query", "key", "value")}
        for error in record["relative_errors"].values():
            assert 0 < error < (1e-5 if record["dtype"] == "float32" else 2e-2)
    assert all(record["forward_ms"] > 0 and record["forward_backward_ms"] > 0 for record in results["times"])


def test_resumed_run_is_bitwise_the_same(report):
    results = report["sections"]["determinism"]["results"]
    assert results["bitwise"] == {"journal": True, "weights.safetensors": True, "optimizer.safetensors": True}
    assert results["runs"]["restored_step"] == 20 <= results["runs"]["journal_entries_when_killed"] < 40
    assert results["cost"]["deterministic_over_default"]["median"] > 0


def test_large_step_compares_the_same_work(report):
    results = report["sections"]["large_step"]["results"]
    assert [record["rows"] for record in results["micro_batches"]] == [4, 8]
    for record in results["micro_batches"]:
        assert record["not_measured"] == {}
        assert len(set(record["parameters"].values())) == 1 and len(record["parameters"]) == 3
        assert record["pieces_per_row"] > 1
        assert not any(contender["compiled"] for contender in record["contenders"].values())
        assert len(record["ratios"]) == 4
        assert all(min(ratio["values"]) > 0 for ratio in record["ratios"].values())


def test_failures_are_recorded_section_by_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "report.json"
    done = run_suite(out, "--device", "cuda", "--only", "ceilings,kernels")
    report = json.loads(out.read_text())
    assert done.returncode == 1
    assert [error["section"] for error in report["errors"]] == ["ceilings", "kernels"]
    assert "no usable GPU" in report["errors"][0]["message"]
    assert report["sections"]["large_step"]["status"] == "not_run"
