"""Replaced token detection: every backend against formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.kernels import detection_triton
from model.kernels.detection import COUNTS, Detection, reference_detect, torch_detect
from model.kernels.detection_triton import triton_detect

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Detection]] = {
    "reference": reference_detect, "torch": torch_detect, "triton": triton_detect,
}  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors; tests/gpu has those of a GPU")


@pytest.fixture(params=BACKENDS)
def detect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Detection]:
    monkeypatch.setattr(detection_triton, "PROGRAMS", 2)  # so that one takes several blocks of tokens
    return BACKENDS[request.param]


def make_inputs(rows: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Some logits of 0 and of +-100, every fourth weight 0, the others all different."""
    draw = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows * length, generator=draw)
    logits[::7], logits[3::11], logits[5::13] = 100, -100, 0
    weights = torch.rand(rows * length, generator=draw)
    weights[::4] = 0
    is_replaced = torch.rand(rows * length, generator=draw) < 0.3
    shaped = [t.view(rows, length) for t in (logits.to(dtype), is_replaced, weights)]
    return shaped[0].requires_grad_(), shaped[1], shaped[2]


def formulas(logits: Tensor, is_replaced: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Losses log(1 + exp(∓logit)), what is counted, and the gradient sigmoid - label; in float64."""
    logits, weights = logits.detach().double(), weights.double()
    sign = torch.where(is_replaced, -1.0, 1.0)
    bce = torch.log1p(torch.exp(sign * logits))
    flagged = logits > 0
    sums = {
        "detected": weights.sum(),
        "detected_replaced": weights[is_replaced].sum(),
        "discriminator_bce": (bce * weights).sum(),
        "discriminator_correct": weights[flagged == is_replaced].sum(),
        "flagged": weights[flagged].sum(),
        "flagged_replaced": weights[flagged & is_replaced].sum(),
    }
    return bce, sums, weights * sign / (1 + torch.exp(-sign * logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (5, 411)])
def test_agrees_with_formulas(detect, shape: tuple[int, int], dtype: torch.dtype):
    inputs = make_inputs(*shape, dtype)
    bce_BT, sums, gradient_BT = formulas(*inputs)
    found = detect(*inputs)
    assert found.loss.dtype == found.bce_BT.dtype == found.sums.dtype == torch.float32
    torch.testing.assert_close(found.bce_BT.double(), bce_BT, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.loss.double(), sums["discriminator_bce"], rtol=2e-6, atol=0)
    for name, value in zip(COUNTS, found.sums, strict=True):
        torch.testing.assert_close(value.double(), sums[name], rtol=2e-6, atol=0, msg=name)
    (found.loss * 1.5).backward()
    d_logits_BT = inputs[0].grad
    assert d_logits_BT is not None and d_logits_BT.dtype == dtype
    assert torch.isfinite(d_logits_BT).all()
    rounding = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(d_logits_BT.double(), 1.5 * gradient_BT, rtol=rounding, atol=2e-7)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_fp16_keeps_gradients_of_small_weights_whose_loss_is_scaled(name: str):
    logits_BT, is_replaced_BT, weights_BT = make_inputs(3, 50, torch.float16)
    weights_BT = weights_BT * 1e-7
    (BACKENDS[name](logits_BT, is_replaced_BT, weights_BT).loss * 65536).backward()
    expected_BT = 65536 * formulas(logits_BT, is_replaced_BT, weights_BT)[2]
    assert expected_BT.abs().max() > 1e-3
    torch.testing.assert_close(logits_BT.grad.double(), expected_BT, rtol=5e-4, atol=6e-8)


def test_triton_keeps_small_losses():
    logits = torch.linspace(-60, 0, 200)[None]
    found = triton_detect(logits, torch.zeros_like(logits, dtype=torch.bool), torch.ones_like(logits))
    torch.testing.assert_close(found.bce_BT.double(), torch.log1p(logits.double().exp()), rtol=1e-5, atol=0)


def test_views(detect):
    inputs = make_inputs(7, 50)
    views = [t.detach().t().contiguous().t() for t in inputs]
    views[0].requires_grad_()
    views[2] = torch.tensor(0.5).expand(7, 50)
    bce_BT, sums, gradient_BT = formulas(*views)
    found = detect(*views)
    torch.testing.assert_close(found.bce_BT.double(), bce_BT, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.sums.double(), torch.stack([sums[name] for name in COUNTS]), rtol=2e-6, atol=0)
    (d_logits_BT,) = torch.autograd.grad(found.loss, views[0])
    torch.testing.assert_close(d_logits_BT.double(), gradient_BT, rtol=2e-7, atol=2e-7)


def test_nothing(detect):
    for inputs in (make_inputs(0, 50), (*make_inputs(3, 50)[:2], torch.zeros(3, 50))):
        found = detect(*inputs)
        assert found.loss == 0 and found.sums.tolist() == [0] * 6
        (d_logits_BT,) = torch.autograd.grad(found.loss, inputs[0])
        assert d_logits_BT.shape == inputs[0].shape and d_logits_BT.eq(0).all()


def test_graph(detect):
    inputs = make_inputs(3, 50)
    found = detect(*inputs)
    assert found.loss.requires_grad and not found.bce_BT.requires_grad and not found.sums.requires_grad
    (first,) = torch.autograd.grad(2 * found.loss, inputs[0], retain_graph=True)
    torch.testing.assert_close(first, 2 * torch.autograd.grad(found.loss, inputs[0])[0])
    with torch.no_grad():
        again = detect(*inputs)
    assert not again.loss.requires_grad
    assert torch.equal(again.sums, found.sums)
