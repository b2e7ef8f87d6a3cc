"""The scalars of a step, rates and flags: which may be read on the host, and what is made of them.

Reading one back from an accelerator waits for it, and cuts the graph of a compiled step.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["as_scalar", "either", "is_zero", "reads_freely", "usable_on"]


def reads_freely(tensors: Iterable[Tensor]) -> bool:
    """Whether values of these tensors can be read without waiting or cutting a graph."""
    return not torch.compiler.is_compiling() and all(x.is_cpu for x in tensors)


def as_scalar(lr: float | Tensor, differentiable: bool = False) -> float | Tensor:
    """The rate as a number where it may be read, else as a 0-dim tensor."""
    if not isinstance(lr, Tensor):
        # A product with a tensor is what torch.compile can keep a number a variable for; as an
        # option of an operator it would be a constant, and every new rate compiled again.
        compiling = torch.compiler.is_compiling()
        return lr * torch.ones((), dtype=torch.float64, device="cpu") if compiling else lr
    # A number is faster and rounds as in SGD; a tensor is what autograd can record.
    if reads_freely([lr]) and not (differentiable and lr.requires_grad):
        return lr.item()
    return lr.reshape(())


def is_zero(lr: float | Tensor) -> bool:
    """Whether the rate is known to be 0 without waiting or cutting a graph."""
    if torch.compiler.is_compiling():
        return False  # a comparison would make the rate a constant
    lr = as_scalar(lr)
    return not isinstance(lr, Tensor) and lr == 0


def usable_on(device: torch.device, x: Tensor) -> Tensor:
    """A 0-dim tensor on that device, or on the CPU, whose numbers every device takes."""
    return x if x.is_cpu else x.to(device)


def either(flag: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Not zero where one of two flags (0-dim, as GradScaler's ``found_inf``) is; None: never."""
    if flag is None or other is None:
        return other if flag is None else flag
    return torch.maximum(flag, other.to(flag))
