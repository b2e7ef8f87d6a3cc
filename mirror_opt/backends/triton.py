"""The operators as Triton kernels, on CUDA devices or in Triton's interpreter."""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mirror_opt.backends.layout import Rows, contiguous, unserved
from mirror_opt.backends.library import FROM_SOURCES
from mirror_opt.backends.plain import exceeds
from mirror_opt.backends.step import Step

__all__ = [
    "DEVICES",
    "backward",
    "describe",
    "exceeds",
    "forward",
    "inverse",
    "refusal",
    "rotated",
    "step",
    "step_",
    "unavailable",
]

DEVICES = ("cuda",)


@cache
def unavailable() -> str | None:
    """Why Triton cannot be used; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if find_spec("mirror_opt.kernels") is None:
        return FROM_SOURCES
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def describe() -> str:
    """The device, or the interpreter."""
    return "interpreter on the CPU" if _interpreted() else torch.cuda.get_device_name()


def refusal(operator: str, x: Tensor, units: int, sigma: str) -> str | None:
    """Why these operands are not served; None if they are."""
    if x.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices and got a tensor on {x.device}"
    if operator == "exceeds":
        return None
    dtypes = (torch.float32, *((torch.float16, torch.bfloat16) if operator == "step_" else ()))
    return unserved(x, dtypes, sigma)


def forward(u: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str) -> Tensor:
    rows = Rows(u, gain, (w, s, c))
    return rows.shaped(_kernels().forward(rows.u, rows.gain, *rows.units))


def inverse(
    t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(t, gain, (w, s, c))
    y, status = _kernels().inverse(rows.u, rows.gain, *rows.units)
    return rows.shaped(y), status


def rotated(
    u: Tensor,
    factor: Tensor,
    gain: Tensor,
    w: Tensor,
    s: Tensor,
    c: Tensor,
    eps: float,
    left: bool,
    sigma: str,
) -> Tensor:
    from mirror_opt.kernels import kronecker

    u, *coefficients = contiguous([u, factor, gain, w, s, c])
    return kronecker.rotated(u, *coefficients, eps, left)


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(x, gain, (w, s, c))
    y, status = _kernels().step(rows.u, rows.like_u(g), lr, rows.gain, *rows.units)
    return rows.shaped(y), status


def step_(step: Step) -> None:
    from mirror_opt.kernels import multi_tensor

    multi_tensor.step_(step)


def backward(
    grad: Tensor,
    at: Tensor,
    gain: Tensor,
    w: Tensor,
    s: Tensor,
    c: Tensor,
    sigma: str,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(at, gain, (w, s, c))
    grad_u, grad_gain, w, s, c = _kernels().backward(
        rows.like_u(grad), rows.u, rows.gain, *rows.units, inverted
    )
    return (
        rows.shaped(grad_u),
        rows.gain_gradient(grad_gain),
        rows.units_gradient(w),
        rows.units_gradient(s),
        rows.units_gradient(c),
    )


def _kernels() -> ModuleType:
    # Only when one runs: importing Triton takes a while, and it need not be installed.
    from mirror_opt.kernels import separable

    return separable


def _interpreted() -> bool:
    # As Triton reads it, which is not imported before a kernel runs.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
