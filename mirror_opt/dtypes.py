"""Half precision is for storage: what is computed or learned has at least float32."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["at_least_float32", "autocast_devices", "without_autocast"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, and the dtype itself for those that hold more.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def autocast_devices(tensors: Iterable[Tensor]) -> list[str]:
    """The types of devices of the tensors on which autocast is on."""
    return [
        kind
        for kind in {x.device.type for x in tensors}
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]


def without_autocast(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager:
    """No autocast on the devices of these tensors: it would compute products in half precision."""
    stack = contextlib.ExitStack()
    for kind in autocast_devices(tensors):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
