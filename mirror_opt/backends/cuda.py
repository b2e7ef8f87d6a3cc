"""The multi-tensor step on CUDA without a just-in-time compiler; other operators are plain's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirror_opt.backends.layout import contiguous, unserved, write_back
from mirror_opt.backends.library import MAX_UNITS, load
from mirror_opt.backends.plain import backward, exceeds, forward, inverse, rotated, step

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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHANGED = (0, 6, 8)  # of the lists of step_: parameters, momentum, dual state


def unavailable() -> str | None:
    """Why the library cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return load("cuda")


def describe() -> str:
    """The device."""
    return f"{torch.cuda.get_device_name()}: the step of a list; other operators in plain PyTorch"


def refusal(operator: str, x: Tensor, units: int, sigma: str) -> str | None:
    """Why these operands are not served; None if they are."""
    if x.device.type != "cuda":
        return f"it runs on CUDA devices and got a tensor on {x.device}"
    if operator != "step_":
        return None
    return unserved(x, _DTYPES, sigma, units, MAX_UNITS)


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Tensor,
    gains: Sequence[Tensor],
    ws: Sequence[Tensor],
    ss: Sequence[Tensor],
    cs: Sequence[Tensor],
    buffers: Sequence[Tensor],
    anchors: Sequence[Tensor],
    duals: Sequence[Tensor],
    dual_inits: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    status: Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    primal: bool,
    sigma: str,
) -> None:
    lists = (params, grads, gains, ws, ss, cs, buffers, anchors, duals, dual_inits)
    rows = [contiguous(xs) for xs in lists]
    lr = lr if lr.dtype in (torch.float32, torch.float64) else lr.float()
    scalars = [
        None if x is None else x.to(params[0].device, torch.float32)
        for x in (grad_scale, found_inf)
    ]
    torch.ops.mirror_opt_cuda.step_(
        *rows[:2], lr, *rows[2:], *scalars, status, momentum, weight_decay, nesterov, maximize,
        primal,
    )  # fmt: skip
    write_back([lists[i] for i in _CHANGED], [rows[i] for i in _CHANGED])
