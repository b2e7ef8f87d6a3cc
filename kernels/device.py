r"""Device functions: psi, its slope and its inverse, the one place where the kernels compute them.

``mirror_opt.reference`` defines psi. A value here is a float32 block of any shape, and the
coefficients are numbers (a tile inside one channel) or blocks that broadcast against it.

**Arithmetic.** A unit costs seven operations of the fp32 pipes and one reciprocal square root:

    t = s u + b,  b = -s c;   q = 1 + t^2;   r = 1 / sqrt(q);   sigma = t r;   sigma' = r^3

The root's argument is never denormal, so the bare instruction serves, without the multiplications
with which ``tl.rsqrt`` guards against that. t^2 must not overflow: u is clamped once, where every
unit whose slope is within a factor 1e14 of the steepest has long saturated, instead of t for each
unit.

**Inverse.** The certificates below replace the evaluation that would confirm a result. With
``|psi''| <= 2 M2`` and ``|psi'''| <= 6 M3`` for all u, F = psi(x) - t and d = F / psi'(x), Taylor's
theorem bounds the residual

    of y = x - d                                          by  M2 d^2
    of y - e, e = d r / (F - 2 r), r = psi(y) - t         by  |e| (M2 |e| + M3 d^2)

The second step is Ostrowski's, of order four: the slope at y comes from the parabola through what
is known already (its error is at most M3 d^2), so that it needs the value of psi only. A tile ends
as soon as all its elements are certified; what is left then goes to Newton's method inside a
bracket, which always converges.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "Coefficients",
    "any_true",
    "coefficients",
    "load_unit",
    "psi",
    "psi_and_slope",
    "reciprocal",
    "sigmoid_sums",
    "solve",
    "solve_near",
]

# The interpreter has no PTX, nor do AMD's GPUs: there Triton's own functions serve.
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

# (A constexpr stands on the right of an operator: on the left the interpreter would swallow the
# block on the right.)
_EPS = tl.constexpr(1.1920929e-07)
_TINY = tl.constexpr(1.1754944e-38)
_INF = tl.constexpr(float("inf"))
# A few units in the last place, relative to |t| + W.
_TOLERANCE = tl.constexpr(4 * 1.1920929e-07)
_MAX_ITERATIONS = tl.constexpr(100)
_LARGEST_ARGUMENT = tl.constexpr(1e18)
# So many units are unrolled and kept in registers; more are loaded again in a loop, since code of
# which a GPU caches little and compilers take long to make is no gain.
_IN_REGISTERS = tl.constexpr(8)
# Half the largest |sigma''| (at t = 1/2) and a sixth of the largest |sigma'''| (at t = 0).
_CURVATURE = tl.constexpr(0.4294)
_THIRD = tl.constexpr(0.5)


class Coefficients(NamedTuple):
    """The units of psi for one channel, or a block of channels, and the bounds of psi there."""

    units: Any  # K triples (w, s, b), or where to load them from
    offset: Any  # sum w sigma(b) keeps the origin fixed
    span: Any  # |psi(u) - u| <= span
    reach: Any  # beyond, every sigma is saturated
    m2: Any  # the bounds of the certificates, over the tolerance
    m3: Any


@triton.jit
def _rsqrt(x):
    """1 / sqrt(x) for a normal number x."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def reciprocal(x):
    """1 / x to a unit in the last place; infinite for a denormal x."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def any_true(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def load_unit(w_ptr, s_ptr, c_ptr, k, channel, channels):
    """(w, s, b) of unit k for a channel, or a block of channels, out of ``(K, channels)``."""
    at = k * channels + channel
    s = tl.load(s_ptr + at)
    b = -s * tl.load(c_ptr + at)
    b = tl.minimum(tl.maximum(b, -_LARGEST_ARGUMENT), _LARGEST_ARGUMENT)
    return tl.load(w_ptr + at), s, b


@triton.jit
def _bound(sums, unit):
    """The sums behind the ``Coefficients`` with one more unit."""
    offset, span, steepest, m2, m3 = sums
    w, s, b = unit
    # The same operations as in psi, so that psi(0) is exactly 0.
    offset = w * _rsqrt(b * b + 1.0) * b + offset
    size = tl.abs(w)
    bend = size * s * s
    m2 = bend * (_CURVATURE / _TOLERANCE) + m2
    m3 = bend * s * (_THIRD / _TOLERANCE) + m3
    return offset, 2.0 * size + span, tl.maximum(steepest, s), m2, m3


@triton.jit
def coefficients(w_ptr, s_ptr, c_ptr, channel, channels, K: tl.constexpr):
    """The ``Coefficients`` of a channel, or a block of channels, out of ``(K, channels)``."""
    zero = channel * 0.0  # one for each channel: a loop keeps its shapes
    sums = (zero, zero, zero + 1e-20, zero, zero)
    if K <= _IN_REGISTERS:
        units = ()
        for k in tl.static_range(K):
            unit = load_unit(w_ptr, s_ptr, c_ptr, k, channel, channels)
            units = units + (unit,)
            sums = _bound(sums, unit)
    else:
        units = (w_ptr, s_ptr, c_ptr, channel, channels)
        for k in range(K):
            sums = _bound(sums, load_unit(w_ptr, s_ptr, c_ptr, k, channel, channels))
    offset, span, steepest, m2, m3 = sums
    return Coefficients(units, offset, span, 1.0 / steepest * _LARGEST_ARGUMENT, m2, m3)


@triton.jit
def _reload(p, k):
    w_ptr, s_ptr, c_ptr, channel, channels = p.units
    return load_unit(w_ptr, s_ptr, c_ptr, k, channel, channels)


@triton.jit
def _within(u, reach):
    return tl.minimum(tl.maximum(u, -reach), reach)


@triton.jit
def _add_value(total, v, unit):
    w, s, b = unit
    t = s * v + b
    return w * _rsqrt(t * t + 1.0) * t + total


@triton.jit
def _add_value_and_slope(total, slope, v, unit):
    w, s, b = unit
    t = s * v + b
    r = _rsqrt(t * t + 1.0)
    wr = w * r
    return wr * t + total, s * (wr * (r * r)) + slope


@triton.jit
def psi(u, p, K: tl.constexpr):
    """psi(u)."""
    v = _within(u, p.reach)
    total = tl.zeros_like(u)
    if K <= _IN_REGISTERS:
        for k in tl.static_range(K):
            total = _add_value(total, v, p.units[k])
    else:
        for k in tl.range(0, K, loop_unroll_factor=4):
            total = _add_value(total, v, _reload(p, k))
    return u + (total - p.offset)


@triton.jit
def psi_and_slope(u, p, K: tl.constexpr):
    """psi(u) and psi'(u)."""
    v = _within(u, p.reach)
    total = tl.zeros_like(u)
    slope = total + 1.0
    if K <= _IN_REGISTERS:
        for k in tl.static_range(K):
            total, slope = _add_value_and_slope(total, slope, v, p.units[k])
    else:
        for k in tl.range(0, K, loop_unroll_factor=4):
            total, slope = _add_value_and_slope(total, slope, v, _reload(p, k))
    return u + (total - p.offset), slope


