r"""The solvers behind the inverse of a mirror map.

``solve_monotone`` is the safeguarded scalar Newton method, elementwise over a tensor: a bracket
that always holds the root, a Newton step inside it, a bisection when the step leaves it or does not
shrink the residual fast enough. It converges for every increasing function, so a failure means
non-finite input or a tolerance below what the dtype can resolve.

``solve_convex`` is Newton's method with conjugate gradients for the gradient of a strongly convex
function of many variables; ``implicit_convex`` gives its result first derivatives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "NewtonError",
    "Solution",
    "Status",
    "implicit_convex",
    "solve_convex",
    "solve_monotone",
]


class Status(IntEnum):
    """How a solve ended. The larger, the worse."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NONFINITE = 2

    @property
    def message(self) -> str:
        """What the status means for the caller and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the residual is within the tolerance",
    Status.MAX_ITERATIONS: (
        "the residual is still above the tolerance at the iteration limit: raise max_iterations, "
        "or the tolerance if it is below what the dtype resolves"
    ),
    Status.NONFINITE: (
        "the input holds NaN or Inf: look for a diverged loss, lower the learning rate, "
        "or skip the step"
    ),
}


class NewtonError(ArithmeticError):
    """A solve whose result may not be used. ``status`` says why."""

    def __init__(self, status: Status):
        super().__init__(f"inverse of the mirror map, {status.name}: {status.message}")
        self.status = status


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        value: the root, shaped as the target.
        status: the worst ``Status`` over all elements.
        iterations: Newton steps or bisections taken by the slowest element.
        residual: the largest ``|f(value) - target|`` relative to the scale of the tolerance.
    """

    value: Tensor
    status: Status
    iterations: int
    residual: float

    def unwrap(self) -> Tensor:
        """The root; raises ``NewtonError`` unless the solve converged."""
        if self.status is not Status.CONVERGED:
            raise NewtonError(self.status)
        return self.value


def _default_tolerance(dtype: torch.dtype) -> float:
    # A few units in the last place: what evaluating psi once more could change.
    return 8 * torch.finfo(dtype).eps


def solve_monotone(
    f: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    start: Tensor | None = None,
    scale: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> Solution:
    r"""Solves f(y) = target elementwise for an increasing f with a root in [lower, upper].

    Args:
        f: returns ``(f(y), f'(y))`` for ``y`` shaped as ``target``.
        target: ``(*)``, float32 or float64.
        lower, upper: ``(*)``, the bracket; widened by a few units in the last place, because
            rounding could put a root that sits on an edge outside.
        start: warm start, ``(*)``, clamped to the bracket; the middle of the bracket when None.
        scale: ``(*)``; |target| when None. An element has converged when
            |f(y) - target| <= tolerance * scale, or when its bracket is down to neighbouring
            floats.
        tolerance: a few units in the last place of the dtype when None.
        max_iterations: the limit after which the status is ``MAX_ITERATIONS``.
    """
    tolerance = _default_tolerance(target.dtype) if tolerance is None else tolerance
    scale = target.abs() if scale is None else scale
    eps, tiny = torch.finfo(target.dtype).eps, torch.finfo(target.dtype).tiny
    lower = lower - 4 * eps * lower.abs() - tiny
    upper = upper + 4 * eps * upper.abs() + tiny
    y = lower + (upper - lower) / 2 if start is None else torch.clamp(start, lower, upper)
    finite = torch.isfinite(target)
    y = torch.where(finite, y, target)
    value, slope = f(y)
    residual = value - target
    previous = torch.full_like(target, math.inf)
    bisected = torch.zeros_like(finite)
    converged = ~(residual.abs() > tolerance * scale)
    iterations = 0
    while iterations < max_iterations and not bool(converged.all()):
        iterations += 1
        lower = torch.where(residual < 0, y, lower)
        upper = torch.where(residual > 0, y, upper)
        newton = y - residual / slope
        # Newton can cycle inside the bracket: after a step that did not halve the residual,
        # bisect once.
        trusted = bisected | (residual.abs() <= previous.abs() / 2)
        trusted &= (newton > lower) & (newton < upper)
        candidate = torch.where(trusted, newton, lower + (upper - lower) / 2)
        candidate = torch.where(converged, y, candidate)  # who has converged stays
        value, slope = f(candidate)
        y, bisected, previous = candidate, ~trusted, residual
        residual = value - target
        # Neighbouring floats: a steep f cannot come closer to the target. A NaN residual counts as
        # done too, since it never improves; the status tells.
        narrow = upper - lower <= 4 * eps * y.abs() + tiny
        converged = narrow | ~(residual.abs() > tolerance * scale)
    relative = residual.abs() / (scale + tiny)
    if not bool(torch.isfinite(relative).all()) or not bool(finite.all()):
        status = Status.NONFINITE
    elif not bool(converged.all()):
        status = Status.MAX_ITERATIONS
    else:
        status = Status.CONVERGED
    worst = float(relative.max()) if relative.numel() else 0.0
    return Solution(y, status, iterations, worst)


def _dot(x: Tensor, y: Tensor) -> float:
    # In float32 the square of a norm leaves its range from 1e19 on, and below 1e-23.
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64
    return float((x.to(wide) * y.to(wide)).sum())


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, relative: float, limit: int
) -> Tensor:
    """x with ``|product(x) - b| <= relative |b|``, for a symmetric positive definite product."""
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = _dot(r, r)
    stop = relative * relative * rr
    for _ in range(limit):
        if rr <= stop:
            break
        ap = product(p)
        step = rr / _dot(p, ap)
        x, r = x + step * p, r - step * ap
        rr, previous = _dot(r, r), rr
        p = r + (rr / previous) * p
    return x


