"""The rate that MFU refers to, where no datasheet has it."""

import pytest
import torch

from pipeline.devices import peak_flops


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_peak_is_timed_in_the_precision_of_training(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied, multiply = [], torch.Tensor.__matmul__

    def note(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        multiplied.append((a.dtype, b.dtype))
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", note)
    rate, source = peak_flops("cpu", 2, precision)
    assert set(multiplied) == {(dtype, dtype)}
    assert source == f"2 threads, {precision} product of 1024x1024 matrices timed now"
    assert rate > 0
