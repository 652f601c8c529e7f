"""Which backend runs each operation, why, and what becomes of one that is absent or broken.

A backend that works is stood in for by the reference under another name; ``test_triton_in_its_interpreter`` has a real
one.
"""

import subprocess
import sys

import pytest
import torch

from model.kernels import select, selfcheck
from model.kernels.select import FASTEST, OPERATIONS, Kernels, UnusableBackendError, select_kernels, table
from tests.conftest import clean_environment


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Another file of this process may have asked for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    select._broken.cache_clear()
    yield
    select._broken.cache_clear()


@pytest.fixture
def triton_works(monkeypatch):
    """As on a GPU that it works on; returns the functions, for tests to break some."""
    functions = {operation: backends["reference"] for operation, backends in OPERATIONS.items()}

    def find(operation, backend):
        return functions[operation] if backend == "triton" else OPERATIONS[operation][backend]

    monkeypatch.setattr(select, "_why_not_triton", lambda device: None)
    monkeypatch.setattr(select, "find", find)
    monkeypatch.setitem(FASTEST, "cpu", dict.fromkeys(OPERATIONS, ("triton", "predicted: fast")))
    return functions


@pytest.mark.parametrize(("backend", "chosen"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")])
def test_the_backend_that_is_chosen_is_named_with_a_reason(backend, chosen):
    kernels = select_kernels(backend)
    assert set(OPERATIONS) == {"attention", "add_norm", "bias_gelu", "embed", "predict", "detect", "adamw"}
    for operation, backends in OPERATIONS.items():
        assert getattr(kernels, operation) is backends[chosen]
        assert backends["reference"] is not backends["torch"]
        assert kernels.reasons[operation].startswith("Triton" if backend == "auto" else f"kernels.backend={backend}")
    assert kernels.names == dict.fromkeys(OPERATIONS, chosen)
    assert kernels.warnings == ()


@pytest.mark.parametrize("device", FASTEST)
def test_auto_has_a_backend_for_every_operation_and_it_exists(device):
    assert FASTEST[device].keys() == OPERATIONS.keys()
    for operation, (backend, ground) in FASTEST[device].items():
        assert backend in select.backends_of(operation)
        assert ground.startswith(("measured: ", "predicted: ", "Triton and apex need"))


def test_every_backend_of_the_table_can_be_found_or_says_why_not():
    rows = table("cpu", approximate_gelu=True)
    assert len(rows) == len({row[:2] for row in rows}) == 2 * len(OPERATIONS) + 10
    for operation, backend, state in rows:
        assert backend in select.backends_of(operation)
        if backend in ("reference", "torch"):
            assert state == "works"
            assert callable(select.find(operation, backend))
        if backend == "triton":
            assert "need a GPU" in state
    assert operation_of(Kernels) == set(OPERATIONS)


def operation_of(kind):
    return set(kind.__dataclass_fields__) - {"names", "reasons", "warnings"}


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("triton", "need a GPU, or TRITON_INTERPRET=1"),
        ("apex", "git clone https://github.com/NVIDIA/apex"),
        ("megatron", "tanh form; the model's is the exact one"),
    ],
)
def test_a_backend_that_is_asked_for_and_cannot_run_is_refused_with_what_to_do(backend, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UnusableBackendError, match=f"^kernels.backend={backend} does not work here: ") as refused:
        select_kernels(backend)
    assert says in str(refused.value)


def test_another_projects_apex_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UnusableBackendError, match="another project of that name, not NVIDIA's"):
        select_kernels("apex")


def test_megatron_has_the_tanh_form_alone_and_auto_the_rest():
    with torch.compiler.set_stance("force_eager"):
        kernels = select_kernels("megatron", approximate_gelu=True)
    assert kernels.names == dict.fromkeys(OPERATIONS, "torch") | {"bias_gelu": "megatron"}
    assert kernels.reasons["bias_gelu"] == "kernels.backend=megatron"
    assert kernels.reasons["embed"].endswith("need a GPU; megatron has no embed")


def test_what_a_run_began_with_is_kept():
    kept = dict.fromkeys(OPERATIONS, "torch") | {"attention": "reference"}
    kernels = select_kernels("auto", kept=kept)
    assert kernels.names == kept
    assert kernels.reasons["attention"] == kernels.reasons["embed"] == "kept from the run's first attempt"
    assert select_kernels("torch", kept=kept).names["attention"] == "torch"  # what is asked for goes first
    assert select_kernels("auto", kept={"attention": "reference"}).names == kept  # stored before there were others


@pytest.mark.parametrize("stored", ["triton", "gone"])
def test_what_a_run_began_with_and_is_there_no_more_is_warned_of(stored):
    kernels = select_kernels("auto", kept={"attention": stored})
    problem = "gone has no attention" if stored == "gone" else select.why_not("attention", "triton", "cpu")
    assert kernels.names["attention"] == "torch"
    assert kernels.reasons["attention"] == f"Triton and apex need a GPU; {problem}"
    assert kernels.warnings == (f"attention runs on torch: {problem}",)


def test_auto_takes_what_agrees_with_the_reference(triton_works):
    kernels = select_kernels()
    assert kernels.names == dict.fromkeys(OPERATIONS, "triton")
    assert set(kernels.reasons.values()) == {"predicted: fast"}
    assert kernels.warnings == ()


def raises(*_):
    raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")


