r"""A sum of rotated separable maps, F(u) = eps u + sum_r M_r^T S_r(M_r u), and its inverse."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirror_opt.maps.modes import fused_mode, mode_product
from mirror_opt.maps.separable import Separable
from mirror_opt.newton import NewtonError, Status
from mirror_opt.newton_cg import convex_scale, convex_tolerance, implicit_convex
from mirror_opt.ops.kronecker import rotation_is_fused, separable_rotated
from mirror_opt.reference import Units, psi_bracket, psi_slope, psi_slope_bounds
from mirror_opt.untraced import untraced

__all__ = ["Rotated"]


class Rotated(NamedTuple):
    """F for G tensors u ``(G, *sizes)`` at once, for each its own.

    Attributes:
        factors: M_r as a square matrix for each mode, ``(G, R, n, n)``.
        separable: S_r of all, ``(G, R, *sizes)``; its gain holds the weight (1 - eps) / R.
        eps: weight of the identity; 0 for a single term whose factors are invertible.
    """

    factors: tuple[Tensor, ...]
    separable: Separable
    eps: float

    def of(self, members: Sequence[int]) -> "Rotated":
        """Those of some of the tensors."""

        # Views and a stack: an index would have to be copied to an accelerator, which waits for it.
        def some(x: Tensor, dim: int = 0) -> Tensor:
            return torch.stack([x.select(dim, m) for m in members], dim)

        gain, units, sigma = self.separable
        separable = Separable(some(gain), Units(*(some(x, 1) for x in units)), sigma)
        return Rotated(tuple(map(some, self.factors)), separable, self.eps)

    def tensors(self) -> list[Tensor]:
        """All that they hold, in the order that ``replaced`` takes."""
        return [self.separable.gain, *self.separable.units, *self.factors]

    def replaced(
        self, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, *factors: Tensor
    ) -> "Rotated":
        """The same with other values."""
        separable = Separable(gain, Units(w, s, c), self.separable.sigma)
        return Rotated(factors, separable, self.eps)

    def rotate(self, u: Tensor) -> Tensor:
        """M_r u for every r: ``(G, R, *sizes)``."""
        return mode_product(u.unsqueeze(1), self.factors)

    def _back(self, v: Tensor, u: Tensor, factors: Sequence[Tensor | None] | None = None) -> Tensor:
        """eps u + sum_r M_r^T v_r."""
        total = mode_product(v, self.factors if factors is None else factors, transpose=True)
        total = total.sum(1) if total.shape[1] > 1 else total.squeeze(1)
        return torch.add(total, u, alpha=self.eps)

    def value(self, u: Tensor) -> Tensor:
        """F(u)."""
        _, units, sigma = self.separable
        mode = fused_mode(u.shape[1:]) if self.factors else None
        if mode is not None and u.numel() and rotation_is_fused(u, len(units.w), sigma):
            return self._fused(u, mode)
        return self._back(self.separable.value(self.rotate(u)), u)

    def _fused(self, u: Tensor, mode: int) -> Tensor:
        """``value``, with the products of this mode and S as one operator."""
        gain, units, sigma = self.separable
        groups, *sizes = u.shape
        before = math.prod(sizes[:mode])  # 1 if the mode is the first, else it is the last
        left = before == 1
        matrix = (sizes[mode], -1) if left else (before, sizes[mode])
        factor = self.factors[mode]
        others: list[Tensor | None] = list(self.factors)
        others[mode] = None
        for i, n in enumerate(sizes):
            if n == 1:
                factor, others[i] = factor * self.factors[i], None
        # Alone, the mode takes the sum over the terms and eps u in; else each term is for itself.
        alone = not any(f is not None for f in others)
        count = gain.shape[1] if alone else 1
        members = groups * gain.shape[1] // count
        v = u if alone else mode_product(u.unsqueeze(1), others)
        out = separable_rotated(
            v.reshape(members, *matrix),
            factor.reshape(members, count, *factor.shape[-2:]),
            gain.reshape(members, count, *matrix),
            Units(*(x.reshape(len(x), members, count, sizes[0]) for x in units)),
            sigma,
            eps=self.eps if alone else 0.0,
            left=left,
        )
        if alone:
            return out.reshape(u.shape)
        return self._back(out.reshape(v.shape), u, others)

    def integral(self, u: Tensor) -> Tensor:
        """The sum over the tensors of the function whose gradient is F and that vanishes at 0."""
        return self.eps / 2 * (u * u).sum() + self.separable.integral(self.rotate(u))

    def jacobian(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """The function v -> F'(u) v."""
        gain, units, sigma = self.separable
        slope = gain * psi_slope(self.rotate(u), units, sigma)
        return lambda v: self._back(slope * self.rotate(v), v)

    def inverse(self, t: Tensor) -> Tensor:
        """The u with F(u) = t.

        Raises:
            NewtonError: a solve failed; where that cannot be asked without waiting or in compiled
                code, the tensor is NaN.
        """
        if self.eps == 0:
            # F = M^T S M, so F^-1 = M^-1 S^-1 M^-T.
            factors = [torch.linalg.inv(f) for f in self.factors]
            v = mode_product(t.unsqueeze(1), factors, transpose=True)
            u = mode_product(self.separable.inverse(v), factors).squeeze(1)
            return self._confirmed(u, t)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return _root(t, *self.tensors()[:4], self.factors, self.eps, self.separable.sigma)
        return self._coupled(t)

    def _confirmed(self, u: Tensor, t: Tensor) -> Tensor:
        """u where F(u) = t as closely as a coupled solve has it; else as of a solve that failed.

        Factors may be as ill-conditioned as they like, and so may their inverses.
        """
        with torch.no_grad():
            summed = (self._summed(x) for x in (torch.zeros_like(u), u))
            limit = convex_tolerance(u.dtype) * convex_scale(_norms(t), *summed)
            solved = _norms(self.value(u) - t) <= limit
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if transformed or not solved.is_cpu:
            return u.where(solved.view(-1, *[1] * (u.dim() - 1)), math.nan)
        if not bool(solved.all()):
            raise NewtonError(Status.MAX_ITERATIONS)
        return u

    @untraced  # one break in a compiled graph for all of them
    def _coupled(self, t: Tensor) -> Tensor:
        # Tensor by tensor: each converges in its own number of steps, to its own accuracy.
        def solve(t: Tensor, one: Rotated) -> Tensor:
            return implicit_convex(
                lambda u, *values: one.replaced(*values).value(u),
                lambda u, *values: one.replaced(*values).jacobian(u),
                lambda u, *values: one.replaced(*values).integral(u),
                t,
                *one.tensors(),
                summed=lambda u, *values: one.replaced(*values)._summed(u),
            )

        return torch.cat([solve(t[m : m + 1], self.of([m])) for m in range(len(t))])

    def _summed(self, u: Tensor) -> Tensor:
        """Bounds ``(G,)`` on the norm of all that is added up in F(u): products and units."""
        gain, units, _ = self.separable
        factors = [f.abs() for f in self.factors]
        steepest = psi_slope_bounds(units)[1]
        rotated = steepest * mode_product(u.abs().unsqueeze(1), factors) + psi_bracket(units)
        v = mode_product(gain * rotated, factors, transpose=True).sum(1)
        return _norms(torch.add(v, u.abs(), alpha=self.eps))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest eigenvalue that F' can have anywhere, bounded: 0-dim."""
        gain, units, sigma = self.separable
        low, high = [], []
        for g in range(gain.shape[0]):
            for r in range(gain.shape[1]):
                one = Separable(gain[g, r], Units(*(x[:, g, r] for x in units)), sigma)
                lower, upper = one.bounds()
                for factor in self.factors:
                    singular = torch.linalg.svdvals(factor[g, r])
                    if not len(singular):
                        continue  # of an empty tensor
                    lower, upper = lower * singular[-1] ** 2, upper * singular[0] ** 2
                low.append(lower)
                high.append(upper)
        shape = gain.shape[:2]
        lower, upper = (torch.stack(x).reshape(shape).sum(1) for x in (low, high))
        return self.eps + lower.min(), self.eps + upper.max()


def _norms(x: Tensor) -> Tensor:
    """The norm of each of G tensors: ``(G,)``."""
    x = x.reshape(len(x), -1)
    if not x.numel():
        return x.new_zeros(len(x))
    size = x.abs().amax(1).clamp(min=torch.finfo(x.dtype).tiny)  # whose square may be out of range
    return size * (x / size.unsqueeze(1)).norm(dim=1)


# An operator, so that torch.compile passes over the solve, whose length depends on the values.
@torch.library.custom_op("mirror_opt::rotated_root", mutates_args=())
def _root(
    t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, factors: Sequence[Tensor],
    eps: float, sigma: str,
) -> Tensor:  # fmt: skip
    """``Rotated.inverse``, NaN where a solve fails."""
    terms = Rotated(tuple(factors), Separable(gain, Units(w, s, c), sigma), eps)
    solved = []
    for m in range(len(t)):
        try:
            solved.append(terms.of([m])._coupled(t[m : m + 1]))
        except NewtonError:
            solved.append(torch.full_like(t[m : m + 1], math.nan))
    return torch.cat(solved)


@_root.register_fake
def _(t: Tensor, *args) -> Tensor:
    return torch.empty_like(t)
