"""The operators as Triton kernels, on CUDA devices or in Triton's interpreter."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["DEVICES", "describe", "refusal", "unavailable"]

DEVICES = ("cuda",)


@cache
def unavailable() -> str | None:
    """Why Triton cannot be used; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def describe() -> str:
    """The device, or the interpreter."""
    return "interpreter on the CPU" if _interpreted() else torch.cuda.get_device_name()


def refusal(x: Tensor, units: int, sigma: str) -> str | None:
    """Why these operands are not served; None if they are."""
    if x.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices and got a tensor on {x.device}"
    if x.dtype != torch.float32:
        return f"it takes float32 and got {x.dtype}"
    if sigma != "algebraic":
        return f"it has sigma='algebraic' only and got {sigma!r}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
