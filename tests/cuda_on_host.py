"""The CUDA library without a device: its kernel compiled for the CPU (cuda_on_host.cpp)."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirror_opt.backends import cuda

SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def _missing() -> str | None:
    """Why it cannot be used; None once it is loaded."""
    if torch.cuda.is_available():
        return "the library itself is tested here"
    if shutil.which("nvcc") is None:
        return "nvcc, which knows where the headers of CUDA are, is not installed"
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "library.so")
        command = [
            "nvcc", "-std=c++20", "-O1", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA",
            "-shared", "-cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden", str(SOURCE),
            *(f"-I{x}" for x in include_paths()), f"-L{Path(torch.__file__).parent / 'lib'}",
            "-ltorch_cpu", "-o", str(path),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        torch.ops.load_library(path)
    return None


@contextmanager
def installed() -> Iterator[None]:
    """The backend "cuda" takes tensors on the CPU."""
    reason = _missing()
    if reason:
        pytest.skip(reason)
    original = cuda.refusal

    def refusal(operator: str, x: torch.Tensor, units: int, sigma: str) -> str | None:
        there = SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype)
        return original(operator, there, units, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda, "refusal", refusal)
        yield
