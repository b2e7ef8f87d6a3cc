"""The operators in plain PyTorch, for any device, dtype and sigma; the formulas of gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirror_opt import reference
from mirror_opt.backends.rotation import Rotation
from mirror_opt.backends.step import Step
from mirror_opt.newton import Status, solve_monotone
from mirror_opt.reference import Units

__all__ = [
    "DEVICES",
    "backward",
    "describe",
    "exceeds",
    "forward",
    "inverse",
    "refusal",
    "rotated",
    "step",
    "step_",
    "unavailable",
]

DEVICES = None  # any


def unavailable() -> None:
    """It always is."""


def describe() -> str:
    return "any device"


def refusal(operator: str, x: Tensor, units: int, sigma: str) -> None:
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


def rotated(
    u: Tensor,
    factor: Tensor,
    gain: Tensor,
    w: Tensor,
    s: Tensor,
    c: Tensor,
    eps: float,
    left: bool,
    sigma: str,
) -> Tensor:
    """eps u + sum_t M_t^T S_t(M_t u)."""
    rotation = Rotation(u.shape, factor, gain, (w, s, c), left)
    y = forward(rotation.rotate(u), rotation.gain, *rotation.units, sigma)
    return torch.add(rotation.back(y), u, alpha=eps).contiguous()


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str
) -> tuple[Tensor, Tensor]:
    """S^-1(S(x) - lr g), and the status."""
    return inverse(forward(x, gain, w, s, c, sigma) - lr * g, gain, w, s, c, sigma)


def step_(step: Step) -> None:
    """One mirror step of every parameter in place; see ``ops.separable_step_``."""
    (
        params, grads, lr, gains, ws, ss, cs, buffers, anchors, duals, dual_inits, grad_scale,
        found_inf, status, momentum, weight_decay, nesterov, maximize, primal, sigma,
    ) = step  # fmt: skip
    go = torch.ones_like(status, dtype=torch.bool) if found_inf is None else found_inf == 0
    scale = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale)
    decay = 1 - lr * weight_decay

    def row(tensors: Sequence[Tensor], i: int) -> Any:
        # As (C, n) in the dtype of the coefficients (K, C).
        if not tensors:
            return 0.0
        columns = ws[i].shape[1]
        n = params[i].numel() // max(columns, 1)
        return tensors[i].to(ws[i].dtype).reshape(columns, n)

    for i, param in enumerate(params):
        gain = row(gains, i) if gains else ws[i].new_ones(())
        w, s, c = (x[i].unsqueeze(-1) for x in (ws, ss, cs))
        one = _Map(gain, w, s, c, sigma, torch.zeros_like(status))
        grad_h, grad_h_star = (one.value, one.inverse) if primal else (one.inverse, one.value)
        anchor, z0 = row(anchors, i), row(dual_inits, i)
        d = b = scale * row(grads, i)
        if buffers:
            b = momentum * row(buffers, i) + d
            d = d + momentum * b if nesterov else b
        z = row(duals, i) + z0
        if weight_decay != 0 or not duals:
            x = anchor + grad_h_star(z) if duals else row(params, i)
            z = grad_h(decay * x - anchor)
        z = z - lr * d
        new = [(param, anchor + grad_h_star(z))]
        new += [(buffers[i], b)] if buffers else []
        new += [(duals[i], z - z0)] if duals else []
        new = [(old, x.to(old.dtype).reshape(old.shape)) for old, x in new]
        good = torch.stack([x.isfinite() for _, x in new]).all(0)
        worst = torch.maximum(one.status, (~good).any() * int(Status.NONFINITE))
        status.copy_(torch.where(go, torch.maximum(status, worst), status))
        for old, x in new:
            old.copy_(torch.where(good & go, x, old))


def exceeds(xs: Sequence[Tensor], bound: float) -> Tensor:
    """1 if some ``|x|`` is above the bound or NaN, else 0: 0-dim float32."""
    some = [x for x in xs if x.numel()]  # an empty tensor has no largest entry
    if not some:
        return torch.zeros((), dtype=torch.float32, device=xs[0].device)
    norms = torch._foreach_norm(some, ord=math.inf)
    return (~(torch.stack([x.to(torch.float32) for x in norms]) <= bound)).any().float()


def backward(
    grad: Tensor,
    at: Tensor,
    gain: Tensor,
    w: Tensor,
    s: Tensor,
    c: Tensor,
    sigma: str,
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
    by_w, by_s, by_c = (_sum_to(factor.unsqueeze(0) * p, w.shape) for p in partial)
    return (
        grad_u.contiguous(),
        _sum_to(by_gain, gain.shape),
        by_w,
        by_s,
        by_c,
    )


@dataclass
class _Map:
    """S, with the worst status of its solves so far."""

    gain: Tensor
    w: Tensor
    s: Tensor
    c: Tensor
    sigma: str
    status: Tensor

    def value(self, u: Tensor) -> Tensor:
        return forward(u, self.gain, self.w, self.s, self.c, self.sigma)

    def inverse(self, t: Tensor) -> Tensor:
        y, status = inverse(t, self.gain, self.w, self.s, self.c, self.sigma)
        self.status = torch.maximum(self.status, status)
        return y


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
    return solution.value, status


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    return (x if x.shape == shape else x.sum_to_size(shape)).contiguous()
