"""SeparableNeural: a learned increasing function of each coordinate."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError, is_integer, is_number
from mirror_opt.maps.base import OwningMap, Profile, Tensors
from mirror_opt.maps.registry import register
from mirror_opt.ops import separable_forward, separable_inverse
from mirror_opt.reference import SIGMAS, Units, psi, psi_integral, psi_slope_bounds

__all__ = ["NeuralMap", "NeuralUnits", "Separable", "SeparableNeural", "alike"]


def alike(params: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors, those of equal shape, dtype and device together."""
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        groups.setdefault((p.shape, p.dtype, p.device), []).append(i)
    return list(groups.values())


class Separable(NamedTuple):
    """S(u) = gain * psi(u): what one tensor's elementwise map needs.

    Attributes:
        gain: e^a > 0, broadcastable to u.
        units: coefficients of psi, each ``(K, *)`` with ``(*)`` broadcastable to u.
        sigma: a key of ``reference.SIGMAS``.
    """

    gain: Tensor
    units: Units
    sigma: str

    def value(self, u: Tensor) -> Tensor:
        """S(u)."""
        return separable_forward(u, self.gain, self.units, self.sigma)

    def inverse(self, t: Tensor) -> Tensor:
        """The u with S(u) = t."""
        return separable_inverse(t, self.gain, self.units, self.sigma)

    def integral(self, u: Tensor) -> Tensor:
        """The sum over all entries of the antiderivative of S that vanishes at 0."""
        return (self.gain * psi_integral(u, self.units, self.sigma)).sum()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest slope that S can have anywhere, 0-dim; 1 for no entries."""
        lower, upper = (self.gain * bound for bound in psi_slope_bounds(self.units))
        if not lower.numel():
            return lower.new_ones(()), upper.new_ones(())
        return lower.min(), upper.max()


class NeuralUnits(nn.Module):
    r"""The free parameters of S for one tensor, scale-free and bounded by construction.

    With v = u / unit, where ``unit`` is the calibrated rms of u,

        S(u) = e^(pace gain + a) unit [v + sum_k w_k (sigma(s_k (v - c_k)) - sigma(-s_k c_k))],
        s_k = e^(log_s_k),   w_k = (rho / K) tanh(p_k) / s_k.

    So ``|w_k s_k| < rho / K``, and the slope stays within (1 - rho, 1 + rho) times the gain,
    e^(pace gain + a), whatever is learned. gain, a and p start at 0, which makes S the identity.

    Args:
        like: the tensor; gives dtype, device and the shape of ``a``.
        shared: leading dimensions of ``like`` along which s, c, w and unit vary; the rest share.
        units: K.
        rho: bound on the relative deviation of the slope, in (0, 1).
        sigma: a key of ``reference.SIGMAS``.
        terms: leading dimensions of ``like`` along which ``gain`` varies.
        pace: what a step of ``gain`` counts, in the steps of the others.
    """

    unit: Tensor

    def __init__(
        self,
        like: Tensor,
        shared: int,
        units: int,
        rho: float,
        sigma: str,
        terms: int = 0,
        pace: float = 1.0,
    ):
        super().__init__()
        rest = [1] * (like.dim() - shared)
        shape = (*like.shape[:shared], *rest)  # broadcasts against the tensor
        options: dict[str, Any] = {"dtype": at_least_float32(like.dtype), "device": like.device}
        spread = torch.linspace(-1, 1, units, dtype=torch.float32)  # whatever the default is
        centres = spread if units > 1 else torch.zeros(units)
        gains = (*like.shape[:terms], *[1] * (like.dim() - terms))
        self.rho, self.sigma, self.pace = rho, sigma, pace
        self.gain = nn.Parameter(torch.zeros(gains, **options))
        self.a = nn.Parameter(torch.zeros(like.shape, **options))
        self.p = nn.Parameter(torch.zeros(units, *shape, **options))
        self.log_s = nn.Parameter(torch.zeros(units, *shape, **options))
        centres = centres.to(**options).reshape(units, *[1] * len(shape))
        self.c = nn.Parameter(centres.expand(units, *shape).clone())
        self.register_buffer("unit", torch.ones(shape, **options))

    def forward(self) -> Separable:
        """The coefficients with the unit absorbed, for ``reference.psi`` of u itself."""
        s, unit = self.log_s.exp(), self.unit
        amplitude = self.rho / max(len(s), 1) * torch.tanh(self.p)
        units = Units(amplitude / s * unit, s / unit, self.c * unit)
        gain = (self.pace * self.gain + self.a).exp()
        return Separable(gain, units, self.sigma)

    @torch.no_grad()
    def calibrate(self, samples: Sequence[Tensor], where: Any = ...) -> None:
        """Sets ``unit`` to the rms of the samples, shaped as the tensor, channel by channel.

        ``where`` indexes the part of the tensor that the samples are of.
        """
        unit = self.unit[where]
        square = torch.stack([u.square() for u in samples]).mean(0)
        overall = square.mean().sqrt()
        if not (torch.isfinite(overall) and overall > 0):
            return  # no signal to scale by: keep the unit
        reduced = [d for d in range(square.dim()) if unit.shape[d] == 1]
        rms = (square.mean(reduced, keepdim=True) if reduced else square).sqrt()
        # A channel that happened to be silent in the samples must not get a unit of zero.
        unit.copy_(rms.clamp(min=1e-3 * overall))

    @torch.no_grad()
    def profile(self, tensor: int, where: Any = ...) -> list[Profile]:
        """psi of a few channels against v = u / unit, in [-4, 4]; ``tensor`` is what to call it.

        ``where`` indexes a part of the tensor.
        """
        v = torch.linspace(-4, 4, 201, dtype=self.a.dtype, device=self.a.device)
        _, units, sigma = self()
        scale = self.unit[where].flatten()
        columns = Units(*(x[:, where].reshape(len(x), len(scale)) for x in units))
        picks = torch.linspace(0, len(scale) - 1, min(4, len(scale))).long().unique().tolist()
        return [
            Profile(
                tensor,
                i,
                v,
                psi(v * scale[i], Units(*(x[:, i : i + 1] for x in columns)), sigma) / scale[i],
            )
            for i in picks
        ]


class NeuralMap(OwningMap):
    r"""What the learned maps share: two parametrisations of one closed formula F = grad H.

    ``parametrization="primal"``: grad h = F, and grad h* is the solve.
    ``parametrization="dual"``: grad h* = F, and grad h is the solve.

    The coefficients that a subclass gives have F as ``value``, its antiderivative as ``integral``,
    F^-1 as ``inverse``, and bounds on the slope as ``bounds``: ``Separable``, ``Rotated``.
    """

    anchored = True

    def __init__(
        self, params: Sequence[Tensor], parametrization: str, units: int, rho: float, sigma: str
    ):
        if parametrization not in ("primal", "dual"):
            raise InputError(f"Invalid {parametrization=}: pass 'primal' or 'dual'")
        if not (is_integer(units) and units >= 0):
            raise InputError(f"Invalid {units=}: pass an integer of at least 0 (0: psi linear)")
        if not (is_number(rho) and 0 < rho < 1):
            raise InputError(f"Invalid {rho=}: pass a number between 0 and 1, both excluded")
        if not (isinstance(sigma, str) and sigma in SIGMAS):
            raise InputError(f"Invalid {sigma=}: pass one of {', '.join(SIGMAS)}")
        super().__init__(params)
        self.parametrization = parametrization
        self.forward_is_closed = parametrization == "primal"
        self.inverse_is_closed = parametrization == "dual"

    def _gradient(self, x: Tensor, coefficient: Any) -> Tensor:
        primal = self.parametrization == "primal"
        return (coefficient.value if primal else coefficient.inverse)(x)

    def _gradient_conjugate(self, z: Tensor, coefficient: Any) -> Tensor:
        primal = self.parametrization == "primal"
        return (coefficient.inverse if primal else coefficient.value)(z)

    def _potential(self, x: Tensor, coefficient: Any) -> Tensor:
        if self.parametrization == "primal":
            return coefficient.integral(x)
        return super()._potential(x, coefficient)

    def _conjugate(self, z: Tensor, coefficient: Any) -> Tensor:
        if self.parametrization == "dual":
            return coefficient.integral(z)
        return super()._conjugate(z, coefficient)

    def strong_convexity(self) -> Tensor:
        """The smallest slope of F over all tensors (primal), or 1 / the largest (dual)."""
        lower, upper = self._slopes()
        return lower if self.parametrization == "primal" else 1 / upper

    def smoothness(self) -> Tensor:
        """The largest slope of F over all tensors (primal), or 1 / the smallest (dual)."""
        lower, upper = self._slopes()
        return upper if self.parametrization == "primal" else 1 / lower

    def _slopes(self) -> tuple[Tensor, Tensor]:
        lower, upper = zip(*(c.bounds() for c in self.coefficients() or ()), strict=True)
        return torch.stack(lower).min(), torch.stack(upper).max()


@register("separable", "h' = e^a psi(x), psi increasing, learned, elementwise")
class SeparableNeural(NeuralMap):
    r"""grad H(x) = e^a psi(x) elementwise, psi a learned increasing function.

    psi(x) = x + sum_k w_k (sigma(s_k (x - c_k)) - sigma(-s_k c_k)) with the coefficients shared by
    a tensor or by each output channel, and a gain for each element; see ``NeuralUnits``. The other
    direction is a safeguarded Newton solve. After Zhang, Li and Giannakis (2025), who learn the
    mirror map as an invertible network. For primal: mu = min e^a (1 - sum (w s)_-),
    ell = max e^a (1 + sum (w s)_+); for dual their reciprocals, swapped.

    Args:
        params: the parameters that it serves, real floating tensors of any shape.
        units: K, the number of sigmoids; 0 makes psi linear.
        parametrization: ``"dual"`` (the formula is grad h*) or ``"primal"`` (it is grad h).
        share: ``"channel"`` (one psi for each entry of the first dimension) or ``"tensor"``.
        rho: bound on the relative deviation of psi' from 1, in (0, 1).
        sigma: ``"algebraic"``, t / sqrt(1 + t^2), or ``"tanh"``.

    Raises:
        InputError: an option is out of range, or ``params`` holds no floating tensor.

    Example:
        >>> separable = SeparableNeural([torch.zeros(3, 2)], units=4)
        >>> x = torch.tensor([[0.1, -2.0], [3.0, 0.0], [1e6, 1e-6]])
        >>> torch.allclose(separable([x])[0], x)  # the identity at the start
        True
    """

    variants: ClassVar = (
        {},
        {"parametrization": "primal"},
        {"parametrization": "primal", "share": "tensor", "sigma": "tanh"},
        {"units": 0},
    )

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        units: int = 4,
        parametrization: str = "dual",
        share: str = "channel",
        rho: float = 0.9,
        sigma: str = "algebraic",
    ):
        params = self._listed(params)
        super().__init__(params, parametrization, units, rho, sigma)
        if share not in ("channel", "tensor"):
            raise InputError(f"Invalid {share=}: pass 'channel' or 'tensor'")
        leading = 1 if share == "channel" else 0
        # Parameters for tensors of equal shape are kept together, (G, *shape): fewer and larger
        # ones, which cost less to compute with and to look at.
        self.indices = alike(params)
        self.groups = nn.ModuleList(
            NeuralUnits(
                params[group[0]].new_empty(()).expand(len(group), *self.shapes[group[0]]),
                1 + min(leading, len(self.shapes[group[0]])),
                units,
                rho,
                sigma,
                terms=1,
            )
            for group in self.indices
        )

    groups: Any  # a ModuleList of NeuralUnits

    def coefficients(self) -> list[Separable]:
        found: list[Any] = [None] * len(self.shapes)
        for group, units in zip(self.indices, self.groups, strict=True):
            gain, (w, s, c), sigma = units()
            columns = zip(gain, *(x.unbind(1) for x in (w, s, c)), strict=True)
            for i, (own, *coefficients) in zip(group, columns, strict=True):
                found[i] = Separable(own, Units(*coefficients), sigma)
        return found

    def _members(self) -> Iterator[tuple[int, NeuralUnits, slice]]:
        """Each tensor's index, the group that it is in, and where."""
        for group, units in zip(self.indices, self.groups, strict=True):
            for member, i in enumerate(group):
                yield i, units, slice(member, member + 1)

    def calibrate(self, displacements: Sequence[Tensors]) -> None:
        coefficients = self.coefficients()
        for i, units, member in self._members():
            samples = self._samples(displacements, i, coefficients[i])
            if samples:
                units.calibrate([x.unsqueeze(0) for x in samples], member)

    def profiles(self) -> list[Profile]:
        found = [p for i, units, member in self._members() for p in units.profile(i, member)]
        return sorted(found, key=lambda profile: profile.tensor)

    def _own_dtype(self, coefficient: Separable) -> torch.dtype:
        return coefficient.gain.dtype
