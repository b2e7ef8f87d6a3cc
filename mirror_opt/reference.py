r"""The mathematics of a separable neural mirror map, in plain PyTorch.

Every other implementation is held against this module in float64. One function of one variable,

    psi(u) = u + sum_k w_k [sigma(s_k (u - c_k)) - sigma(-s_k c_k)],        psi(0) = 0,

with widths ``1 / s_k > 0``, centres ``c_k`` and amplitudes ``w_k`` of either sign. sigma is odd,
increasing, bounded by 1 and has slope 1 at 0, so that

    1 - sum_k (w_k s_k)_-  <=  psi'(u)  <=  1 + sum_k (w_k s_k)_+           (slope bounds)
    |psi(u) - u|  <=  W = 2 sum_k |w_k|                                     (bracket of the inverse)

and psi is increasing, hence the derivative of a strongly convex function, whenever the lower slope
bound is positive. The offset ``sigma(-s_k c_k)`` keeps the origin fixed: a displacement of zero has
a dual of zero.

Shapes, throughout: ``u`` is ``(*)``; ``w``, ``s``, ``c`` are ``(K, *)`` with as many dimensions
behind K as u has, and broadcast against ``u[None]``. K leads so that the units of one coordinate do
not break up its rows. ``K = 0`` is the identity. Any floating dtype.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SIGMAS",
    "Sigma",
    "Units",
    "psi",
    "psi_bracket",
    "psi_integral",
    "psi_slope",
    "psi_slope_bounds",
    "psi_units_gradient",
]

# Beyond this argument every sigma is 1 to the last bit of float64, and its square is still finite
# in float32.
_SATURATED = 1e9


class Units(NamedTuple):
    """Coefficients of psi: amplitudes, inverse widths and centres, each of shape ``(K, *)``."""

    w: Tensor
    s: Tensor
    c: Tensor


class Sigma(NamedTuple):
    """An odd, increasing, bounded function with its derivative and its even antiderivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]


def _algebraic(t: Tensor) -> Tensor:
    t = t.clamp(-_SATURATED, _SATURATED)
    return t * torch.rsqrt(1 + t * t)


def _algebraic_slope(t: Tensor) -> Tensor:
    t = t.clamp(-_SATURATED, _SATURATED)
    r = torch.rsqrt(1 + t * t)
    return r * r * r


def _algebraic_integral(t: Tensor) -> Tensor:
    # sqrt(1 + t^2) - 1 without cancellation near 0; |t| far out, where t^2 would overflow.
    inner = t.clamp(-_SATURATED, _SATURATED)
    square = inner * inner
    return square / (1 + torch.sqrt(1 + square)) + (t - inner).abs()


def _tanh_slope(t: Tensor) -> Tensor:
    return 1 - torch.tanh(t).square()


def _tanh_integral(t: Tensor) -> Tensor:
    # log cosh t = log(1 + 2 sinh^2(t / 2)), which does not cancel near 0; far out
    # |t| + log(1 + e^(-2|t|)) - log 2, which does not overflow.
    near = t.clamp(-1, 1)
    inner = torch.log1p(2 * torch.sinh(near / 2).square())
    far = t.abs()
    outer = torch.log1p(torch.exp(-2 * far)) + far - math.log(2)
    return torch.where(t.abs() < 1, inner, outer)


SIGMAS = {
    "algebraic": Sigma(_algebraic, _algebraic_slope, _algebraic_integral),
    "tanh": Sigma(torch.tanh, _tanh_slope, _tanh_integral),
}


def psi(u: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    """psi(u), of the broadcast shape ``(*)``."""
    w, s, c = units
    f = SIGMAS[sigma].value
    return u + (w * (f(s * (u.unsqueeze(0) - c)) - f(-s * c))).sum(0)


def psi_slope(u: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    """psi'(u), of the broadcast shape ``(*)``."""
    w, s, c = units
    return 1 + (w * s * SIGMAS[sigma].slope(s * (u.unsqueeze(0) - c))).sum(0)


def psi_integral(u: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    """The convex function int_0^u psi, of the broadcast shape ``(*)``."""
    w, s, c = units
    f = SIGMAS[sigma]
    rise = f.integral(s * (u.unsqueeze(0) - c)) - f.integral(-s * c)
    return u * u / 2 + (w / s * rise - w * f.value(-s * c) * u.unsqueeze(0)).sum(0)


def psi_units_gradient(u: Tensor, units: Units, sigma: str = "algebraic") -> Units:
    """The partial derivatives of psi(u) in ``w``, ``s`` and ``c``, each of shape ``(K, *)``."""
    w, s, c = units
    f = SIGMAS[sigma]
    t, t0 = s * (u.unsqueeze(0) - c), -s * c
    slope, slope0 = f.slope(t), f.slope(t0)
    return Units(
        f.value(t) - f.value(t0),
        w * ((u.unsqueeze(0) - c) * slope + c * slope0),
        w * s * (slope0 - slope),
    )


def psi_slope_bounds(units: Units) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of psi' over the real line, each of shape ``(*)``."""
    steepness = units.w * units.s
    return 1 + steepness.clamp(max=0).sum(0), 1 + steepness.clamp(min=0).sum(0)


def psi_bracket(units: Units) -> Tensor:
    """W with |psi(u) - u| <= W for every u, of shape ``(*)``."""
    return 2 * units.w.abs().sum(0)
