r"""The inverse of psi as a differentiable operator.

With y = psi^-1(t; theta) and q = dL/dy / psi'(y),

    dL/dt = q,   dL/dtheta = -sum q d_theta psi(y)

(implicit differentiation; Blondel et al., "Efficient and modular implicit differentiation", 2022).
Backward needs y only, none of the Newton iterations, and is made of differentiable operations, so
that gradients of every order are right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirror_opt import reference
from mirror_opt.newton import solve_monotone
from mirror_opt.reference import Units

__all__ = ["psi_inverse"]


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.sum_to_size(shape)


def _units_gradient(
    at: Tensor, factor: Tensor, units: Units, sigma: str, needed: Sequence[bool]
) -> list[Tensor | None]:
    """sum factor d_theta psi(at), shaped as each of the units."""
    if not any(needed):
        return [None] * len(units)
    partial = reference.psi_units_gradient(at, units, sigma)
    return [
        _sum_to(factor.unsqueeze(0) * p, theta.shape) if want else None
        for p, theta, want in zip(partial, units, needed, strict=True)
    ]


def _batch_first(in_dims: Sequence, u: Tensor, units: Units) -> tuple[Tensor, Units]:
    """Moves the vmapped dimension of u to the front, and that of the units behind K."""

    def lead(x: Tensor, dim: int | None, to: int) -> Tensor:
        return x.unsqueeze(to) if dim is None else x.movedim(dim, to)

    moved = (lead(x, d, 1) for x, d in zip(units, in_dims[1:4], strict=True))
    return lead(u, in_dims[0], 0), Units(*moved)


class _PsiInverse(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str) -> Tensor:
        units = Units(w, s, c)
        target = t.expand(torch.broadcast_shapes(t.shape, w.shape[1:]))
        if not target.numel():
            return target.clone()
        # |psi(y) - y| <= W puts the root in target +- W; a twentieth more, since a saturated root
        # sits on the edge.
        bracket = reference.psi_bracket(units)
        solution = solve_monotone(
            lambda y: (reference.psi(y, units, sigma), reference.psi_slope(y, units, sigma)),
            target,
            target - 1.05 * bracket,
            target + 1.05 * bracket,
            start=target,
            scale=target.abs() + bracket,
        )
        return solution.unwrap()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        t, *units, ctx.sigma = inputs
        ctx.save_for_backward(output, *units)
        ctx.t_shape = t.shape

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, *rest = ctx.saved_tensors
        units = Units(*rest)
        q = grad / reference.psi_slope(y, units, ctx.sigma)
        grad_t = _sum_to(q, ctx.t_shape) if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[1:4]
        return grad_t, *_units_gradient(y, -q, units, ctx.sigma, needed), None

    @staticmethod
    def vmap(info, in_dims, t: Tensor, w: Tensor, s: Tensor, c: Tensor, sigma: str):
        t, units = _batch_first(in_dims, t, Units(w, s, c))
        return _PsiInverse.apply(t, *units, sigma), 0


def psi_inverse(t: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    r"""The y with ``reference.psi(y, units, sigma) = t``, differentiable to any order.

    Args:
        t: ``(*)``, float32 or float64.
        units: coefficients ``(K, *)`` that broadcast against ``t[None]``, with a positive lower
            slope bound.
        sigma: a key of ``reference.SIGMAS``.

    Raises:
        NewtonError: the input is not finite, or the iteration limit was reached.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> units = Units(one, 2 * one, 0 * one)
        >>> t = torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64)
        >>> bool(((reference.psi(psi_inverse(t, units), units) - t).abs() <= 1e-9).all())
        True
    """
    return _PsiInverse.apply(t, *units, sigma)
