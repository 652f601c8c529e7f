"""Kernels of apex and Megatron-core: what is recognised, what is refused with which words, and what they compute.

apex needs a GPU and a compiler, so stand-ins take its place: they check what they are called with against the
signatures of NVIDIA/apex at 6424da3 and compute the same in torch. Megatron-core is the real one.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from model.kernels import apex, megatron
from model.kernels.adamw import AdamWRule, reference_adamw
from model.kernels.dropout import Dropout
from model.kernels.gelu import reference_bias_gelu
from model.kernels.layer_norm import reference_add_norm

NVIDIA = {
    "apex/__init__.py": "from . import normalization",
    "apex/normalization/__init__.py": "from .fused_layer_norm import mixed_dtype_fused_layer_norm_affine",
    "apex/normalization/fused_layer_norm.py": """
def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    import fused_layer_norm_cuda
    return fused_layer_norm_cuda.forward_affine_mixed_dtypes(input, normalized_shape, weight, bias, eps)
""",
    "apex/multi_tensor_apply/__init__.py": """
def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
""",
}
EXTENSIONS = {
    "fused_layer_norm_cuda.py": """
import torch
def forward_affine_mixed_dtypes(input, normalized_shape, gamma, beta, epsilon):
    assert tuple(normalized_shape) == input.shape[-1:] and type(epsilon) is float
    assert gamma.dtype == beta.dtype
    wide = input.float()
    return torch.nn.functional.layer_norm(wide, normalized_shape, gamma.float(), beta.float(), epsilon).to(gamma.dtype)
""",
    "amp_C.py": """
import torch
calls = []
def multi_tensor_adam(chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction,
                      weight_decay):
    assert type(chunk_size) is int and noop_flag.dtype == torch.int32 and noop_flag.item() == 0
    assert [type(number) for number in (step, mode, bias_correction)] == [int] * 3 and mode == 1
    assert len(tensor_lists) == 4 and tensor_lists[0]
    calls.append(step)
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for g, p, m, v in zip(*tensor_lists, strict=True):
        assert g.dtype == p.dtype == m.dtype == v.dtype == torch.float32
        assert g.is_contiguous() and g.shape == p.shape
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        p.sub_(lr * (m / correction1 / ((v / correction2).sqrt() + epsilon) + weight_decay * p))
""",
}
WEB_TOOLKIT = dict.fromkeys(  # what apex 0.9.10.dev0 of the package index has, none of which may run
    ("apex/__init__.py", "apex/forms.py", "apex/models.py", "apex/views.py", "apex/lib/libapex.py"),
    "raise AssertionError('code of another project was run')",
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts files where Python looks first; what was imported under their names comes back afterwards."""

    def install(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    def is_apex(name):
        return name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_apex(name)}
    yield install
    for name in [name for name in sys.modules if is_apex(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_the_package_indexs_apex_is_refused_by_name(install, tmp_path):
    install(WEB_TOOLKIT)
    module, reason = apex.find_apex()
    assert module is None
    assert "another project of that name, not NVIDIA's" in reason
    assert "web toolkit" in reason
    assert str(tmp_path / "apex") in reason
    assert "pip uninstall apex" in reason
    assert "APEX_CUDA_EXT=1 pip install" in reason
    assert apex.available("adamw", "cuda") == apex.available("add_norm", "cuda") == reason


def test_a_single_file_of_that_name_is_refused_too(install, tmp_path):
    install({"apex.py": "raise AssertionError('run')"})
    module, reason = apex.find_apex()
    assert module is None
    assert f"the apex in {tmp_path / 'apex.py'} is another project" in reason


def test_no_apex(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    reason = apex.available("add_norm", "cuda")
    assert reason
    assert reason.startswith("apex is not installed; NVIDIA's is built from its source: git clone")


def test_apex_built_for_python_alone_is_recognised(install, tmp_path):
    install(NVIDIA)
    module, place = apex.find_apex()
    assert module is sys.modules["apex"]
    assert place == str(tmp_path / "apex")
    for operation, extension in (("add_norm", "fused_layer_norm_cuda"), ("adamw", "amp_C")):
        reason = apex.available(operation, "cuda")
        assert reason
        assert f"lacks its CUDA extensions (No module named '{extension}')" in reason
        assert "APEX_CUDA_EXT=1 pip install" in reason


def test_each_operation_asks_for_its_own_extension(install):
    install(NVIDIA | {"amp_C.py": EXTENSIONS["amp_C.py"]})
    assert apex.available("adamw", "cuda") is None
    assert apex.available("add_norm", "cuda")


@pytest.mark.parametrize("broken", ["apex/__init__.py", "amp_C.py"])
def test_apex_built_for_another_torch(install, broken):
    install(NVIDIA | EXTENSIONS | {broken: "raise ImportError('undefined symbol: _ZN3c10')"})
    reason = apex.available("adamw", "cuda")
    assert reason
    assert "undefined symbol: _ZN3c10" in reason


def test_what_apex_offers(install):
    install(NVIDIA | EXTENSIONS)
    assert [apex.available(operation, "cuda") for operation in ("add_norm", "adamw")] == [None, None]
    assert apex.available("adamw", "cpu") == "apex's kernels need a GPU"
    assert apex.available("predict", "cuda") == "apex's cross-entropy reads all logits at once and cannot sample"
    assert apex.available("embed", "cuda") == "apex has no kernel for embed"
    assert "pieces of the model's" in str(apex.available("lamb", "cuda"))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apex_adamw_is_the_references(install, corrected, dtype):
    install(NVIDIA | EXTENSIONS)
    draw = torch.Generator().manual_seed(0)
    start = [[torch.randn(size, generator=draw) for size in (5, 1025, 3)] for _ in range(2)]
    gradients = [torch.randn(2 * size, generator=draw).to(dtype)[::2] for size in (5, 1025, 3)]
    results = []
    for kernel in (reference_adamw, apex.apex_adamw):
        weights, means = ([tensor.clone() for tensor in tensors] for tensors in start)
        squares = [mean.square() for mean in means]
        steps = [torch.tensor(float(count)) for count in (4, 2, 4)]
        copies = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights]
        rule = AdamWRule(0.05, (0.9, 0.98), 1e-3, 0.1, corrected)
        scale = torch.tensor(0.3) if corrected else None
        kernel([*weights], [*gradients], means, squares, steps, rule, scale, copies)
        assert all(torch.equal(copy, weight.bfloat16()) for copy, weight in zip(copies, weights, strict=True))
        results.append([*weights, *means, *squares, *steps])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert sys.modules["amp_C"].calls == ([3, 5] if corrected else [1])  # one call for each step count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_apex_add_norm_is_the_references(install, dtype, tolerance, probability):
    install(NVIDIA | EXTENSIONS)
    draw = torch.Generator().manual_seed(0)
    x, residual, seen = (torch.randn(2, 5, 12, generator=draw).to(dtype) for _ in range(3))
    parameters = [torch.randn(12, generator=draw) for _ in range(2)]  # fp32 also where x is narrower
    dropout = Dropout(probability, torch.tensor(77)) if probability else None
    results = []
    for add_norm in (reference_add_norm, apex.apex_add_norm):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, *parameters)]
        out = add_norm(*leaves, 1e-2, dropout)
        assert out.dtype == dtype
        (out * seen).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, wanted in zip(results[1], results[0], strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def run_gelu(bias_gelu, dtype, bias_dtype):
    draw = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(3, 5, 24, generator=draw)).to(dtype).requires_grad_()
    bias_F = torch.randn(24, generator=draw).to(bias_dtype).requires_grad_()
    out = bias_gelu(x, bias_F, True)
    assert out.dtype == dtype
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    assert x.grad is not None
    assert bias_F.grad is not None
    return out.detach(), x.grad, bias_F.grad


