"""Every backend of every operation on a GPU, at sizes that divide nothing; and which of them ``auto`` takes."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from kernel_case import dropout_record
from kernels import CASES, accuracy, accuracy_problems, backends

from model.kernels.select import FASTEST, OPERATIONS, select_kernels, why_not

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_backends_agree_with_float64(operation: str, dtype: torch.dtype):
    records = list(accuracy(operation, DEVICE, True, dtype))
    assert {record["backend"] for record in records} >= {"reference", "torch", "triton"}
    for record in records:
        assert "error" not in record, record
        assert accuracy_problems(record) == []


@pytest.mark.parametrize("operation", ["attention", "add_norm", "embed"])
def test_dropout_is_the_keys(operation: str):
    case = next(iter(CASES[operation](DEVICE, True, False)))
    for backend, function in backends(operation, DEVICE, case.tanh_gelu).items():
        assert dropout_record(case, function, backend, DEVICE)["problems"] == [], backend


@pytest.mark.parametrize("approximate_gelu", [False, True])
def test_auto_takes_the_fastest(approximate_gelu: bool):
    kernels = select_kernels("auto", DEVICE, approximate_gelu)
    expected = {
        operation: backend if why_not(operation, backend, DEVICE, approximate_gelu) is None else "torch"
        for operation, (backend, _) in FASTEST[DEVICE].items()
    }
    assert kernels.names == expected
    assert torch.cuda.get_device_capability() < (8, 0) or "triton" in expected.values()


def test_triton_by_name_is_triton_throughout():
    assert set(select_kernels("triton", DEVICE).names.values()) == {"triton"}
