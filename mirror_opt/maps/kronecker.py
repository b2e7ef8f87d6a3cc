"""KroneckerNeural: separable maps in learned rotated coordinates, summed. The default map."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError, is_integer, is_number
from mirror_opt.maps.base import Profile, Tensors, _Batch, register
from mirror_opt.maps.modes import fused_mode, mode_product, mode_sizes
from mirror_opt.maps.separable import NeuralMap, NeuralUnits, Separable, alike
from mirror_opt.newton import NewtonError, Status, convex_scale, convex_tolerance, implicit_convex
from mirror_opt.ops.kronecker import rotation_is_fused, separable_rotated
from mirror_opt.reference import Units, psi_bracket, psi_slope, psi_slope_bounds
from mirror_opt.untraced import untraced

__all__ = ["KroneckerNeural"]


# What a step of a normalised factor and of the gain beside it counts, in steps of the other
# parameters. The size of a free factor, M^T S(M u), counts twice for each of up to three modes.
_FACTOR_PACE, _GAIN_PACE = 3.0, 6.0


class _Factors(nn.Module):
    """The square factors ``(G, R, n, n)`` of one mode for R terms of G tensors.

    ``invertible=False``: (I + A) Q, with A free and zero at the start, Q a fixed orthogonal matrix,
    random for R > 1 (so that the terms differ from the start) and I for R = 1.
    ``invertible=True`` (R = 1): (I + strictly lower)(strictly upper + diag e^p), I at the start.
    ``normalized=True``: either is scaled to the Frobenius norm of I, the first with 3 A for A. A
    factor then has a direction and no size, which is the gains'; the larger A, the less a step
    turns it. One of a single entry has nothing to learn.
    """

    a: nn.Parameter | None
    eye: Tensor
    q: Tensor

    def __init__(
        self,
        like: Tensor,
        terms: int,
        n: int,
        invertible: bool,
        normalized: bool,
        seeds: Sequence[int],
    ):
        super().__init__()
        options: dict[str, Any] = {"dtype": at_least_float32(like.dtype), "device": like.device}
        shape = (len(seeds), terms, n, n)
        self.invertible, self.normalized = invertible, normalized
        fixed = normalized and n == 1
        self.register_parameter("a", None if fixed else nn.Parameter(torch.zeros(shape, **options)))
        eye = torch.eye(n, **options)
        self.register_buffer("eye", eye, persistent=False)
        if fixed or not invertible:
            q = eye.expand(shape).clone()
            if terms > 1:
                normal = [self._normal(shape[1:], seed) for seed in seeds]
                q = torch.linalg.qr(torch.stack(normal)).Q.to(**options)
            self.register_buffer("q", q, persistent=not invertible)

    @staticmethod
    def _normal(shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self) -> Tensor:
        if self.a is None:
            return self.q
        if self.invertible:
            upper = self.a.triu(1) + torch.diag_embed(self.a.diagonal(dim1=-2, dim2=-1).exp())
            m = (self.eye + self.a.tril(-1)) @ upper
            return self._sized(m) if self.normalized else m
        if self.normalized:
            return self._sized(self.eye + _FACTOR_PACE * self.a) @ self.q
        return self.q + self.a @ self.q

    @staticmethod
    def _sized(m: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(m, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)
        return m * (m.shape[-1] ** 0.5 / norm)


def _norms(x: Tensor) -> Tensor:
    """The norm of each of G tensors: ``(G,)``."""
    x = x.reshape(len(x), -1)
    if not x.numel():
        return x.new_zeros(len(x))
    size = x.abs().amax(1).clamp(min=torch.finfo(x.dtype).tiny)  # whose square may be out of range
    return size * (x / size.unsqueeze(1)).norm(dim=1)


class _Terms(NamedTuple):
    """Coefficients of G tensors: F(u) = eps u + sum_r M_r^T S_r(M_r u), for each its own."""

    factors: tuple[Tensor, ...]  # (G, R, n, n) for each mode
    separable: Separable  # of all (G, R); its gain holds the weight (1 - eps) / R

    def of(self, members: Sequence[int]) -> "_Terms":
        """Those of some of the tensors."""

        # Views and a stack: an index would have to be copied to an accelerator, which waits for it.
        def some(x: Tensor, dim: int = 0) -> Tensor:
            return torch.stack([x.select(dim, m) for m in members], dim)

        gain, units, sigma = self.separable
        separable = Separable(some(gain), Units(*(some(x, 1) for x in units)), sigma)
        return _Terms(tuple(map(some, self.factors)), separable)

    def tensors(self) -> list[Tensor]:
        """All that they hold, in the order that ``replaced`` takes."""
        return [self.separable.gain, *self.separable.units, *self.factors]

    def replaced(self, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, *factors: Tensor) -> "_Terms":
        """The same with other values."""
        return _Terms(factors, Separable(gain, Units(w, s, c), self.separable.sigma))


class _Group(nn.Module):
    """The map's parameters for G tensors of equal shape, which are worked on at once.

    Each is seen with the shape ``sizes``: its modes, or its own shape for vectors.
    """

    def __init__(
        self,
        indices: Sequence[int],
        like: Tensor,
        terms: int,
        eps: float,
        normalized: bool,
        seed: int,
        **units: Any,
    ):
        super().__init__()
        modes = mode_sizes(like.shape)
        # Without modes to rotate all terms would be the same function.
        self.terms = terms if modes else 1
        self.indices, self.shape, self.sizes = list(indices), like.shape, modes or like.shape
        form = {"invertible": terms == 1 and eps == 0, "normalized": normalized}
        self.factors = nn.ModuleList(
            _Factors(like, self.terms, n, **form, seeds=[seed + 1000 * i + mode for i in indices])
            for mode, n in enumerate(modes)
        )
        pace = _GAIN_PACE if normalized else 1.0
        view = like.detach().reshape(self.sizes).expand(len(indices), self.terms, *self.sizes)
        self.units = NeuralUnits(view, min(3, view.dim()), **units, terms=2, pace=pace)
        self.weight = (1 - eps) / self.terms

    def forward(self) -> _Terms:
        separable = self.units()
        separable = separable._replace(gain=self.weight * separable.gain)
        return _Terms(tuple(f() for f in self.factors), separable)

    def stack(self, xs: Sequence[Tensor]) -> Tensor:
        """Tensors of the group as ``(number, *sizes)``."""
        if len(xs) == 1:
            return xs[0].reshape(1, *self.sizes)
        return torch.stack([x.reshape(self.sizes) for x in xs])


@register("kronecker", "sum of learned rotations around learned separable maps (the default)")
class KroneckerNeural(NeuralMap):
    r"""F(u) = eps u + (1 - eps) sum_r M_r^T S_r(M_r u): a sum of rotated separable maps.

    Each weight is seen as a tensor with modes (out, in) or (out, in, k*k), and
    M_r = M_out (x) M_in (x) M_k acts by mode products; vectors use M = I. S_r = e^a psi_r / R acts
    elementwise (``NeuralUnits``). The Jacobian eps I + (1 - eps) sum_r M_r^T diag(S_r') M_r is
    symmetric positive definite, so F is the gradient of a strongly convex function for every value
    of the parameters, and the identity at the start.
    It holds the Kronecker-factored positive definite preconditioners (psi linear), sums of them,
    the diagonal and SeparableNeural.

    With L = max over tensors of eps + (1 - eps) sum_r prod_l sigma_max(M_rl)^2 max S_r' and l the
    same with sigma_min and min: for ``"dual"`` (F is grad h*) mu = 1 / L, ell = 1 / l; for
    ``"primal"`` (F is grad h) mu = l, ell = L.

    The other direction: for ``terms=1, eps=0`` one elementwise Newton solve between two changes of
    basis (the factors are then kept invertible as LU products); else a solve over all entries of
    a tensor by Newton's method with conjugate gradients, and the mirror step is best run with a
    dual state, which never needs it. Both are differentiable to any order.

    Args:
        params: the parameters that it serves, real floating tensors of any shape.
        units: K, the number of sigmoids of each psi; 0 makes psi linear.
        terms: R.
        eps: weight of the identity, in [0, 1), and above 0 for several terms.
        parametrization: ``"dual"`` or ``"primal"``.
        rho: bound on the relative deviation of psi' from 1, in (0, 1).
        sigma: ``"algebraic"`` or ``"tanh"``.
        normalized: keep every factor of M at the Frobenius norm of I, so that it has a direction
            and the gain a size. What is learned then depends less on the rate of the outer loop.
        seed: of the fixed orthogonal matrices that tell the terms apart (R > 1).

    Raises:
        InputError: an option is out of range, or ``params`` holds no floating tensor.

    Example:
        >>> kronecker = KroneckerNeural([torch.zeros(8, 4), torch.zeros(8)], units=4)
        >>> zeta = [torch.ones(8, 4), torch.ones(8)]
        >>> delta = kronecker.inverse(zeta)                     # closed, the identity at the start
        >>> torch.allclose(delta[0], zeta[0], atol=1e-5)
        True
    """

    variants: ClassVar = (
        {},
        {"terms": 3},
        {"eps": 0.0},
        {"eps": 0.0, "parametrization": "primal"},
        {"terms": 2, "parametrization": "primal"},
        {"eps": 0.1, "units": 0},
        {"normalized": True},
        {"normalized": True, "eps": 0.0, "parametrization": "primal"},
        {"normalized": True, "terms": 2},
    )

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        units: int = 4,
        terms: int = 1,
        eps: float = 0.02,
        parametrization: str = "dual",
        rho: float = 0.9,
        sigma: str = "algebraic",
        normalized: bool = False,
        seed: int = 0,
    ):
        params = self._listed(params)
        super().__init__(params, parametrization, units, rho, sigma)
        if not isinstance(normalized, bool):
            raise InputError(f"Invalid {normalized=}: pass True or False")
        if not (is_integer(terms) and terms >= 1):
            raise InputError(f"Invalid {terms=}: pass an integer of at least 1")
        if not (is_number(eps) and 0 <= eps < 1):
            raise InputError(f"Invalid {eps=}: pass a number in [0, 1)")
        if not (is_integer(seed) and abs(seed) < 2**62):
            raise InputError(f"Invalid {seed=}: pass an integer between -2**62 and 2**62")
        if terms > 1 and eps == 0:
            # M_r = 0 is among the values of the parameters, and then F = 0 is no gradient of a
            # strongly convex function. A single term's factors are kept invertible instead.
            raise InputError(f"Invalid {eps=} with {terms=}: pass a number in (0, 1)")
        self.terms, self.eps = terms, float(eps)
        self.elementwise = terms == 1 and eps == 0  # then F = M^T S M has an elementwise solve
        self.inverse_is_batchable = self.inverse_is_closed or self.elementwise
        psi = {"units": units, "rho": rho, "sigma": sigma}
        self.groups = nn.ModuleList(
            _Group(indices, params[indices[0]], terms, self.eps, normalized, seed, **psi)
            for indices in alike(params)
        )

    groups: Any  # a ModuleList of _Group

    def coefficients(self) -> list[_Terms]:
        return [group() for group in self.groups]

    def _batches(self, xs: Tensors, coefficients: Sequence[_Terms] | None) -> list[_Batch]:
        if coefficients is None:
            self._check_shapes(xs)
            coefficients = self.coefficients()
        self._check_count(xs, len(self.shapes))
        xs = self._widened(xs)
        batches = []
        for group, terms in zip(self.groups, coefficients, strict=True):
            mine = [(m, i, xs[i]) for m, i in enumerate(group.indices) if xs[i] is not None]
            if mine:
                members, indices, present = map(list, zip(*mine, strict=True))
                for i, x in zip(indices, present, strict=True):
                    self._check_dtype(i, x, terms)
                own = terms if len(mine) == len(group.indices) else terms.of(members)
                batches.append(_Batch(indices, group.stack(present), own))
        return batches

    def _own_dtype(self, coefficient: _Terms) -> torch.dtype:
        return coefficient.separable.gain.dtype

    def _each(
        self,
        function: Callable[[Tensor, Any], Tensor],
        xs: Tensors,
        coefficients: Sequence[Any] | None,
    ) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * len(xs)
        for indices, x, terms in self._batches(xs, coefficients):
            for i, y in zip(indices, function(x, terms).unbind(), strict=True):
                results[i] = y.reshape(self.shapes[i])
        return tuple(results)

    def coupled(self, dims: int) -> tuple[int, ...]:
        # Vectors are not, but a solve that fails must fail in every process that shares a tensor.
        return tuple(range(dims))

    def calibrate(self, displacements: Sequence[Tensors]) -> None:
        for group, terms in zip(self.groups, self.coefficients(), strict=True):
            for member, i in enumerate(group.indices):
                mine = terms.of([member])
                samples = self._samples(displacements, i, terms)
                if samples:
                    rotated = [self._rotate(group.stack([x]), mine) for x in samples]
                    group.units.calibrate(rotated, slice(member, member + 1))

    def profiles(self) -> list[Profile]:
        found = [
            profile
            for group in self.groups
            for member, i in enumerate(group.indices)
            for profile in group.units.profile(i, member)
        ]
        return sorted(found, key=lambda profile: profile.tensor)

    # For a group u of tensors, (G, *sizes).

    @staticmethod
    def _rotate(u: Tensor, terms: _Terms) -> Tensor:
        """M_r u for every r: ``(G, R, *sizes)``."""
        return mode_product(u.unsqueeze(1), terms.factors)

    def _back(self, v: Tensor, u: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
        """eps u + sum_r M_r^T v_r."""
        total = mode_product(v, factors, transpose=True)
        total = total.sum(1) if total.shape[1] > 1 else total.squeeze(1)
        return torch.add(total, u, alpha=self.eps)

    def _closed(self, u: Tensor, coefficient: _Terms) -> Tensor:
        _, units, sigma = coefficient.separable
        mode = fused_mode(u.shape[1:]) if coefficient.factors else None
        if mode is not None and u.numel() and rotation_is_fused(u, len(units.w), sigma):
            return self._closed_fused(u, coefficient, mode)
        rotated = self._rotate(u, coefficient)
        return self._back(coefficient.separable.value(rotated), u, coefficient.factors)

    def _closed_fused(self, u: Tensor, terms: _Terms, mode: int) -> Tensor:
        """``_closed``, with the products of this mode and S as one operator."""
        gain, units, sigma = terms.separable
        groups, *sizes = u.shape
        before = math.prod(sizes[:mode])  # 1 if the mode is the first, else it is the last
        left = before == 1
        matrix = (sizes[mode], -1) if left else (before, sizes[mode])
        factor = terms.factors[mode]
        others: list[Tensor | None] = list(terms.factors)
        others[mode] = None
        for i, n in enumerate(sizes):
            if n == 1:
                factor, others[i] = factor * terms.factors[i], None
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

    def _integral(self, u: Tensor, coefficient: _Terms) -> Tensor:
        rotated = self._rotate(u, coefficient)
        return self.eps / 2 * (u * u).sum() + coefficient.separable.integral(rotated)

    def _jacobian(self, u: Tensor, terms: _Terms) -> Callable[[Tensor], Tensor]:
        """The function v -> F'(u) v."""
        gain, units, sigma = terms.separable
        slope = gain * psi_slope(self._rotate(u, terms), units, sigma)
        return lambda v: self._back(slope * self._rotate(v, terms), v, terms.factors)

    def _solve(self, t: Tensor, coefficient: _Terms) -> Tensor:
        if self.elementwise:
            # F = M^T S M, so F^-1 = M^-1 S^-1 M^-T.
            inverse = [torch.linalg.inv(f) for f in coefficient.factors]
            v = mode_product(t.unsqueeze(1), inverse, transpose=True)
            y = mode_product(coefficient.separable.inverse(v), inverse).squeeze(1)
            return self._confirmed(y, t, coefficient)
        return self._solve_coupled(t, coefficient)

    def _confirmed(self, y: Tensor, t: Tensor, terms: _Terms) -> Tensor:
        """y where F(y) = t as closely as a coupled solve has it; else as of a solve that failed.

        Factors may be as ill-conditioned as they like, and so may their inverses.
        """
        with torch.no_grad():
            summed = (self._summed(x, terms) for x in (torch.zeros_like(y), y))
            limit = convex_tolerance(y.dtype) * convex_scale(_norms(t), *summed)
            solved = _norms(self._closed(y, terms) - t) <= limit
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if transformed or not solved.is_cpu:
            return y.where(solved.view(-1, *[1] * (y.dim() - 1)), math.nan)
        if not bool(solved.all()):
            raise NewtonError(Status.MAX_ITERATIONS)
        return y

    @untraced  # one break in a compiled graph for the whole group
    def _solve_coupled(self, t: Tensor, terms: _Terms) -> Tensor:
        # Tensor by tensor: each converges in its own number of steps, to its own accuracy.
        def solve(t: Tensor, terms: _Terms) -> Tensor:
            return implicit_convex(
                lambda u, *values: self._closed(u, terms.replaced(*values)),
                lambda u, *values: self._jacobian(u, terms.replaced(*values)),
                lambda u, *values: self._integral(u, terms.replaced(*values)),
                t,
                *terms.tensors(),
                summed=lambda u, *values: self._summed(u, terms.replaced(*values)),
            )

        return torch.cat([solve(t[m : m + 1], terms.of([m])) for m in range(len(t))])

    def _summed(self, u: Tensor, terms: _Terms) -> Tensor:
        """Bounds ``(G,)`` on the norm of all that is added up in F(u): products and units."""
        gain, units, _ = terms.separable
        factors = [f.abs() for f in terms.factors]
        steepest = psi_slope_bounds(units)[1]
        rotated = steepest * mode_product(u.abs().unsqueeze(1), factors) + psi_bracket(units)
        v = mode_product(gain * rotated, factors, transpose=True).sum(1)
        return _norms(torch.add(v, u.abs(), alpha=self.eps))

    def _bounds(self, coefficient: _Terms) -> tuple[Tensor, Tensor]:
        gain, units, sigma = coefficient.separable
        low, high = [], []
        for g in range(gain.shape[0]):
            for r in range(gain.shape[1]):
                one = Separable(gain[g, r], Units(*(x[:, g, r] for x in units)), sigma)
                lower, upper = one.bounds()
                for factor in coefficient.factors:
                    singular = torch.linalg.svdvals(factor[g, r])
                    if not len(singular):
                        continue  # of an empty tensor
                    lower, upper = lower * singular[-1] ** 2, upper * singular[0] ** 2
                low.append(lower)
                high.append(upper)
        shape = gain.shape[:2]
        lower, upper = (torch.stack(x).reshape(shape).sum(1) for x in (low, high))
        return self.eps + lower.min(), self.eps + upper.max()
