"""The modes of a weight, and products along them."""

import math
from collections.abc import Sequence

from torch import Tensor

from mirror_opt.ops.kronecker import LARGEST_MODE

__all__ = ["fused_mode", "mode_product", "mode_sizes"]


def mode_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The modes of a weight: (out, in) or (out, in, k*k); none for vectors and scalars."""
    if len(shape) < 2:
        return ()
    return (*shape[:2], math.prod(shape[2:])) if len(shape) > 2 else tuple(shape)


def mode_product(x: Tensor, factors: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """Multiplies every mode of x by its factor.

    Args:
        x: ``(*B, n_1, ..., n_m)``, m > 1; the leading dimensions broadcast with the factors'.
        factors: m matrices ``(*B, n_l, n_l)``; None leaves a mode as it is.
        transpose: multiply by the transposed factors.

    Returns:
        ``(*B, n_1, ..., n_m)``.
    """
    if transpose:
        factors = [f if f is None else f.mT for f in factors]
    if len(factors) == 3 and factors[1] is not None and x.shape[-2] > 1:
        return _cyclic_product(x, factors)
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        # Every mode product is one batched matrix product that moves nothing: the last mode is
        # multiplied from the right, the one before it from the left, and an earlier one from the
        # left of all that follows it seen as columns.
        behind = len(factors) - 1 - mode
        before = min(mode, len(factors) - 2)  # modes that the product is batched over
        factor = factor.reshape(*factor.shape[:-2], *[1] * before, *factor.shape[-2:])
        if behind == 0:
            x = x @ factor.mT
        elif behind == 1:
            x = factor @ x
        else:
            x = (factor @ x.flatten(-behind)).unflatten(-1, x.shape[-behind:])
    return x


def _cyclic_product(x: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """``mode_product`` of three modes.

    Its product along the middle mode is batched over the first, for which torch.matmul would copy
    the factor. Here each product moves its mode behind the others: one matrix product of what is
    there, transposed in place, and after three all are where they were. Without a factor a mode is
    moved by a view, for which another product copies x once: torch.matmul would copy more.
    """
    for factor in factors:
        behind = x.shape[-2:]
        columns = x.flatten(-2).mT
        x = (columns if factor is None else columns @ factor.mT).unflatten(-2, behind)
    return x


def fused_mode(sizes: Sequence[int]) -> int | None:
    """The mode whose product is fused with the elementwise map.

    The shorter of the first and the last, of those with more than one entry: along these a tensor
    is a batch of matrices. None if there is none with at most ``LARGEST_MODE`` entries.
    """
    longer = [mode for mode, n in enumerate(sizes) if n > 1]
    if not longer:
        return None
    # The last of two alike, whose lines lie in one piece.
    mode = min((longer[-1], longer[0]), key=lambda mode: sizes[mode])
    return mode if sizes[mode] <= LARGEST_MODE else None
