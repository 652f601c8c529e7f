"""Every AdamW kernel against a formula in float64, Triton's in its interpreter where there is no GPU."""

import os
import re
import subprocess
import sys

import pytest
import torch

from model.kernels.adamw import ADAMW, AdamWRule
from model.kernels.adamw_triton import triton_adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ADAMW | {"triton": triton_adamw}
SIZES = (1, 7, 1025, 70001, 8192)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS, EPS = (0.9, 0.999), 1e-6


class Tensors:
    """Weights, moments and step counts in the middle of training, and draws of gradients."""

    def __init__(self, sizes=SIZES, steps_done=3):
        self.draw = torch.Generator().manual_seed(3)
        self.weights = [self.normal(size) for size in sizes]
        self.exp_avgs = [0.1 * self.normal(size) for size in sizes]
        self.exp_avg_sqs = [self.normal(size).square() for size in sizes]
        self.steps = [torch.tensor(float(steps_done + number), device=DEVICE) for number in range(len(sizes))]

    def normal(self, size):
        return torch.randn(size, generator=self.draw).to(DEVICE)

    def gradients(self, dtype):
        return [self.normal(weight.shape).to(dtype) for weight in self.weights]

    def lists(self):
        return self.weights, self.exp_avgs, self.exp_avg_sqs

    def update(self, kernel, gradients, rule, scale=None, half_copies=None):
        kernel(self.weights, gradients, self.exp_avgs, self.exp_avg_sqs, self.steps, rule, scale, half_copies)


