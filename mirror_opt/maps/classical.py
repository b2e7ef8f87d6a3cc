"""Mirror maps with closed forms: the geometries of the literature."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError, is_number
from mirror_opt.maps.base import MirrorMap, OwningMap
from mirror_opt.maps.registry import register
from mirror_opt.newton import NewtonError, Status, check_forward_mode, solve_monotone

__all__ = ["Diagonal", "Euclidean", "Hypentropy", "NegativeEntropy", "PNorm"]


@register("euclidean", "h = |x|^2 / 2: gradient descent; MAML when the init is learned")
class Euclidean(MirrorMap):
    """``h(x) = |x|^2 / 2``, grad h the identity: gradient descent (Nemirovski and Yudin 1983).

    mu = ell = 1.
    """

    entrywise = True

    def _gradient(self, x: Tensor, coefficient: None) -> Tensor:
        return x

    def _gradient_conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        return z

    def _potential(self, x: Tensor, coefficient: None) -> Tensor:
        return (x * x).sum() / 2

    def strong_convexity(self) -> Tensor:
        return torch.ones(())

    def smoothness(self) -> Tensor:
        return torch.ones(())


@register("diagonal", "h = sum x_i^2 / (2 d_i), d > 0 learned: Meta-SGD with positive rates")
class Diagonal(OwningMap):
    r"""h(x) = sum_i x_i^2 / (2 d_i), grad h = x / d: one learned positive rate an element.

    d = exp(log_d) starts at 1. A mirror step is x - lr d g, so this is Meta-SGD (Li et al. 2017)
    with positive rates. mu = 1 / max d, ell = 1 / min d.

    Args:
        params: the parameters that it serves, real floating tensors of any shape.

    Raises:
        InputError: ``params`` holds no tensor, or one that is not real floating.
    """

    anchored = True
    entrywise = True

    def __init__(self, params: Iterable[Tensor]):
        params = self._listed(params)
        super().__init__(params)
        self.log_d = nn.ParameterList(
            nn.Parameter(torch.zeros_like(p, dtype=at_least_float32(p.dtype))) for p in params
        )

    def coefficients(self) -> list[Tensor]:
        return [log_d.exp() for log_d in self.log_d]

    def _own_dtype(self, coefficient: Tensor) -> torch.dtype:
        return coefficient.dtype

    def _gradient(self, x: Tensor, coefficient: Tensor) -> Tensor:
        return x / coefficient

    def _gradient_conjugate(self, z: Tensor, coefficient: Tensor) -> Tensor:
        return z * coefficient

    def _potential(self, x: Tensor, coefficient: Tensor) -> Tensor:
        return (x * x / coefficient).sum() / 2

    def _extreme(self, largest: bool) -> Tensor:
        log_d = torch.cat([log_d.flatten() for log_d in self.log_d])
        if not log_d.numel():
            return log_d.new_ones(())
        return (log_d.max() if largest else log_d.min()).exp()

    def strong_convexity(self) -> Tensor:
        return 1 / self._extreme(largest=True)

    def smoothness(self) -> Tensor:
        return 1 / self._extreme(largest=False)


def _polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of x, and |x| as a multiple of it.

    The sign is a constant, 1 or -1 at 0 too, so that what is odd in x has its derivatives there.
    """
    sign = torch.ones((), dtype=x.dtype, device=x.device).copysign(x.detach())
    return sign, sign * x


def _power(r: Tensor, exponent: float) -> Tensor:
    """r^exponent for r >= 0, with each derivative at 0 that is infinite taken as 0.

    It would turn every meta-gradient through a zero parameter into NaN.
    """
    if exponent.is_integer() or not torch.is_grad_enabled():
        return r**exponent  # there are none: the two selects would be most of a step
    zero = r == 0
    return torch.where(zero, 0.0, torch.where(zero, 1, r) ** exponent)


def _near_root(t: Tensor, p: float, eps: float, upper: Tensor) -> Tensor:
    """Where to start: at the root itself where the equation is quadratic in r or in its root."""
    if p == 2:
        root = t / (1 + eps)
    elif p == 3:
        root = t / (eps / 2 + (eps * eps / 4 + t).sqrt())
    elif p == 1.5:
        root = (2 * t / (1 + (1 + 4 * eps * t).sqrt())).square()
    else:
        return upper
    # A square may have left the range.
    return torch.where(root > 0, torch.minimum(root, upper), upper)


