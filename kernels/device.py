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
\|psi''\| <= 2 M2 and \|psi'''\| <= 6 M3 for all u, F = psi(x) - t and d = F / psi'(x), Taylor's
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
    "psi",
    "psi_and_slope",
    "sigmoid_sums",
    "solve",
]

# The interpreter has no PTX, nor do AMD's GPUs: there Triton's own functions serve.
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

# (A constexpr stands on the right of an operator: on the left the interpreter would swallow the
# block on the right.)
_EPS = tl.constexpr(1.1920929e-07)
_TINY = tl.constexpr(1.1754944e-38)
_INF = tl.constexpr(float("inf"))
# As newton.solve_monotone: a few units in the last place, relative to |t| + W.
_TOLERANCE = tl.constexpr(8 * 1.1920929e-07)
_MAX_ITERATIONS = tl.constexpr(100)
_LARGEST_ARGUMENT = tl.constexpr(1e18)
# Half the largest |sigma''| (at t = 1/2) and a sixth of the largest |sigma'''| (at t = 0).
_CURVATURE = tl.constexpr(0.4294)
_THIRD = tl.constexpr(0.5)


class Coefficients(NamedTuple):
    """The units of psi for one channel, or a block of channels, and the bounds of psi there."""

    units: Any  # K triples (w, s, b)
    offset: Any  # sum w sigma(b) keeps the origin fixed
    span: Any  # |psi(u) - u| <= span
    reach: Any  # beyond, every sigma is saturated
    m2: Any
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
def _reciprocal(x):
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
def coefficients(w_ptr, s_ptr, c_ptr, channel, channels, K: tl.constexpr):
    """The ``Coefficients`` of a channel, or a block of channels, out of ``(K, channels)``."""
    units = ()
    offset = 0.0
    span = 0.0
    steepest = 1e-20
    m2 = 0.0
    m3 = 0.0
    for k in tl.static_range(K):
        w = tl.load(w_ptr + k * channels + channel)
        s = tl.load(s_ptr + k * channels + channel)
        c = tl.load(c_ptr + k * channels + channel)
        b = tl.minimum(tl.maximum(-s * c, -_LARGEST_ARGUMENT), _LARGEST_ARGUMENT)
        units = units + ((w, s, b),)
        # The same operations as in psi, so that psi(0) is exactly 0.
        offset = w * _rsqrt(b * b + 1.0) * b + offset
        span = 2.0 * tl.abs(w) + span
        steepest = tl.maximum(steepest, s)
        m2 = tl.abs(w) * _CURVATURE * s * s + m2
        m3 = tl.abs(w) * _THIRD * s * s * s + m3
    return Coefficients(units, offset, span, 1.0 / steepest * _LARGEST_ARGUMENT, m2, m3)


@triton.jit
def _within(u, reach):
    return tl.minimum(tl.maximum(u, -reach), reach)


@triton.jit
def psi(u, p):
    """psi(u)."""
    v = _within(u, p.reach)
    total = tl.zeros_like(u)
    for k in tl.static_range(len(p.units)):
        w, s, b = p.units[k]
        t = s * v + b
        total = w * _rsqrt(t * t + 1.0) * t + total
    return u + (total - p.offset)


@triton.jit
def psi_and_slope(u, p):
    """psi(u) and psi'(u)."""
    v = _within(u, p.reach)
    total = tl.zeros_like(u)
    slope = total + 1.0
    for k in tl.static_range(len(p.units)):
        w, s, b = p.units[k]
        t = s * v + b
        r = _rsqrt(t * t + 1.0)
        wr = w * r
        total = wr * t + total
        slope = s * (wr * (r * r)) + slope
    return u + (total - p.offset), slope


@triton.jit
def sigmoid_sums(u, q, unit, p):
    """q sigma(t), q sigma'(t), q t sigma'(t) of one unit: what the coefficients' gradients sum."""
    w, s, b = unit
    t = s * _within(u, p.reach) + b
    r = _rsqrt(t * t + 1.0)
    slope = q * (r * r * r)
    return q * (t * r), slope, slope * t


@triton.jit
def solve(t, x, excess, slope, p):
    """The y with psi(y) = t, from a start x with excess = psi(x) - t and slope = psi'(x).

    Returns:
        (y, good): a y that is not good is not the solution, and NaN where the input is not finite.
    """
    allowed = (tl.abs(t) + p.span) * _TOLERANCE
    step = excess * _reciprocal(slope)
    y = x - step
    square = step * step
    good = p.m2 * square <= allowed
    if any_true(good == 0):
        residual = psi(y, p) - t
        more = step * residual * _reciprocal(excess - 2.0 * residual)
        size = tl.abs(more)
        # False also for the NaN of an element that has nothing left to do.
        moves = (good == 0) & (size <= tl.abs(step))
        y = tl.where(moves, y - more, y)
        good = good | (moves & (size * (p.m2 * size + p.m3 * square) <= allowed))
        if any_true(good == 0):
            y, good = _solve_in_bracket(t, y, good, allowed, p)
    # An infinite target makes every bound above vacuous.
    y = tl.where(tl.abs(t) < _INF, y, t - t)
    return y, good & (tl.abs(y) < _INF)


@triton.jit
def _solve_in_bracket(t, y, done, allowed, p):
    """newton.solve_monotone for the elements that are not done, from y."""
    width = 1.05 * p.span + tl.abs(t) * (4.0 * _EPS) + _TINY
    lower = t - width
    upper = t + width
    y = tl.where(done, y, tl.minimum(tl.maximum(y, lower), upper))
    previous = tl.full(t.shape, _INF, tl.float32)
    bisected = done
    iteration = 0
    active = 1
    while active > 0:
        value, slope = psi_and_slope(y, p)
        residual = value - t
        size = tl.abs(residual)
        newton = y - residual * _reciprocal(slope)
        # One more step is enough where its certificate says so, none where the residual is small
        # or the bracket down to neighbouring floats. A NaN never improves: it is done, as NaN.
        last = (done == 0) & (p.m2 * (newton - y) * (newton - y) <= allowed)
        narrow = upper - lower <= tl.abs(y) * (4.0 * _EPS) + _TINY
        lost = residual != residual
        done = done | last | (size <= allowed) | narrow | lost
        lower = tl.where(residual < 0.0, y, lower)
        upper = tl.where(residual > 0.0, y, upper)
        # Newton can cycle inside the bracket: after a step that did not halve the residual, and
        # when it leaves the bracket, bisect.
        trusted = (bisected | (size <= 0.5 * previous)) & (newton > lower) & (newton < upper)
        step = tl.where(trusted, newton, lower + 0.5 * (upper - lower))
        y = tl.where(last, newton, tl.where(lost, residual, tl.where(done, y, step)))
        bisected = trusted == 0
        previous = size
        iteration += 1
        active = tl.max((done == 0).to(tl.int32)) * (iteration < _MAX_ITERATIONS).to(tl.int32)
    return y, done
