"""KroneckerNeural: separable maps in learned rotated coordinates, summed. The default map."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError, is_integer, is_number
from mirror_opt.maps.base import Profile, Tensors, _Batch
from mirror_opt.maps.modes import mode_sizes
from mirror_opt.maps.registry import register
from mirror_opt.maps.rotated import Rotated
from mirror_opt.maps.separable import NeuralMap, NeuralUnits, alike

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
        self.eps, self.weight = eps, (1 - eps) / self.terms

    def forward(self) -> Rotated:
        separable = self.units()
        separable = separable._replace(gain=self.weight * separable.gain)
        return Rotated(tuple(f() for f in self.factors), separable, self.eps)

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
    It holds the Kronecker-factored positive definite preconditioners (psi linear; Martens and
    Grosse 2015; learned, but free to lose definiteness, in Park and Oliva 2019), sums of them, the
    diagonal and SeparableNeural.

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
        params: Iterable[Tensor],
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

    def coefficients(self) -> list[Rotated]:
        return [group() for group in self.groups]

    def _batches(self, xs: Tensors, coefficients: Sequence[Rotated] | None) -> list[_Batch]:
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

    def _own_dtype(self, coefficient: Rotated) -> torch.dtype:
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
                    rotated = [mine.rotate(group.stack([x])) for x in samples]
                    group.units.calibrate(rotated, slice(member, member + 1))

    def profiles(self) -> list[Profile]:
        found = [
            profile
            for group in self.groups
            for member, i in enumerate(group.indices)
            for profile in group.units.profile(i, member)
        ]
        return sorted(found, key=lambda profile: profile.tensor)