# An operator, so that torch.compile passes over the solve, whose length depends on the values.
@torch.library.custom_op("mirror_opt::pnorm_root", mutates_args=())
def _pnorm_root(t: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    """The root, NaN where the solve failed, and its status, 0-dim int32."""
    if not t.numel():
        return t.clone(), torch.zeros((), dtype=torch.int32)

    def f(r: Tensor) -> tuple[Tensor, Tensor]:
        r = r.clamp(min=0)
        return r ** (p - 1) + eps * r, (p - 1) * r ** (p - 2) + eps

    # Each term is at most the sum, which bounds the root from above.
    upper = torch.minimum(t ** (1 / (p - 1)), t / eps)
    start = _near_root(t, p, eps, upper)
    solution = solve_monotone(f, t, torch.zeros_like(t), upper, start=start)
    return solution.value.clamp(min=0), torch.tensor(solution.status, dtype=torch.int32)


@_pnorm_root.register_fake
def _(t: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(t), torch.zeros((), dtype=torch.int32)  # read on the meta device


class _PNormRoot(torch.autograd.Function):
    """The r >= 0 with r^(p-1) + eps r = t, for t >= 0 and eps > 0, with implicit derivatives."""

    @staticmethod
    def forward(t: Tensor, p: float, eps: float) -> Tensor:
        root, status = _pnorm_root(t, p, eps)
        # Compiled code does not ask: what failed shows as NaN.
        if not torch.compiler.is_compiling() and status != Status.CONVERGED:
            raise NewtonError(Status(int(status)))
        return root

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.p, ctx.eps = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad_r: Tensor):
        return _PNormRoot._by_slope(ctx, grad_r), None, None

    @staticmethod
    def jvp(ctx, dt: Tensor, *_):
        return _PNormRoot._by_slope(ctx, dt)

    @staticmethod
    def _by_slope(ctx, x: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        p, eps = ctx.p, ctx.eps
        if p < 2:  # 1 / slope, multiplied out by r^(2-p) so that it is finite at r = 0
            decay = _power(r, 2 - p)
            return x * decay / ((p - 1) + eps * decay)
        return x / ((p - 1) * _power(r, p - 2) + eps)

    @staticmethod
    def vmap(info, in_dims, t: Tensor, p: float, eps: float):
        return _PNormRoot.apply(t, p, eps), in_dims[0]


@register("pnorm", "h = sum |x_i|^p / p: p-norm mirror descent; p near 1 favours sparse solutions")
class PNorm(MirrorMap):
    r"""h(x) = sum_i |x_i|^p / p + (eps / 2) |x|^2, grad h = sign(x) |x|^(p-1) + eps x.

    p-norm mirror descent (Azizan, Lale and Hassibi 2021); p = 2 is gradient descent, p near 1
    favours sparse solutions, large p those of small maximum norm. The inverse is closed for
    eps = 0, else Newton. For p < 2 the slope of grad h at 0 is infinite; the derivative there is
    taken as 0, so that meta-gradients stay finite.

    With t the smallest normal number of the dtype: large p need entries above t^(1/(p-1)) (in
    float32 3e-10 for p = 5, 0.01 for p = 20), for smaller ones lose their digits in the dual, and
    then become 0. For p near 1, steps that are smaller than t^(p-1) (1e-4 for p = 1.1) do not leave
    0 unless ``MirrorDescent`` keeps a dual state, for their sum is stored as an x below t.

    mu = eps, plus 1 for p = 2; without eps there is none (for p < 2, h is strongly convex on
    bounded sets only). ell is finite for p = 2 alone.

    Args:
        p: the power, > 1.
        eps: the strength of the quadratic term, >= 0.

    Raises:
        InputError: ``p`` or ``eps`` is out of range.

    Example:
        >>> PNorm(1.5).inverse(PNorm(1.5)([torch.tensor([-4.0, 0.0, 9.0])]))
        (tensor([-4.,  0.,  9.]),)
    """

    entrywise = True
    variants: ClassVar = ({}, {"p": 3.0}, {"p": 1.1, "eps": 0.1}, {"p": 3.0, "eps": 0.5})

    def __init__(self, p: float = 1.5, eps: float = 0.0):
        if not (is_number(p) and 1 < p < math.inf):
            raise InputError(f"Invalid {p=}: pass a finite power above 1")
        if not (is_number(eps) and 0 <= eps < math.inf):
            raise InputError(f"Invalid {eps=}: pass a finite number of at least 0")
        super().__init__()
        self.p, self.eps = float(p), float(eps)
        self.inverse_is_closed = eps == 0

    def _gradient(self, x: Tensor, coefficient: None) -> Tensor:
        sign, r = _polar(x)
        z = sign * _power(r, self.p - 1)
        return z.add(x, alpha=self.eps) if self.eps else z

    def _gradient_conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        sign, r = _polar(z)
        if self.eps == 0:
            return sign * _power(r, 1 / (self.p - 1))
        check_forward_mode()
        return sign * _PNormRoot.apply(r, self.p, self.eps)

    def _potential(self, x: Tensor, coefficient: None) -> Tensor:
        return _power(_polar(x)[1], self.p).sum() / self.p + self.eps / 2 * (x * x).sum()

    def strong_convexity(self) -> Tensor:
        return torch.tensor(self.eps + (self.p == 2))

    def smoothness(self) -> Tensor:
        return torch.tensor(self.eps + 1 if self.p == 2 else math.inf)


def _asinh(x: Tensor) -> Tensor:
    """asinh, by functions that a CPU has for whole vectors; torch.asinh goes entry by entry there.

    asinh m = log1p(m + m^2 / (1 + sqrt(1 + m^2))) for m >= 0, where nothing cancels.
    """
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
        return torch.asinh(x)
    sign, m = _polar(x)
    c = m.clamp(max=1e18)  # whose square is finite, and whose fraction below is 1
    return sign * torch.log1p(m * (1 + c / (1 + (1 + c * c).sqrt())))


@register("hypentropy", "h' = asinh(x / beta): exponentiated gradient for weights of either sign")
class Hypentropy(MirrorMap):
    r"""h(x) = sum_i x_i asinh(x_i / beta) - sqrt(x_i^2 + beta^2) + beta, grad h = asinh(x / beta).

    The hyperbolic entropy (Ghai, Hazan and Singer 2020) lies between exponentiated gradient
    (beta small: sparse solutions) and gradient descent (beta large). h'' = 1 / sqrt(x^2 + beta^2):
    ell = 1 / beta, and no mu over the whole line.

    Args:
        beta: the scale at which the geometry turns from quadratic to entropic, > 0, in the units
            of the parameters.

    Raises:
        InputError: ``beta`` is out of range.
    """

    entrywise = True
    variants: ClassVar = ({}, {"beta": 1e-3})

    def __init__(self, beta: float = 1.0):
        if not (is_number(beta) and 0 < beta < math.inf):
            raise InputError(f"Invalid {beta=}: pass a finite number above 0")
        super().__init__()
        self.beta = float(beta)

    def _gradient(self, x: Tensor, coefficient: None) -> Tensor:
        return _asinh(x / self.beta)

    def _gradient_conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        return self.beta * torch.sinh(z)

    def _potential(self, x: Tensor, coefficient: None) -> Tensor:
        r = x / self.beta
        # sqrt(1 + r^2) - 1 without cancellation near 0, or overflow far out.
        root = r * (r / (1 + torch.hypot(torch.ones_like(r), r)))
        return self.beta * (r * _asinh(r) - root).sum()

    def _conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        # cosh z - 1, without cancellation.
        return 2 * self.beta * torch.sinh(z / 2).square().sum()

    def strong_convexity(self) -> Tensor:
        return torch.zeros(())

    def smoothness(self) -> Tensor:
        return torch.tensor(1 / self.beta)


@register("negative-entropy", "h = sum x log x: multiplicative weights, positive or on the simplex")
class NegativeEntropy(MirrorMap):
    r"""h(x) = sum_i x_i log x_i - x_i, grad h = log x: multiplicative weights.

    On the simplex the inverse is the softmax over the last dimension (exponentiated gradient,
    Kivinen and Warmuth 1997), so that ``inverse(forward(x)) = x`` there; duals that differ by a
    constant are one point. mu = 1 on the simplex (Pinsker); none on the positive orthant. No ell.

    Args:
        simplex: True for rows (along the last dimension) that are positive and sum to 1; False
            for positive entries. The dual of a negative entry is NaN.

    Raises:
        InputError: ``simplex`` is neither True nor False.
    """

    domain = "simplex"
    variants: ClassVar = ({}, {"simplex": False})

    def __init__(self, simplex: bool = True):
        if not isinstance(simplex, bool):
            raise InputError(f"Invalid {simplex=}: pass True or False")
        super().__init__()
        self.simplex = simplex
        self.domain = "simplex" if simplex else "positive"
        self.entrywise = not self.simplex

    def coupled(self, dims: int) -> tuple[int, ...]:
        return (dims - 1,) if self.simplex and dims else ()

    def _gradient(self, x: Tensor, coefficient: None) -> Tensor:
        # An entry that underflowed to 0 would have a dual of -inf and never come back. One below
        # is none of the domain, and its logarithm NaN.
        return x.where(x < 0, x.clamp(min=torch.finfo(x.dtype).tiny)).log()

    def _gradient_conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        return torch.softmax(z, -1) if self.simplex else z.exp()

    def _potential(self, x: Tensor, coefficient: None) -> Tensor:
        return (x * self._gradient(x, None) - x).sum()

    def _conjugate(self, z: Tensor, coefficient: None) -> Tensor:
        # On the simplex -x sums to -1 in each row.
        return (torch.logsumexp(z, -1) + 1).sum() if self.simplex else z.exp().sum()

    def strong_convexity(self) -> Tensor:
        return torch.ones(()) if self.simplex else torch.zeros(())

    def smoothness(self) -> Tensor:
        return torch.tensor(math.inf)