def assert_gelu_agrees(dtype, bias_dtype, tolerance):
    expected = run_gelu(reference_bias_gelu, dtype, bias_dtype)
    for found, wanted in zip(run_gelu(megatron.megatron_bias_gelu, dtype, bias_dtype), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(
    ("dtype", "bias_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.bfloat16, torch.float32, 3e-2),
    ],
)
def test_megatrons_gelu_is_the_reference_in_tanh_form(dtype, bias_dtype, tolerance):
    with torch.compiler.set_stance("force_eager"):
        assert_gelu_agrees(dtype, bias_dtype, tolerance)


def test_megatrons_gelu_compiled():
    assert_gelu_agrees(torch.float32, torch.float32, 1e-6)


def test_the_tanh_form_is_told_from_the_exact_one():
    x, bias_F = torch.linspace(-3, 3, 24), torch.zeros(24)
    with torch.compiler.set_stance("force_eager"):
        found = megatron.megatron_bias_gelu(x, bias_F, True)
        with pytest.raises(AssertionError, match="tanh form"):
            megatron.megatron_bias_gelu(x, bias_F, False)
    assert (found - F.gelu(x)).abs().max() > 1e-4
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


def test_what_megatron_offers():
    assert megatron.available("bias_gelu", True) is None
    assert "tanh form; the model's is the exact one" in str(megatron.available("bias_gelu", False))
    assert "kernels.backend=apex" in str(megatron.available("add_norm", True))
    assert megatron.available("predict", True) == "Megatron-core has no kernel for predict that fits"


def test_no_megatron(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    assert megatron.available("bias_gelu", True) == "Megatron-core is not installed: pip install megatron-core"


def test_a_broken_megatron(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.fusions.fused_bias_gelu", None)
    megatron._bias_gelu.cache_clear()
    reason = megatron.available("bias_gelu", True)
    megatron._bias_gelu.cache_clear()
    assert reason
    assert reason.startswith("Megatron-core cannot be imported (import of megatron.core.fusions.fused_bias_gelu halted")


def test_megatron_is_imported_at_first_use_quietly_and_without_its_datasets():
    code = """
import sys
from model.kernels import megatron
assert not [name for name in sys.modules if name.startswith("megatron.")]
assert megatron.available("bias_gelu", False)
assert "megatron.core" not in sys.modules
assert megatron.available("bias_gelu", True) is None
assert not [name for name in sys.modules if name.startswith("megatron.core.datasets")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
