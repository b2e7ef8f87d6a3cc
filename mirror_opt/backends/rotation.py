r"""How the map between a change of basis and back sees its operands: as those of a separable map.

    out = eps u + sum_t M_t^T S_t(M_t u)

u is ``(members, h, w)``: matrices whose rows (``left``: M u) or columns (u M^T) the factors
``(P, T, n, n)`` mix. Member m has the coefficients m % P; gain is ``(P, T, h, w)``, and w, s and c
are ``(K, P, T, C)``, where row i of M u has those of channel i // (h / C).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirror_opt.reference import Units

__all__ = ["LARGEST_MODE", "Rotation"]

LARGEST_MODE = 128
"""The largest n. A longer line of a tensor leaves no room on a multiprocessor for enough others."""


class Rotation:
    """The change of basis of one call.

    Attributes:
        gain: ``(1, P, T, C, h / C, w)``, as ``rotate`` shapes its results.
        units: ``(K, 1, P, T, C, 1, 1)``.
    """

    def __init__(
        self, shape: torch.Size, factor: Tensor, gain: Tensor, units: Sequence[Tensor], left: bool
    ):
        (members, h, w), period, channels = shape, len(factor), units[0].shape[-1]
        self._shape, self._factor, self._left = shape, factor, left
        self._grouped = (members // period, period, 1, h, w)
        self._rows = (channels, h // channels)
        self.gain = gain.unflatten(-2, self._rows).unsqueeze(0)
        self.units = Units(*(x[:, None, ..., None, None] for x in units))

    def rotate(self, x: Tensor) -> Tensor:
        """M_t x for every t: ``(members / P, P, T, C, h / C, w)``."""
        x = x.reshape(self._grouped)
        v = self._factor @ x if self._left else x @ self._factor.mT
        return v.unflatten(-2, self._rows)

    def back(self, v: Tensor) -> Tensor:
        """sum_t M_t^T v_t, shaped as u."""
        v = v.flatten(-3, -2)
        x = self._factor.mT @ v if self._left else v @ self._factor
        return x.sum(2).reshape(self._shape)

    def factor_gradient(self, v: Tensor, x: Tensor) -> Tensor:
        """The gradient of sum_t <v_t, M_t x> = <sum_t M_t^T v_t, x> in M: ``(P, T, n, n)``."""
        x, v = x.reshape(self._grouped), v.flatten(-3, -2)
        return (v @ x.mT if self._left else v.mT @ x).sum(0)
