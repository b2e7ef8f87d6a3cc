"""The multi-tensor step on CUDA without a just-in-time compiler; other operators are plain's."""

import torch
from torch import Tensor

from mirror_opt.backends.layout import contiguous, unserved, write_back
from mirror_opt.backends.library import MAX_UNITS, load
from mirror_opt.backends.plain import backward, exceeds, forward, inverse, rotated, step
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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def step_(step: Step) -> None:
    rows = [contiguous(xs) for xs in step.lists]
    lr = step.lr if step.lr.dtype in (torch.float32, torch.float64) else step.lr.float()
    scalars = [
        None if x is None else x.to(step.params[0].device, torch.float32)
        for x in (step.grad_scale, step.found_inf)
    ]
    torch.ops.mirror_opt_cuda.step_(
        *rows[:2], lr, *rows[2:], *scalars, step.status, step.momentum, step.weight_decay,
        step.nesterov, step.maximize, step.primal,
    )  # fmt: skip
    write_back(step, rows)
