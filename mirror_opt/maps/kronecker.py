"""KroneckerNeural: separable maps in learned rotated coordinates, summed. The default map."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mirror_opt.errors import InputError
from mirror_opt.maps.base import Profile, Tensors, register
from mirror_opt.maps.separable import NeuralMap, NeuralUnits, Separable, learned_dtype
from mirror_opt.newton import implicit_convex
from mirror_opt.reference import Units, psi_slope

__all__ = ["KroneckerNeural", "mode_product", "mode_sizes"]


def mode_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The modes of a weight: (out, in) or (out, in, k*k); none for vectors and scalars."""
    if len(shape) < 2:
        return ()
    return (*shape[:2], math.prod(shape[2:])) if len(shape) > 2 else tuple(shape)


def mode_product(x: Tensor, factors: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """Multiplies every mode of x by its factor, for R terms at once.

    Args:
        x: ``(R, n_1, ..., n_m)`` or ``(1, n_1, ..., n_m)``.
        factors: m matrices ``(R, n_l, n_l)``.
        transpose: multiply by the transposed factors.

    Returns:
        ``(R, n_1, ..., n_m)``.
    """
    if transpose:
        factors = [f.mT for f in factors]
    for mode, factor in enumerate(factors):
        # Every mode product is one batched matrix product that moves nothing: the last mode is
        # multiplied from the right, the one before it from the left, and an earlier one from the
        # left of all that follows it seen as columns.
        behind = len(factors) - 1 - mode
        before = min(mode, len(factors) - 2)  # modes that the product is batched over
        factor = factor.reshape(len(factor), *[1] * before, *factor.shape[1:])
        if behind == 0:
            x = x @ factor.mT
        elif behind == 1:
            x = factor @ x
        else:
            x = (factor @ x.flatten(mode + 2)).unflatten(mode + 2, x.shape[mode + 2 :])
    return x


class _Factors(nn.Module):
    """The square factors of one mode for R terms, as a function of free parameters.

    ``invertible=False``: (I + A) Q, with A free and zero at the start, Q a fixed orthogonal matrix,
    random for R > 1 (so that the terms differ from the start) and I for R = 1.
    ``invertible=True`` (R = 1): (I + strictly lower)(strictly upper + diag e^p), I at the start.
    """

    eye: Tensor
    q: Tensor

    def __init__(self, like: Tensor, terms: int, n: int, invertible: bool, seed: int):
        super().__init__()
        options: dict[str, Any] = {"dtype": learned_dtype(like.dtype), "device": like.device}
        self.invertible = invertible
        self.a = nn.Parameter(torch.zeros(terms, n, n, **options))
        eye = torch.eye(n, **options).expand(terms, n, n).clone()
        self.register_buffer("eye", eye[:1].clone(), persistent=False)
        if not invertible:
            if terms > 1:
                generator = torch.Generator().manual_seed(seed)
                normal = torch.randn(terms, n, n, generator=generator, dtype=torch.float64)
                eye = torch.linalg.qr(normal).Q.to(**options)
            self.register_buffer("q", eye)

    def forward(self) -> Tensor:
        if self.invertible:
            upper = self.a.triu(1) + torch.diag_embed(self.a.diagonal(dim1=-2, dim2=-1).exp())
            return (self.eye + self.a.tril(-1)) @ upper
        return self.q + self.a @ self.q


class _Term(NamedTuple):
    """Coefficients of one tensor: F(u) = eps u + sum_r M_r^T S_r(M_r u)."""

    factors: tuple[Tensor, ...]
    separable: Separable  # of all R terms; its gain holds the weight (1 - eps) / R
    sizes: tuple[int, ...]  # how the tensor is seen: its modes, or its own shape for vectors


class _KroneckerTensor(nn.Module):
    def __init__(
        self, like: Tensor, terms: int, eps: float, units: int, rho: float, sigma: str, seed: int
    ):
        super().__init__()
        modes = mode_sizes(like.shape)
        # Without modes to rotate all terms would be the same function.
        self.terms = terms if modes else 1
        self.sizes = modes or tuple(like.shape)
        invertible = terms == 1 and eps == 0
        self.factors = nn.ModuleList(
            _Factors(like, self.terms, n, invertible, seed + mode) for mode, n in enumerate(modes)
        )
        view = like.detach().reshape(self.sizes).expand(self.terms, *self.sizes)
        shared = min(2, view.dim())
        self.units = NeuralUnits(view, shared, units, rho, sigma, terms=1)
        self.weight = (1 - eps) / self.terms

    def forward(self) -> _Term:
        separable = self.units()
        separable = separable._replace(gain=self.weight * separable.gain)
        return _Term(tuple(f() for f in self.factors), separable, self.sizes)


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
    a tensor by Newton's method with conjugate gradients, differentiable once, and the mirror step
    is best run with a dual state, which never needs it.

    Args:
        params: the parameters that it serves, real floating tensors of any shape.
        units: K, the number of sigmoids of each psi; 0 makes psi linear.
        terms: R.
        eps: weight of the identity, in [0, 1).
        parametrization: ``"dual"`` or ``"primal"``.
        rho: bound on the relative deviation of psi' from 1, in (0, 1).
        sigma: ``"algebraic"`` or ``"tanh"``.
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
        seed: int = 0,
    ):
        params = list(params)
        super().__init__(params, parametrization, units, rho, sigma)
        if not (isinstance(terms, int) and terms >= 1):
            raise InputError(f"Invalid {terms=}: pass an integer of at least 1")
        if not (0 <= eps < 1):
            raise InputError(f"Invalid {eps=}: pass a number in [0, 1)")
        self.terms, self.eps = terms, float(eps)
        self.elementwise = terms == 1 and eps == 0  # then F = M^T S M has an elementwise solve
        self.inverse_is_batchable = self.inverse_is_closed or self.elementwise
        self.tensors = nn.ModuleList(
            _KroneckerTensor(p, terms, eps, units, rho, sigma, seed + 1000 * i)
            for i, p in enumerate(params)
        )

    tensors: Any  # a ModuleList of _KroneckerTensor

    def coefficients(self) -> list[_Term]:
        return [tensor() for tensor in self.tensors]

    def coupled(self, dims: int) -> tuple[int, ...]:
        # Vectors are not, but a solve that fails must fail in every process that shares a tensor.
        return tuple(range(dims))

    def calibrate(self, displacements: Sequence[Tensors]) -> None:
        for i, tensor in enumerate(self.tensors):
            term = tensor()
            given = [x for d in displacements if (x := d[i]) is not None]
            samples = [self._rotate(x, term) for x in given]
            if samples:
                tensor.units.calibrate(samples)

    def profiles(self) -> list[Profile]:
        return [p for i, tensor in enumerate(self.tensors) for p in tensor.units.profile(i)]

    @staticmethod
    def _rotate(u: Tensor, term: _Term) -> Tensor:
        """M_r u for every r: ``(R, *sizes)``."""
        return mode_product(u.reshape(1, *term.sizes), term.factors)

    def _back(self, v: Tensor, u: Tensor, term: _Term) -> Tensor:
        """eps u + sum_r M_r^T v_r, shaped as u."""
        total = mode_product(v, term.factors, transpose=True)
        total = total.sum(0) if len(total) > 1 else total
        return torch.add(total.reshape(u.shape), u, alpha=self.eps)

    def _closed(self, u: Tensor, term: _Term) -> Tensor:
        return self._back(term.separable.value(self._rotate(u, term)), u, term)

    def _integral(self, u: Tensor, term: _Term) -> Tensor:
        return self.eps / 2 * (u * u).sum() + term.separable.integral(self._rotate(u, term))

    def _jacobian(self, u: Tensor, term: _Term) -> Callable[[Tensor], Tensor]:
        """The function v -> F'(u) v."""
        gain, units, sigma = term.separable
        slope = gain * psi_slope(self._rotate(u, term), units, sigma)
        return lambda v: self._back(slope * self._rotate(v, term), v, term)

    def _solve(self, t: Tensor, term: _Term) -> Tensor:
        if self.elementwise:
            # F = M^T S M, so F^-1 = M^-1 S^-1 M^-T.
            inverse = [torch.linalg.inv(f) for f in term.factors]
            v = mode_product(t.reshape(1, *term.sizes), inverse, transpose=True)
            return mode_product(term.separable.inverse(v), inverse).reshape(t.shape)
        return implicit_convex(
            lambda u: self._closed(u, term),
            lambda u: self._jacobian(u, term),
            lambda u: self._integral(u, term),
            t,
        )

    def _bounds(self, term: _Term) -> tuple[Tensor, Tensor]:
        gain, units, sigma = term.separable
        low, high = [], []
        for r in range(len(gain)):
            one = Separable(gain[r], Units(*(x[:, r] for x in units)), sigma)
            lower, upper = one.bounds()
            for factor in term.factors:
                singular = torch.linalg.svdvals(factor[r])
                lower, upper = lower * singular[-1] ** 2, upper * singular[0] ** 2
            low.append(lower)
            high.append(upper)
        return self.eps + torch.stack(low).sum(), self.eps + torch.stack(high).sum()
