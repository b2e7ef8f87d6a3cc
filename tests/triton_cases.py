"""What the tests of the Triton kernels share: devices, coefficients, closeness to float64."""

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mirror_opt.reference import Units

_CUDA = torch.cuda.is_available()

# The same tests run in the interpreter, and compiled where there is a device (bench/gpu.sh).
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.skipif(_CUDA, reason="kernels are compiled here")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not _CUDA, reason="no CUDA device")]
    ),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def unsynchronised() -> Iterator[None]:
    """Waiting for the device is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_units(count: int, columns: int, generator: torch.Generator) -> Units:
    """w, s, c ``(count, columns)`` float32, with w of either sign and slopes within 1 -+ 0.9."""
    s = torch.rand(count, columns, generator=generator) * 3 + 0.3
    w = (torch.rand(count, columns, generator=generator) * 1.8 - 0.9) / max(count, 1) / s
    return Units(w, s, torch.randn(count, columns, generator=generator))


def rounding(result: Tensor) -> Tensor:
    """How far storing a value may have moved it, in float64."""
    info = torch.finfo(result.dtype)
    # Half a unit in the last place; but the interpreter truncates to bfloat16.
    truncates = result.dtype == torch.bfloat16 and not result.is_cuda
    return (1.01 if truncates else 0.51) * info.eps * result.double().abs() + info.tiny * info.eps


def assert_close(result: Tensor, expected: Tensor, scale: Tensor | float) -> None:
    """Within 2e-6 of the scale, and the rounding of a half precision."""
    assert result.shape == expected.shape
    allowed = 2e-6 * (expected.abs() + scale)
    if result.dtype != torch.float32:
        allowed = allowed + rounding(result)
    error = (result.double() - expected).abs()
    assert bool((error <= allowed).all()), float((error / allowed).max())