@pytest.mark.parametrize(
    ("operation", "broken", "says"),
    [
        ("bias_gelu", raises, "raises RuntimeError: PTX was compiled with an unsupported toolchain)"),
        ("bias_gelu", lambda x, bias, approximate: torch.relu(x + bias), "output: off by "),
        ("bias_gelu", lambda x, bias, _: x * torch.nan, "appears to not have been used in the graph"),
        ("bias_gelu", lambda x, bias, _: torch.nn.functional.gelu(x + bias) * torch.nan, "off by nan"),
        ("bias_gelu", lambda x, bias, _: torch.nn.functional.gelu(x + bias).double(), "output: torch.float64"),
        (
            "bias_gelu",
            lambda x, bias, _: torch.nn.functional.gelu(x + bias.detach() + 0 * bias),
            "gradient 1: off by 1.0e+00 of the largest value in torch.float32",
        ),
        ("add_norm", lambda *x: OPERATIONS["add_norm"]["reference"](*x[:-1], None), "off by "),
        ("attention", lambda qkv, packing, _: OPERATIONS["attention"]["reference"](qkv, packing, None), "off by "),
        ("embed", lambda *x: OPERATIONS["embed"]["reference"](*x[:-1], None), "off by "),
        ("adamw", lambda *x: None, "weight: off by "),
    ],
)
def test_a_broken_kernel_is_not_taken_and_refused_where_it_is_asked_for(triton_works, operation, broken, says):
    triton_works[operation] = broken
    kernels = select_kernels()
    assert kernels.names == dict.fromkeys(OPERATIONS, "triton") | {operation: "torch"}
    (warning,) = kernels.warnings
    assert warning.startswith(f"{operation} runs on torch: triton's {operation} fails its comparison with the ref")
    assert says in warning
    assert warning.partition(": ")[2] in kernels.reasons[operation]
    with pytest.raises(UnusableBackendError, match=f"triton's {operation} fails its comparison"):
        select_kernels("triton")


def test_other_samples_are_noticed(triton_works):
    def skewed(*arguments):
        found = OPERATIONS["predict"]["reference"](*arguments)
        return type(found)(found.loss, found.nll_N, found.is_correct_N, found.sampled_N + 1)

    triton_works["predict"] = skewed
    assert "sampled_N: 100 % are others" in select_kernels().warnings[0]


def test_a_kernel_that_fails_in_half_precision_alone_is_noticed(triton_works):
    def narrow(logits_BT, *others):
        assert logits_BT.dtype == torch.float32, "no such instruction"
        return OPERATIONS["detect"]["reference"](logits_BT, *others)

    triton_works["detect"] = narrow
    assert select_kernels().names["detect"] == "triton"
    assert "no such instruction" in select_kernels(dtype=torch.bfloat16).warnings[0]


def test_a_backend_that_cannot_be_imported_is_not_taken(triton_works, monkeypatch):
    found = select.find

    def find(operation, backend):
        if (operation, backend) == ("embed", "triton"):
            raise ImportError("libtriton.so: wrong ELF class")
        return found(operation, backend)

    monkeypatch.setattr(select, "find", find)
    kernels = select_kernels()
    assert kernels.names["embed"] == "torch"
    assert kernels.warnings == (
        "embed runs on torch: triton cannot be imported (libtriton.so: wrong ELF class)",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", selfcheck._TOLERANCE, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("approximate", [False, True])
def test_torchs_own_would_pass_and_torchs_generator_stays_as_it_is(operation, dtype, approximate):
    before = torch.get_rng_state()
    assert selfcheck.deviation(operation, OPERATIONS[operation]["torch"], "cpu", dtype, approximate) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", selfcheck._TOLERANCE, ids=str)
@pytest.mark.parametrize("operation", ["add_norm", "bias_gelu", "detect"])
def test_the_rows_of_a_gpu_overflow_in_no_precision(operation, dtype, monkeypatch):
    monkeypatch.setattr(selfcheck.Draw, "rows", 1 << 16)
    check, reference = selfcheck._CHECKS[operation]
    found = check(reference, selfcheck.Draw(torch.Generator().manual_seed(1), "cpu", dtype, 64, False))
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() > 0, name


def test_triton_in_its_interpreter():
    """Every operation, in a process of its own: what a kernel is, is settled when it is defined."""
    code = """
import torch
from model.kernels.select import OPERATIONS, select_kernels
for dtype in (torch.float32, torch.float16):
    kernels = select_kernels("triton", dtype=dtype)
    assert kernels.names == dict.fromkeys(OPERATIONS, "triton"), kernels.names
    assert set(kernels.reasons.values()) == {"kernels.backend=triton"}
    assert kernels.attention.__module__ == "model.kernels.attention_triton"

from model.kernels import embedding_triton, selfcheck

class Nothing:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None

embedding_triton._sum_crossing_runs = Nothing()
found = selfcheck.deviation("embed", kernels.embed, "cpu", torch.float32, False)
assert found.startswith("gradient 0: off by"), found
"""
    environment = clean_environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", selfcheck._TOLERANCE, ids=str)
def test_auto_finds_nothing_broken_on_this_gpu(dtype):
    kernels = select_kernels("auto", "cuda", dtype=dtype)
    assert kernels.warnings == ()
    assert select_kernels("triton", "cuda", dtype=dtype).names == dict.fromkeys(OPERATIONS, "triton")
