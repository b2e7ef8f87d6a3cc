r"""The solver behind the inverse of an elementwise mirror map, and how a solve ended.

``solve_monotone`` is the safeguarded scalar Newton method, elementwise over a tensor: a bracket
that always holds the root, a Newton step inside it, a bisection when the step leaves it or does not
shrink the residual fast enough. It converges for every increasing function, so a failure means
non-finite input or a tolerance below what the dtype can resolve. Maps that couple the entries of a
tensor are for ``newton_cg``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

__all__ = [
    "NewtonError",
    "Solution",
    "Status",
    "check_forward_mode",
    "default_tolerance",
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
        "the residual is still above the tolerance where the iterations ended, since the slopes of "
        "the map, from strong_convexity() to smoothness(), lie too far apart: learn the map at a "
        "lower rate, or use the direction that needs no solve (forward_is_closed, "
        "inverse_is_closed)"
    ),
    Status.NONFINITE: (
        "the input holds NaN or Inf: look for a diverged loss, lower the learning rate, "
        "or skip the step"
    ),
}


class NewtonError(ArithmeticError):
    """A solve of a mirror map's inverse (or of its derivatives) whose result may not be used.

    Attributes:
        status: why, a ``mirror_opt.newton.Status``: ``MAX_ITERATIONS`` or ``NONFINITE``.
    """

    def __init__(self, status: Status, after: str = ""):
        message = f"inverse of the mirror map, {status.name}: {status.message}"
        super().__init__(f"{message}; {after}" if after else message)
        self.status, self._after = status, after

    def __reduce__(self) -> tuple:
        # An exception is copied and pickled by its message, which is not what makes this one.
        return type(self), (self.status, self._after)


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        value: the root, shaped as the target; of ``solve_monotone`` NaN where it was not found.
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


def default_tolerance(dtype: torch.dtype) -> float:
    """A few units in the last place: what evaluating psi once more could change."""
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
    tolerance = default_tolerance(target.dtype) if tolerance is None else tolerance
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
    if status is not Status.CONVERGED:
        y = y.where(converged & torch.isfinite(relative) & finite, math.nan)
    return Solution(y, status, iterations, worst)


def check_forward_mode() -> None:
    """Raises NotImplementedError within two transforms of forward mode.

    torch calls the ``jvp`` of an ``autograd.Function`` without the tangents of the outer one, and
    what comes out has none.
    """
    if torch.compiler.is_compiling():
        return  # it cannot be asked there
    stack = get_interpreter_stack() or ()
    if sum(level.key() == TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "forward mode within forward mode through a solve of a mirror map: take reverse mode "
            "(torch.func.grad, jacrev) for one of the two"
        )
