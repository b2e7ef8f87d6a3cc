"""The operators in plain PyTorch: any device, any dtype, any sigma, and the formulas of gradients."""

import math

import torch
from torch import Tensor

from mirror_opt import reference
from mirror_opt.newton import Status, solve_monotone
from mirror_opt.reference import Units

__all__ = ["DEVICES", "backward", "describe", "forward", "inverse", "refusal", "step", "unavailable"]

DEVICES = None  # any


def unavailable() -> None:
    """It always is."""


def describe() -> str:
    return "any device"


def refusal(x: Tensor, units: int, sigma: str) -> None:
    """It serves everything."""


def forward(u: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str) -> Tensor:
    """S(u) = gain psi(u)."""
    return (gain * reference.psi(u, Units(w, s, c), sigma)).contiguous()


def inverse(
    t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    """S^-1(t), NaN where the solve failed, and the worst ``newton.Status``, 0-dim int32."""
    y, status = _solve(t / gain, Units(w, s, c), sigma)
    return y.contiguous(), status


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    """S^-1(S(x) - lr g), and the status."""
    return inverse(forward(x, gain, w, s, c, sigma) - lr * g, gain, w, s, c, sigma)


def backward(
    grad: Tensor, at: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in u, gain, w, s and c at u = ``at``; differentiable.

    With ``inverted`` those of S^-1, whose value is ``at``.
    """
    units = Units(w, s, c)
    value, slope = reference.psi(at, units, sigma), reference.psi_slope(at, units, sigma)
    if inverted:
        grad_u = grad / (gain * slope)
        by_gain, factor = -grad_u * value, -grad_u * gain
    else:
        factor = grad * gain
        grad_u, by_gain = factor * slope, grad * value
    partial = reference.psi_units_gradient(at, units, sigma)
    return (
        grad_u.contiguous(),
        _sum_to(by_gain, gain.shape),
        *(_sum_to(factor.unsqueeze(0) * p, w.shape) for p in partial),
    )


def _solve(target: Tensor, units: Units, sigma: str) -> tuple[Tensor, Tensor]:
    if not target.numel():
        return torch.empty_like(target), torch.zeros((), dtype=torch.int32, device=target.device)
    # |psi(y) - y| <= W puts the root in target +- W; a twentieth more, since a saturated root sits
    # on the edge.
    bracket = reference.psi_bracket(units)
    solution = solve_monotone(
        lambda y: (reference.psi(y, units, sigma), reference.psi_slope(y, units, sigma)),
        target,
        target - 1.05 * bracket,
        target + 1.05 * bracket,
        start=target,
        scale=target.abs() + bracket,
    )
    status = torch.tensor(int(solution.status), dtype=torch.int32, device=target.device)
    if solution.status is Status.CONVERGED:
        return solution.value, status
    good = solution.value.isfinite() & (solution.status is Status.NONFINITE)
    return solution.value.where(good, math.nan), status


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    return (x if x.shape == shape else x.sum_to_size(shape)).contiguous()