def in_float64(tensors, gradients, rule, scale=1.0):
    """Weights and moments after an update, as float64."""
    beta1, beta2 = rule.betas
    results = []
    for weight, mean, square, step, gradient in zip(*tensors.lists(), tensors.steps, gradients, strict=True):
        weight, mean, square, gradient = (x.double() for x in (weight, mean, square, gradient))
        mean = beta1 * mean + (1 - beta1) * scale * gradient
        square = beta2 * square + (1 - beta2) * (scale * gradient) ** 2
        power = float(step) + 1
        corrections = (1 - beta1**power, 1 - beta2**power) if rule.bias_correction else (1, 1)
        direction = mean / corrections[0] / ((square / corrections[1]).sqrt() + rule.eps)
        results.append((weight - rule.lr * direction - rule.lr * rule.weight_decay * weight, mean, square))
    return [list(column) for column in zip(*results, strict=True)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight_decay", "scale"), [(0.0, None), (0.01, None), (0.0, 0.37), (0.01, 0.37)])
@pytest.mark.parametrize("corrected", [False, True])
def test_an_update_is_the_formulas(name, dtype, weight_decay, scale, corrected):
    tensors, rule = Tensors(), AdamWRule(0.05, BETAS, EPS, weight_decay, corrected)
    gradients, steps = tensors.gradients(dtype), [float(step) for step in tensors.steps]
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    expected = in_float64(tensors, gradients, rule, 1.0 if factor is None else float(factor))
    tensors.update(KERNELS[name], gradients, rule, factor)
    for found, wanted in zip(tensors.lists(), expected, strict=True):
        for x, y in zip(found, wanted, strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
    assert [float(step) for step in tensors.steps] == [step + corrected for step in steps]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_the_new_weights_rounded(name, dtype):
    tensors = Tensors()
    copies = [torch.zeros_like(weight, dtype=dtype) for weight in tensors.weights]
    tensors.update(KERNELS[name], tensors.gradients(dtype), AdamWRule(0.05, BETAS, EPS, 0.01, False), None, copies)
    for copy, weight in zip(copies, tensors.weights, strict=True):
        wanted = weight.to(dtype)
        if name == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts off
            wanted = (weight.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
        assert torch.equal(copy, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("corrected", [False, True])
def test_hundred_steps_do_not_drift(name, corrected):
    tensors, exact = Tensors((1025, 7), 0), Tensors((1025, 7), 0)
    for moments in (tensors.exp_avgs, tensors.exp_avg_sqs, exact.exp_avgs, exact.exp_avg_sqs):
        torch._foreach_zero_(moments)
    for step in tensors.steps + exact.steps:
        step.zero_()
    for number in range(100):
        rule = AdamWRule(1e-3 * (1 - number / 100), BETAS, EPS, 0.01, corrected)
        gradients = tensors.gradients(torch.float32)
        exact.weights, exact.exp_avgs, exact.exp_avg_sqs = in_float64(exact, gradients, rule)
        torch._foreach_add_(exact.steps, 1)
        tensors.update(KERNELS[name], gradients, rule)
    for found, wanted in zip(tensors.weights, exact.weights, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch"])
@pytest.mark.parametrize("scale", [None, 0.5, float("nan")])
def test_what_is_not_finite_spreads_as_in_torch(name, scale):
    found, wanted = Tensors(), Tensors()
    gradients = found.gradients(torch.float32)
    gradients[3][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=DEVICE)
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    rule = AdamWRule(0.05, BETAS, EPS, 0.01, False)
    found.update(KERNELS[name], [gradient.clone() for gradient in gradients], rule, factor)
    wanted.update(KERNELS["torch"], gradients, rule, factor)
    assert not wanted.weights[3][0].isfinite()
    for tensors, others in zip(found.lists(), wanted.lists(), strict=True):
        for x, y in zip(tensors, others, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("size", [4095, 4096, 5000])  # a block has 4096
def test_triton_takes_tensors_at_odd_addresses_and_leaves_their_neighbours_alone(size):
    rule = AdamWRule(0.05, BETAS, EPS, 0.01, False)
    aligned, odd = Tensors((size,)), Tensors((size,))
    gradients = aligned.gradients(torch.float32)
    whole = [torch.full((size + 4,), 7.0, device=DEVICE) for _ in range(3)]
    for tensors, base in zip(odd.lists(), whole, strict=True):
        base[1:-3] = tensors[0]
        tensors[0] = base[1:-3]
    aligned.update(triton_adamw, gradients, rule)
    odd.update(triton_adamw, gradients, rule)
    for tensors, others, base in zip(aligned.lists(), odd.lists(), whole, strict=True):
        assert torch.equal(tensors[0], others[0])
        assert base[0] == 7
        assert (base[-3:] == 7).all()


def test_triton_leaves_gradients_alone_and_sees_those_at_new_addresses():
    tensors, rule = Tensors((9,)), AdamWRule(0.05, BETAS, EPS, 0.0, False)
    kept = []
    for _ in range(3):
        gradients = tensors.gradients(torch.float32)
        kept.append((gradients[0], gradients[0].clone()))
        expected = in_float64(tensors, gradients, rule, 0.5)
        tensors.update(triton_adamw, gradients, rule, torch.tensor(0.5, device=DEVICE))
        torch.testing.assert_close(tensors.weights[0].double(), expected[0][0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(gradient, copy) for gradient, copy in kept)
    assert len({gradient.data_ptr() for gradient, _ in kept}) == 3


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.kernels.adamw_triton import _adamw_kernel as kernel
constants = {"GRADIENT": tl.float32, "HALF": tl.bfloat16, "IS_ALIGNED": True, "BLOCK": 4096}
pointers = {"table_ptr": "*i64", "blocks_ptr": "*i32", "scale_ptr": "*fp32", "corrections_ptr": "*fp32"}
types = {name: pointers.get(name, "constexpr" if name in constants else "fp32") for name in kernel.arg_names}
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
source = ASTSource(kernel, types, constexprs=places, attrs=aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
"""


def test_triton_compiles_for_hopper_with_wide_loads_and_exact_roots():
    """The interpreter knows nothing of the compiler; that needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled.stdout)) >= 16  # four tensors, four loads a thread
    assert len(re.findall(r"st\.global\.v4\.b32", compiled.stdout)) >= 14
    assert "sqrt.rn.f32" in compiled.stdout
    assert "div.rn.f32" in compiled.stdout
    assert "cvt.rn.bf16x2.f32" in compiled.stdout
