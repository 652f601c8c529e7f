"""NVIDIA's apex, its LayerNorm and Adam, built from a source tree where ``APEX_SOURCE`` names one.

The sections that follow find it; what was installed before stays as it was.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from section import CheckFailedError, Context, NotRunError

SOURCE = "APEX_SOURCE"
PACKAGES = "GPU_SUITE_PACKAGES"
"""Environment variable: a folder that the suite's processes import from."""
_TAIL_CHARACTERS = 4000


def run(context: Context) -> None:
    """Builds with pip and without a network, for this GPU alone.

    Raises:
        NotRunError: No GPU, or no source.
        CheckFailedError: The build failed, or took too long.
    """
    if not context.is_cuda:
        raise NotRunError("apex's kernels need a CUDA device")
    source = os.environ.get(SOURCE)
    if not source:
        raise NotRunError(f"{SOURCE} names no source tree of NVIDIA/apex")
    if not (Path(source) / "csrc" / "layer_norm_cuda.cpp").exists():
        raise CheckFailedError(f"{SOURCE}={source} is not NVIDIA/apex: csrc/layer_norm_cuda.cpp is missing")
    import torch

    major, minor = torch.cuda.get_device_capability()
    settings = {"APEX_CPP_EXT": "1", "APEX_CUDA_EXT": "1", "APEX_PARALLEL_BUILD": "8", "MAX_JOBS": "16"}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    try:
        done = subprocess.run(
            [*command, "--target", os.environ[PACKAGES], source],
            env=os.environ | settings | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
            capture_output=True,
            text=True,
            timeout=max(1.0, context.left_s() - 5),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"apex was not built in {error.timeout:.0f} s") from None
    context.results["output_tail"] = (done.stdout + done.stderr)[-_TAIL_CHARACTERS:]
    if done.returncode:
        raise CheckFailedError(f"pip ended with {done.returncode}")


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    return [("apex", "built")] if results.get("output_tail") else []
