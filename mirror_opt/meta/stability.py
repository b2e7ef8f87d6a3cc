r"""The guard: taking more steps than were trained never destroys a model.

A valid distance-generating function makes -g a descent direction in its geometry, so a step that is
too long can always be saved by a shorter one; that is not so for a preconditioner that is not
positive definite. The guard needs one extra pass in all: the candidate's loss and gradient are
those of the next step.

For a candidate phi_c with loss L_c and gradient g_c, from phi with L and g and step size a:

    s = <g, phi_c - phi>,   r = <g_c, phi_c - phi>,   beta = |s - r| / (a |s|)
    accept  iff  L_c <= L + c min(s, 0) + 1e-6 |L| + 1e-10  and g_c is finite

beta estimates the smoothness of the loss relative to h along the step. From the trained horizon
on, an accepted step is followed by a' = min(alpha, a sqrt(1 + theta), gamma / beta) with
theta = a' / a, as in adaptive gradient descent (Malitsky and Mishchenko 2020); a rejected one by
a' = min(a / 2, gamma / beta), but no less than a / 1000: a candidate far out, where the loss
overflows, tells nothing of the smoothness here. Before the horizon the trained step size is left
alone unless a step is rejected, and then halved: good maps live beyond the classical bound there.

The first ``trusted`` steps are accepted whenever they are finite: what was trained may pass through
a higher support loss on its way to a lower query loss, and is left as it was trained.

All of it is written without branches on data, so that it serves a batch of tasks too.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError
from mirror_opt.maps.base import dot
from mirror_opt.meta.inner import InnerLoop, LossFn, Step, moved

__all__ = ["check_guard", "guarded_run"]

_DECREASE = 0.1  # c: the share of the predicted decrease that must come true
_GAMMA = 0.7  # safety factor on 1 / beta
_SHRINK = 1e-3  # of a rejected step, at the most
_RELATIVE_SLACK, _ABSOLUTE_SLACK = 1e-6, 1e-10  # rounding of the loss is not a rise


def _all_finite(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all()


def _select(accept: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple:
    return tuple(torch.where(accept, n, o) for n, o in zip(new, old, strict=True))


def guarded_run(
    inner: InnerLoop,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    steps: int,
    *,
    trusted: int = 0,
    first_order: bool = False,
    slopes: bool = False,
) -> Iterator[Step]:
    """``InnerLoop.run`` with the guard: past the trusted steps the support loss never rises.

    Differentiable through the accepted steps, with the chosen step sizes held constant.
    ``Step.slope`` is that of the candidate, accepted or not.
    """
    tracked = torch.is_grad_enabled() and not first_order

    def evaluate(params: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        with torch.set_grad_enabled(tracked):
            gradient, loss = inner.gradient(params, loss_fn, x, y)
        wide = at_least_float32(loss.dtype)  # sizes and bounds leave half's range
        return gradient, loss.to(wide)

    start = inner.dual_start()
    params = inner.primal_start(x)
    zeta = inner.zero_dual(params)
    yield Step(params)
    gradient, loss = evaluate(params)
    size = torch.ones_like(loss.detach())  # a / alpha
    theta = torch.ones_like(size)
    for k in range(steps):
        alpha = inner.rate(k)
        a = size * alpha
        candidate_zeta = inner.each(moved, zeta, a, gradient)
        candidate = inner.primal(candidate_zeta, start)
        new_gradient, new_loss = evaluate(candidate)
        with torch.no_grad():
            move = tuple(c - p for c, p in zip(candidate, params, strict=True))
            slope, new_slope = (inner.each(dot, g, move) for g in (gradient, new_gradient))
            tiny = torch.finfo(slope.dtype).tiny
            curvature = (slope - new_slope).abs() / (a * slope.abs()).clamp(min=tiny)
            bound = loss + _DECREASE * slope.clamp(max=0)
            bound = bound + _RELATIVE_SLACK * loss.abs() + _ABSOLUTE_SLACK
            accept = torch.isfinite(new_loss) & inner.each(_all_finite, new_gradient)
            if k >= trusted:
                accept = accept & (new_loss <= bound)
            # In units of alpha: gamma / beta, and no limit where beta says nothing.
            limit = _GAMMA / (curvature * alpha).clamp(min=tiny)
            limit = torch.where(torch.isfinite(limit), limit, math.inf)
            shorter = size / 2
            if k + 1 >= inner.horizon:
                grown = torch.minimum(size * torch.sqrt(1 + theta), limit).clamp(max=1)
                theta = torch.where(accept, grown / size, theta.clamp(max=1))
                shrunk = torch.minimum(shorter, limit.clamp(min=_SHRINK * size))
                size = torch.where(accept, grown, shrunk)
            else:
                theta = torch.where(accept, theta, theta.clamp(max=1))
                size = torch.where(accept, size, shorter)
        before = loss
        params = inner.each(_select, accept, candidate, params)
        zeta = inner.each(_select, accept, candidate_zeta, zeta)
        gradient = inner.each(_select, accept, new_gradient, gradient)
        loss = torch.where(accept, new_loss, loss)
        yield Step(params, before, slope if slopes else None, accept)


def check_guard(guard: str | bool) -> str | bool:
    """The guard as it was given; raises InputError for what is none."""
    if guard != "auto" and not isinstance(guard, bool):
        raise InputError(f"Invalid {guard=}: pass 'auto', True or False")
    return guard
