"""The operators on the CPU library, whose loops csrc/ holds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirror_opt.backends.layout import Rows, contiguous, unserved, write_back
from mirror_opt.backends.library import MAX_UNITS, load
from mirror_opt.backends.step import Step

__all__ = [
    "DEVICES",
    "attempt",
    "backward",
    "describe",
    "exceeds",
    "forward",
    "inverse",
    "refusal",
    "step",
    "step_",
    "table",
    "unavailable",
]

DEVICES = ("cpu",)

_DTYPES = (torch.float32, torch.float64)
# Operators that compute in float32 what is stored in less.
_STORED = dict.fromkeys(("step_", "exceeds"), (*_DTYPES, torch.float16, torch.bfloat16))


def unavailable() -> str | None:
    """Why the library cannot be used; None if it can."""
    return load("cpu")


def describe() -> str:
    """The instruction set that the library found."""
    return f"CPU, {torch.ops.mirror_opt_cpu.instruction_set('')}"


def refusal(operator: str, x: Tensor, units: int, sigma: str) -> str | None:
    """Why these operands are not served; None if they are."""
    if not x.is_cpu:
        return f"it runs on the CPU and got a tensor on {x.device}"
    return unserved(x, _STORED.get(operator, _DTYPES), sigma, units, MAX_UNITS)


def _on_cpu(value: Any, dtype: torch.dtype) -> Tensor:
    """A tensor there, whatever the default device is."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def forward(u: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str) -> Tensor:
    rows = Rows(u, gain, (w, s, c))
    return rows.shaped(torch.ops.mirror_opt_cpu.forward(rows.u, rows.gain, *rows.units))


def inverse(
    t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(t, gain, (w, s, c))
    y, status = torch.ops.mirror_opt_cpu.inverse(rows.u, rows.gain, *rows.units)
    return rows.shaped(y), _on_cpu(status, torch.int32)


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    rows = Rows(x, gain, (w, s, c))
    y, status = torch.ops.mirror_opt_cpu.step(
        rows.u, rows.like_u(g), float(lr), rows.gain, *rows.units
    )
    return rows.shaped(y), _on_cpu(status, torch.int32)


def step_(step: Step) -> None:
    if step.found_inf is not None and float(step.found_inf):
        return
    rate = float(step.lr)
    scale = -1.0 if step.maximize else 1.0
    if step.grad_scale is not None:
        scale /= float(step.grad_scale)
    rows = [contiguous(xs) for xs in step.lists]
    worst = torch.ops.mirror_opt_cpu.step_(
        *rows, rate, step.momentum, 1 - rate * step.weight_decay, scale, step.nesterov, step.primal
    )
    write_back(step, rows)
    if worst:
        step.status.clamp_(min=worst)


def table(
    gains: Sequence[Tensor], ws: Sequence[Tensor], ss: Sequence[Tensor], cs: Sequence[Tensor]
) -> Tensor:
    """Where the coefficients of a list of parameters are: one tensor, for ``attempt``.

    It holds addresses: who keeps it keeps the tensors, which are contiguous. A row for each
    parameter, so that ``table[slots]`` is that of some of them.
    """
    rows = [
        (*(x.data_ptr() for x in (gain, w, s, c)), *w.shape, gain.numel(), gain.itemsize)
        for gain, w, s, c in zip(gains, ws, ss, cs, strict=True)
    ]
    return _on_cpu(rows, torch.int64)


def attempt(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    anchors: Sequence[Tensor],
    duals: Sequence[Tensor],
    dual_inits: Sequence[Tensor],
    table: Tensor,
    lr: float,
    scale: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    primal: bool,
    bound: float,
) -> int | None:
    """``step_`` where it is sure to succeed, looked at and taken in one call.

    Returns:
        The status; None where the step was not taken and nothing has changed: a tensor is not
        contiguous, has an unexpected dtype or size, or holds a magnitude above the bound, or NaN.
    """
    status = torch.ops.mirror_opt_cpu.attempt.default(
        params, grads, buffers, anchors, duals, dual_inits, table, lr, momentum,
        1 - lr * weight_decay, scale, nesterov, primal, bound,
    )  # fmt: skip
    return None if status < 0 else status


def exceeds(xs: Sequence[Tensor], bound: float) -> Tensor:
    xs = contiguous(xs)
    return _on_cpu(float(torch.ops.mirror_opt_cpu.exceeds(xs, bound)), torch.float32)


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
    grad_u, grad_gain, w, s, c = torch.ops.mirror_opt_cpu.backward(
        rows.like_u(grad), rows.u, rows.gain, *rows.units, inverted
    )
    return (
        rows.shaped(grad_u),
        rows.gain_gradient(grad_gain),
        rows.units_gradient(w),
        rows.units_gradient(s),
        rows.units_gradient(c),
    )