@torch.compiler.disable  # a loop that asks numbers: traced, each of its lines would be a graph
@torch.no_grad()
def solve_convex(
    f: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Callable[[Tensor], Tensor]],
    potential: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int = 50,
) -> Solution:
    r"""Solves f(y) = target for the gradient f, f(0) = 0, of a strongly convex ``potential``.

    Damped Newton on the convex function potential(y) - <target, y>: each direction solves
    J(y) d = target - f(y) by conjugate gradients on the symmetric positive definite Jacobian,
    matrix-free, and is halved until the function falls (Armijo, constant 1e-4) or the residual
    does.

    Args:
        f: the gradient; takes and returns ``(*)``.
        jacobian: ``jacobian(y)`` is the function v -> J(y) v.
        potential: a 0-dim tensor for ``y``.
        target: ``(*)``, float32 or float64.
        tolerance: stop when |f(y) - target| <= tolerance |target|; 64 units in the last place
            when None.
        max_iterations: Newton steps.
    """
    if not bool(torch.isfinite(target).all()):
        return Solution(target, Status.NONFINITE, 0, math.inf)
    tolerance = 8 * _default_tolerance(target.dtype) if tolerance is None else tolerance
    norm = math.sqrt(_dot(target, target))
    y = torch.zeros_like(target)
    if not math.isfinite(norm):
        return Solution(y, Status.NONFINITE, 0, math.inf)
    if norm == 0:  # f(0) = 0, and there is no scale to measure a rounding error of f against
        return Solution(y, Status.CONVERGED, 0, 0.0)
    residual = target - f(y)
    size = math.sqrt(_dot(residual, residual))
    iterations = 0
    polished = False
    while not (size <= tolerance * norm and polished) and iterations < max_iterations:
        iterations += 1
        # One full step more once the tolerance is met, kept if it helps: its error is squared, and
        # the answer then is as good as f can be evaluated.
        polished = size <= tolerance * norm
        if size == 0:
            break
        # Solving the inner system no better than the outer residual asks keeps the quadratic
        # order of Newton's method at a fraction of the products (inexact Newton).
        forcing = min(0.1, size / norm)
        direction = _conjugate_gradients(jacobian(y), residual, forcing, 10 * target.numel())
        slope, here = _dot(residual, direction), float(potential(y)) - _dot(target, y)
        step = 1.0
        while True:
            candidate = y + step * direction
            new_residual = target - f(candidate)
            new_size = math.sqrt(_dot(new_residual, new_residual))
            if polished:
                break
            fall = here - (float(potential(candidate)) - _dot(target, candidate))
            if fall >= 1e-4 * step * slope or new_size < size:
                break
            step /= 2
            if step < 1e-10:
                return Solution(y, Status.MAX_ITERATIONS, iterations, size / norm)
        if not polished or new_size < size:
            y, residual, size = candidate, new_residual, new_size
    status = Status.CONVERGED if size <= tolerance * norm else Status.MAX_ITERATIONS
    return Solution(y, status, iterations, size / norm)


class _SymmetricSolve(torch.autograd.Function):
    """J^-1 b for a fixed symmetric positive definite J: its own transpose, so its own backward."""

    @staticmethod
    def forward(b: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        tolerance = 8 * _default_tolerance(b.dtype)
        return _conjugate_gradients(product, b, tolerance, 10 * b.numel())

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.product = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _SymmetricSolve.forward(grad, ctx.product), None


def implicit_convex(
    f: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Callable[[Tensor], Tensor]],
    potential: Callable[[Tensor], Tensor],
    target: Tensor,
) -> Tensor:
    """The y with f(y) = target (``solve_convex``), differentiable once, in target and in f.

    Differentiating twice raises an error: run the map in its closed direction (a dual state)
    where second order is needed.

    Raises:
        NewtonError: the solve did not converge, or ``target`` is not finite.
    """
    y = solve_convex(f, jacobian, potential, target.detach()).unwrap()
    if not torch.is_grad_enabled():
        return y
    # y is a constant here, so the residual is zero and carries dt - d_theta f(y).
    with torch.no_grad():
        product = jacobian(y)
    return y + _SymmetricSolve.apply(target - f(y), product)
