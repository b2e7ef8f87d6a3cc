"""Stochastic rounding to bfloat16."""

import torch
from torch import Tensor

__all__ = ["round_stochastically"]


def round_stochastically(x: Tensor) -> Tensor:
    r"""float32 to bfloat16, up or down with the probabilities that keep the mean.

    A step below half a unit in the last place is lost to rounding to nearest, every time; rounded
    so, it is taken in proportion to its size (Zamirai et al., "Revisiting BFloat16 Training",
    2021). The draws come from torch's generator for the device.
    """
    # bfloat16 is the upper half of a float32: a uniform draw added to the lower half carries into
    # the upper one with the probability that the lower half stands for.
    bits = x.contiguous().view(torch.int32)
    draws = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + draws) & -(1 << 16)).view(torch.float32).bfloat16()
    # The sum would turn some NaN into a number.
    return torch.where(x.isfinite(), rounded, x.bfloat16())
