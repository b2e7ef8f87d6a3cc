"""Transforms of the gradient that are no mirror maps, kept as baselines."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32
from mirror_opt.maps.base import OwningMap
from mirror_opt.maps.modes import mode_product, mode_sizes
from mirror_opt.maps.registry import register

__all__ = ["MetaCurvature"]


@register("meta-curvature", "learned mode products of the gradient; linear, not a DGF: a baseline")
class MetaCurvature(OwningMap):
    r"""Multiplies each mode of the gradient by a learned matrix (Park and Oliva 2019).

    ``inverse`` maps zeta, minus the scaled sum of gradients, to M_out (x) M_in (x) M_k zeta, and
    multiplies vectors elementwise; all start at the identity. The matrices are free, so the product
    is neither symmetric nor positive definite in general: it is not the gradient of a convex
    function, a step along it may ascend, and there is no ``potential``. ``forward`` solves the
    linear systems.

    Args:
        params: the parameters that it serves, real floating tensors of any shape.

    Raises:
        InputError: ``params`` holds no tensor, or one that is not real floating.
    """

    is_dgf = False
    anchored = True
    forward_is_closed = False

    def __init__(self, params: Iterable[Tensor]):
        params = self._listed(params)
        super().__init__(params)
        self.modes = [mode_sizes(p.shape) for p in params]

        def start(p: Tensor, modes: tuple[int, ...]) -> list[Tensor]:
            options: dict[str, Any] = {"dtype": at_least_float32(p.dtype), "device": p.device}
            if not modes:
                return [torch.ones(p.shape, **options)]
            return [torch.eye(n, **options) for n in modes]

        self.factors: Any = nn.ModuleList(
            nn.ParameterList(nn.Parameter(f) for f in start(p, modes))
            for p, modes in zip(params, self.modes, strict=True)
        )

    def coefficients(self) -> list[tuple[tuple[Tensor, ...], tuple[int, ...]]]:
        return [(tuple(f), modes) for f, modes in zip(self.factors, self.modes, strict=True)]

    def _own_dtype(self, coefficient) -> torch.dtype:
        factors, _ = coefficient
        return factors[0].dtype

    def coupled(self, dims: int) -> tuple[int, ...]:
        return tuple(range(dims))

    def _gradient_conjugate(self, z: Tensor, coefficient) -> Tensor:
        factors, modes = coefficient
        if not modes:
            return factors[0] * z
        return mode_product(z.reshape(modes), factors).reshape(z.shape)

    def _gradient(self, x: Tensor, coefficient) -> Tensor:
        factors, modes = coefficient
        if not modes:
            return x / factors[0]
        inverses = [torch.linalg.inv(f) for f in factors]
        return mode_product(x.reshape(modes), inverses).reshape(x.shape)

    def _potential(self, x: Tensor, coefficient) -> Tensor:
        raise TypeError(
            "MetaCurvature is not the gradient of a function and has no potential: take "
            "KroneckerNeural(units=0), its symmetric positive definite kin"
        )

    def _conjugate(self, z: Tensor, coefficient) -> Tensor:
        raise TypeError("MetaCurvature is not the gradient of a function: it has no conjugate")

    def strong_convexity(self) -> Tensor:
        """0: none."""
        return torch.zeros(())

    def smoothness(self) -> Tensor:
        """inf: none."""
        return torch.tensor(math.inf)
