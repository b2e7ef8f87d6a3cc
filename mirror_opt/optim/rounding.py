"""Stochastic rounding to bfloat16."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mirror_opt.optim.sharded import is_sharded, largest, local, meshes, shard_index

__all__ = ["generators", "may_round_to", "round_stochastically"]


def round_stochastically(x: Tensor, generator: Generator | None = None) -> Tensor:
    r"""To bfloat16, up or down with the probabilities that keep the mean.

    A step below half a unit in the last place is lost to rounding to nearest, every time; rounded
    so, it is taken in proportion to its size (Zamirai et al., "Revisiting BFloat16 Training",
    2021). The draws come from ``generator``, or from torch's own for the device.
    """
    # bfloat16 is the upper half of a float32: a uniform draw added to the lower half carries into
    # the upper one with the probability that the lower half stands for.
    bits = x.float().contiguous().view(torch.int32)
    draws = torch.randint(
        1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
    )
    rounded = ((bits + draws) & -(1 << 16)).view(torch.float32).bfloat16()
    # The sum would turn some NaN into a number.
    return torch.where(x.isfinite(), rounded, x.bfloat16())


def may_round_to(x: Tensor, rounded: Tensor) -> Tensor:
    """Whether ``round_stochastically`` may make these bfloat16 of float32 numbers x, entrywise."""
    bits = x.contiguous().view(torch.int32)
    sides = (bits & -(1 << 16), (bits + 0xFFFF) & -(1 << 16))
    down, up = (side.view(torch.float32).bfloat16() for side in sides)
    return (rounded == down) | (rounded == up)


def generators(params: Sequence[Any], slots: Sequence[int]) -> list[Generator | None]:
    """One for each of the parameters at ``slots``, where some of ``params`` are shards.

    Processes that hold the same have to draw the same: so they agree on a single seed, whatever
    each of them has drawn before, and each has streams of its own for its shards only.
    """
    if not any(map(is_sharded, params)):
        return [None] * len(slots)
    drawn = torch.randint(1 << 62, (), device="cpu")
    for mesh in meshes(params):
        drawn = largest(drawn.to(mesh.device_type), mesh)
    seed = int(drawn)
    return [
        Generator(local(params[slot]).device).manual_seed(
            hash((seed, slot, shard_index(params[slot]))) % (1 << 63)
        )
        for slot in slots
    ]