@triton.jit
def sigmoid_sums(u, q, unit, p):
    """q (sigma - sigma_0), q (sigma' - sigma'_0) and q u sigma' of one unit, with sigma_0 that at
    u = 0: what the coefficients' gradients sum."""
    _, s, b = unit
    v = _within(u, p.reach)
    t = s * v + b
    r, r0 = _rsqrt(t * t + 1.0), _rsqrt(b * b + 1.0)
    slope = r * r * r
    return q * (t * r - b * r0), q * (slope - r0 * r0 * r0), q * v * slope


@triton.jit
def solve(t, x, excess, slope, p, K: tl.constexpr):
    """The y with psi(y) = t, from a start x with excess = psi(x) - t and slope = psi'(x).

    Infinite where the iteration limit was reached, NaN where the input is not finite. (Failure is
    a value of y, and every test is made where it is used: flags that live across branches would
    cost more instructions than the tests.)
    """
    allowed = tl.abs(t) + p.span  # times the tolerance, which m2 and m3 are divided by
    step = excess * reciprocal(slope)
    y = x - step
    square = step * step
    # Not "greater", which a NaN is not either.
    if any_true((p.m2 * square <= allowed) == 0):
        residual = psi(y, p, K) - t
        more = step * residual * reciprocal(excess - 2.0 * residual)
        size = tl.abs(more)
        # Where nothing is left to do, that ratio is one of rounding errors.
        y = tl.where(size <= tl.abs(step), y - more, y)
        good = (p.m2 * square <= allowed) | (size * (p.m2 * size + p.m3 * square) <= allowed)
        if any_true(good == 0):
            y = _solve_in_bracket(t, y, tl.where(good, _INF, allowed * _TOLERANCE), p, K)
    # An infinite target makes the bounds vacuous: 0 t is NaN then.
    return t * 0.0 + y


@triton.jit
def solve_near(t, x, p, K: tl.constexpr):
    """The y with psi(y) = t, from a start x; as ``solve``."""
    value, slope = psi_and_slope(x, p, K)
    return solve(t, x, value - t, slope, p, K)


@triton.jit
def _solve_in_bracket(t, y, allowed, p, K: tl.constexpr):
    """newton.solve_monotone, for the elements whose allowed residual is finite."""
    width = 1.05 * p.span + tl.abs(t) * (4.0 * _EPS) + _TINY
    lower = t - width
    upper = t + width
    y = tl.where(allowed < _INF, tl.minimum(tl.maximum(y, lower), upper), y)
    previous = tl.full(t.shape, _INF, tl.float32)
    iteration = 0
    active = 1
    while active > 0:
        value, slope = psi_and_slope(y, p, K)
        residual = value - t
        size = tl.abs(residual)
        newton = y - residual * reciprocal(slope)
        lower = tl.where(residual < 0.0, y, lower)
        upper = tl.where(residual > 0.0, y, upper)
        # Done: a residual small enough, or a bracket down to neighbouring floats; a NaN, which
        # never improves; or a Newton step of which its certificate says that it is the last.
        lost = residual != residual
        settled = (size <= allowed) | (upper - lower <= tl.abs(y) * (4.0 * _EPS) + _TINY)
        last = p.m2 * _TOLERANCE * (newton - y) * (newton - y) <= allowed
        # Newton can cycle inside the bracket: bisect when it leaves the bracket, and after a step
        # that did not halve the residual, once.
        trusted = (size <= 0.5 * previous) & (newton > lower) & (newton < upper)
        previous = tl.where(trusted, size, _INF)
        trial = tl.where(last | trusted, newton, lower + 0.5 * (upper - lower))
        y = tl.where(lost, residual, tl.where(settled, y, trial))
        allowed = tl.where(lost | settled | last, _INF, allowed)
        iteration += 1
        active = (iteration < _MAX_ITERATIONS).to(tl.int32) * tl.max((allowed < _INF).to(tl.int32))
    return tl.where(allowed < _INF, _INF, y)
