"""The solver behind the inverse of a mirror map that couples entries.

``solve_convex`` is Newton's method with conjugate gradients for the gradient of a strongly convex
function of many variables; ``implicit_convex`` gives its result derivatives of every order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mirror_opt.newton import (
    NewtonError,
    Solution,
    Status,
    check_forward_mode,
    default_tolerance,
)
from mirror_opt.untraced import untraced

__all__ = ["convex_scale", "convex_tolerance", "implicit_convex", "solve_convex"]


def convex_tolerance(dtype: torch.dtype) -> float:
    """Of ``solve_convex``: the residual that it leaves, relative to ``convex_scale``."""
    return 8 * default_tolerance(dtype)


def convex_scale(norm: Tensor, at_zero: Tensor, at_root: Tensor) -> Tensor:
    """What the residual of a solve of f(y) = target is measured against, by what is added up in f.

    Args:
        norm: of the target.
        at_zero, at_root: bounds on the norm of what is added up in f(0) and in f(y), and may
            cancel: its rounding stays however small f(y) is.
    """
    # What grows with y counts up to a bound only: beyond it no digit of y would be right.
    most = norm * torch.finfo(norm.dtype).eps ** -0.25
    return torch.maximum(norm + at_zero, torch.minimum(norm + at_root, most))


def _dot(x: Tensor, y: Tensor) -> float:
    # In float32 the square of a norm leaves its range from 1e19 on, and below 1e-23.
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64
    return float((x.to(wide) * y.to(wide)).sum())


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _norm(x: Tensor) -> float:
    size = _largest(x)
    if size == 0 or not math.isfinite(size):
        return size
    scaled = x / size
    return size * math.sqrt(_dot(scaled, scaled))


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, relative: float
) -> tuple[Tensor, bool]:
    """x with ``|product(x) - b| <= relative |b|`` for a symmetric positive definite product.

    And whether it is, rather than as close as that many iterations came.
    """
    size = _largest(b)
    if size == 0:
        return torch.zeros_like(b), True
    # On the scale of one, where squares stay in range and subnormal numbers have all their digits.
    x = torch.zeros_like(b)
    b = b / size
    r, p = b.clone(), b.clone()
    rr = _dot(r, r)
    stop = relative * relative * rr
    for _ in range(10 * b.numel()):
        if not rr > stop:
            break
        ap = product(p)
        step = rr / _dot(p, ap)
        x, r = x + step * p, r - step * ap
        rr, previous = _dot(r, r), rr
        p = r + (rr / previous) * p
    return x * size, rr <= stop


@untraced
@torch.no_grad()
def _solve_linear(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """The x with product(x) = b; NaN where b is not finite, as a gradient that diverged may be."""
    if not bool(torch.isfinite(b).all()):
        return torch.full_like(b, math.nan)
    x, converged = _conjugate_gradients(product, b, 8 * default_tolerance(b.dtype))
    if not converged:
        raise NewtonError(Status.MAX_ITERATIONS)
    return x


@untraced  # a loop that asks numbers: traced, each of its lines would be a graph
@torch.no_grad()
def solve_convex(
    f: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Callable[[Tensor], Tensor]],
    potential: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    summed: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
    max_iterations: int = 50,
) -> Solution:
    r"""Solves f(y) = target for the gradient f, f(0) = 0, of a strongly convex ``potential``.

    Damped Newton on the convex function ``potential(y) - <target, y>``: each direction solves
    J(y) d = target - f(y) by conjugate gradients on the symmetric positive definite Jacobian,
    matrix-free, and is halved until the function falls (Armijo, constant 1e-4) or the residual
    does.

    Args:
        f: the gradient; takes and returns ``(*)``.
        jacobian: ``jacobian(y)`` is the function v -> J(y) v.
        potential: a 0-dim tensor for ``y``.
        target: ``(*)``, float32 or float64.
        summed: the norm of what is added up in f(y), and may cancel, one element.
        tolerance: stop when |f(y) - target| <= tolerance ``convex_scale(|target|, summed(0),
            summed(y))``; ``convex_tolerance`` when None.
        max_iterations: Newton steps.
    """
    if not bool(torch.isfinite(target).all()):
        return Solution(target, Status.NONFINITE, 0, math.inf)
    tolerance = convex_tolerance(target.dtype) if tolerance is None else tolerance
    norm = _norm(target)
    y = torch.zeros_like(target)
    if not math.isfinite(norm):
        return Solution(y, Status.NONFINITE, 0, math.inf)
    if norm == 0:  # f(0) = 0, and there is no scale to measure a rounding error of f against
        return Solution(y, Status.CONVERGED, 0, 0.0)
    residual = target - f(y)
    size = _norm(residual)

    at_zero = summed(y) if summed else None

    def whole() -> float:
        if summed is None or at_zero is None:
            return norm
        return float(convex_scale(at_zero.new_tensor(norm), at_zero, summed(y)))

    iterations = 0
    while size > 0 and iterations < max_iterations:
        iterations += 1
        # One full step more once the target's own tolerance is met, kept if it helps: its error is
        # squared, and the answer then is as good as f can be evaluated.
        polished = size <= tolerance * norm
        # Solving the inner system no better than the outer residual asks keeps the quadratic
        # order of Newton's method at a fraction of the products (inexact Newton).
        forcing = min(0.1, size / norm)
        direction, _ = _conjugate_gradients(jacobian(y), residual, forcing)
        slope, here = _dot(residual, direction), float(potential(y)) - _dot(target, y)
        step = 1.0
        while step > 1e-10:
            candidate = y + step * direction
            new_residual = target - f(candidate)
            new_size = _norm(new_residual)
            fall = here - (float(potential(candidate)) - _dot(target, candidate))
            if polished or fall >= 1e-4 * step * slope or new_size < size:
                break
            step /= 2
        else:
            break  # no way further down
        # Within the whole tolerance a step that does not help has met the rounding of f.
        if not new_size < size and size <= tolerance * whole():
            break
        y, residual, size = candidate, new_residual, new_size
        if polished:
            break
    relative = size / whole()
    status = Status.CONVERGED if relative <= tolerance else Status.MAX_ITERATIONS
    return Solution(y, status, iterations, relative)


class _Root(torch.autograd.Function):
    r"""The y with f(y, *theta) = target, for an f whose Jacobian J = d_y f is symmetric.

    Implicit differentiation (Blondel et al. 2022): with q = J^-1 dL/dy,

        dL/dtarget = q,   dL/dtheta = -q d_theta f(y, theta),

    and in forward mode dy = J^-1 (dtarget - d_theta f(y, theta) dtheta). Both are such roots too,
    those of v -> J(y, theta) v. So they consist of differentiable operations, and every order is
    right.
    """

    @staticmethod
    def forward(solve: Callable, f: Callable, jacobian: Callable, target: Tensor, *theta: Tensor):
        return solve(target, *theta)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.f, ctx.jacobian, _, *theta = inputs
        ctx.save_for_backward(output, *theta)
        ctx.save_for_forward(output, *theta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, *theta = ctx.saved_tensors
        q = _Root._linear(ctx.jacobian, grad, y, *theta)
        if not any(ctx.needs_input_grad[4:]):
            return None, None, None, q, *(None for _ in theta)
        pull = torch.func.vjp(lambda *theta: ctx.f(y, *theta), *theta)[1]
        return None, None, None, q, *pull(-q)

    @staticmethod
    def jvp(ctx, _solve, _f, _jacobian, d_target: Tensor | None, *d_theta: Tensor | None):
        y, *theta = ctx.saved_tensors
        b = torch.zeros_like(y) if d_target is None else d_target
        if any(d is not None for d in d_theta):
            # Along the tangents by reverse mode twice: the levels of forward mode do not nest.
            pull = torch.func.vjp(lambda *theta: ctx.f(y, *theta), *theta)[1]
            push = torch.func.vjp(pull, torch.zeros_like(y))[1]
            pairs = zip(d_theta, theta, strict=True)
            along = tuple(torch.zeros_like(x) if d is None else d for d, x in pairs)
            b = b - push(along)[0]
        return _Root._linear(ctx.jacobian, b, y, *theta)

    @staticmethod
    def _linear(jacobian: Callable, b: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
        """The v with J(y, theta) v = b."""
        return _Root.apply(
            lambda b, y, *theta: _solve_linear(jacobian(y, *theta), b),
            lambda v, y, *theta: jacobian(y, *theta)(v),
            lambda v, y, *theta: jacobian(y, *theta),
            b,
            y,
            *theta,
        )


def implicit_convex(
    f: Callable[..., Tensor],
    jacobian: Callable[..., Callable[[Tensor], Tensor]],
    potential: Callable[..., Tensor],
    target: Tensor,
    *theta: Tensor,
    summed: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The y with f(y, *theta) = target, differentiable to any order in target and theta.

    Args:
        f, jacobian, potential, summed: as for ``solve_convex``, with ``*theta`` behind their
            argument; pure functions, all but the last made of differentiable operations.
        target: ``(*)``, float32 or float64.
        theta: every tensor that f depends on; in others there is no gradient.

    Raises:
        NewtonError: the solve did not converge, or ``target`` is not finite; in backward, the
            linear solve did not converge.
    """

    def solve(target: Tensor, *theta: Tensor) -> Tensor:
        return solve_convex(
            lambda y: f(y, *theta),
            lambda y: jacobian(y, *theta),
            lambda y: potential(y, *theta),
            target,
            summed=(lambda y: summed(y, *theta)) if summed else None,
        ).unwrap()

    check_forward_mode()
    return _Root.apply(solve, f, jacobian, target, *theta)
