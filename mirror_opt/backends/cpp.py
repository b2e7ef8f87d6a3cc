"""The operators on the CPU library, whose loops csrc/ holds."""

import torch
from torch import Tensor

from mirror_opt.backends.layout import Rows
from mirror_opt.backends.library import load

__all__ = ["DEVICES", "backward", "describe", "forward", "inverse", "refusal", "step", "unavailable"]

DEVICES = ("cpu",)

_MAX_UNITS = 64  # kMaxUnits


def unavailable() -> str | None:
    """Why the library cannot be used; None if it can."""
    return load("cpu")


def describe() -> str:
    """The instruction set that the library found."""
    return f"CPU, {torch.ops.mirror_opt_cpu.instruction_set('')}"


def refusal(x: Tensor, units: int, sigma: str) -> str | None:
    """Why these operands are not served; None if they are."""
    if x.device.type != "cpu":
        return f"it runs on the CPU and got a tensor on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64 and got {x.dtype}"
    if sigma != "algebraic":
        return f"it has sigma='algebraic' only and got {sigma!r}"
    if units > _MAX_UNITS:
        return f"it takes up to {_MAX_UNITS} units and got {units}"
    return None


def forward(u: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str) -> Tensor:
    rows = Rows(u, gain, (w, s, c))
    return rows.shaped(torch.ops.mirror_opt_cpu.forward(rows.u, rows.gain, *rows.units))


def inverse(
    t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(t, gain, (w, s, c))
    y, status = torch.ops.mirror_opt_cpu.inverse(rows.u, rows.gain, *rows.units)
    return rows.shaped(y), torch.tensor(status, dtype=torch.int32)


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(x, gain, (w, s, c))
    y, status = torch.ops.mirror_opt_cpu.step(
        rows.u, rows.like_u(g), float(lr), rows.gain, *rows.units
    )
    return rows.shaped(y), torch.tensor(status, dtype=torch.int32)


def backward(
    grad: Tensor, at: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(at, gain, (w, s, c))
    grad_u, grad_gain, *units = torch.ops.mirror_opt_cpu.backward(
        rows.like_u(grad), rows.u, rows.gain, *rows.units, inverted
    )
    return (
        rows.shaped(grad_u),
        rows.gain_gradient(grad_gain),
        *(rows.units_gradient(x) for x in units),
    )
