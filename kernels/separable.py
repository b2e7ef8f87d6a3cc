r"""The separable map S(u) = gain psi(u) as Triton kernels: forward, inverse, step, and backward.

Every function here sees its tensors as ``(C, n)``, contiguous: C channels with coefficients of
their own, ``(K, C)`` float32, and n entries in each. ``gain`` is None (1), ``(C,)`` or ``(C, n)``,
float32. Other tensors are float32, bfloat16 or float16; arithmetic is float32. A solve returns its
status, int32 ``(1,)``, a value of ``mirror_opt.newton.Status``, without synchronising; elements
that could not be solved are NaN.

sigma is the algebraic t / sqrt(1 + t^2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirror_opt.errors import InputError
from mirror_opt.kernels.device import (
    any_true,
    coefficients,
    load_unit,
    psi,
    psi_and_slope,
    reciprocal,
    sigmoid_sums,
    solve,
    solve_near,
)

__all__ = [
    "Gradients",
    "StepGradients",
    "forward",
    "forward_backward",
    "inverse",
    "inverse_backward",
    "step",
    "step_backward",
]

# Entries of a tile and its channels: narrow rows share a warp, so that its lanes are not idle. Eight
# entries a thread are two 16-byte accesses of float32 and one of the half precisions. One warp a
# program makes the test of convergence a vote, without a barrier.
_TILES = ((1, 32), (4, 8), (16, 2), (64, 1), (256, 1))
_WARPS = 1
# Tiles of a row that one program does, since every program reads the coefficients.
_ROUNDS = 8

_NONE, _CHANNEL, _ELEMENT = (tl.constexpr(i) for i in range(3))
_FORWARD, _INVERSE, _PRIMAL, _DUAL = (tl.constexpr(i) for i in range(4))


class Gradients(NamedTuple):
    """Gradients of a map, each shaped as what it belongs to; ``gain`` is None where that is."""

    u: Tensor
    gain: Tensor | None
    w: Tensor
    s: Tensor
    c: Tensor


class StepGradients(NamedTuple):
    """Gradients of a step, each shaped as what it belongs to; ``gain`` is None where that is."""

    x: Tensor
    g: Tensor
    lr: Tensor
    gain: Tensor | None
    w: Tensor
    s: Tensor
    c: Tensor


@triton.jit
def _tile(C, columns, CB: tl.constexpr, NB: tl.constexpr):
    """Rows, the channels to read for them, and entries of a tile's first column; its column."""
    index = tl.program_id(0)
    column = (index % columns).to(tl.int64)
    if CB > 1:
        rows = index // columns * CB + tl.arange(0, CB)[:, None]
        return rows, tl.minimum(rows, C - 1), tl.arange(0, NB)[None, :], column
    else:
        row = index // columns
        return row, row, tl.arange(0, NB), column


@triton.jit
def _load_gain(gain_ptr, channel, at, inside, GAIN: tl.constexpr):
    if GAIN == _ELEMENT:
        return tl.load(gain_ptr + at, mask=inside, other=1.0)
    elif GAIN == _CHANNEL:
        return tl.load(gain_ptr + channel)
    else:
        return tl.full((), 1.0, tl.float32)


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_solved(out_ptr, status_ptr, at, inside, y):
    """Stores y; where it is not finite NaN, and the status."""
    if any_true((tl.abs(y) < float("inf")) == 0):
        # As newton.Status; see ``solve`` for what tells one from the other.
        code = tl.where(y != y, 2, 1)
        code = tl.where(tl.abs(y) < float("inf"), 0, code)
        tl.atomic_max(status_ptr, tl.max(code))
        y = tl.where(tl.abs(y) < float("inf"), y, float("nan"))
    tl.store(out_ptr + at, y, mask=inside)


@triton.jit
def _map_kernel(
    x_ptr, g_ptr, lr_ptr, gain_ptr, w_ptr, s_ptr, c_ptr, out_ptr, status_ptr, C, n, columns,
    K: tl.constexpr, KIND: tl.constexpr, GAIN: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """out = S(x), S^-1(x), S^-1(S(x) - lr g) or S(S^-1(x) - lr g)."""
    rows, channel, entries, column = _tile(C, columns, CB, NB)
    p = coefficients(w_ptr, s_ptr, c_ptr, channel, C, K)
    if KIND == _PRIMAL or KIND == _DUAL:
        rate = tl.load(lr_ptr).to(tl.float32)
    first = column * (NB * ROUNDS)
    for start in range(first, tl.minimum(first + NB * ROUNDS, n), NB):
        entry = start + entries
        inside = (rows < C) & (entry < n)
        at = rows.to(tl.int64) * n + entry
        x = _load(x_ptr, at, inside)
        gain = _load_gain(gain_ptr, channel, at, inside, GAIN)
        if KIND == _FORWARD:
            tl.store(out_ptr + at, gain * psi(x, p, K), mask=inside)
        elif KIND == _INVERSE:
            # Without a better start: |psi(t) - t| is bounded.
            t = x * reciprocal(gain)
            y = solve_near(t, t, p, K)
            _store_solved(out_ptr, status_ptr, at, inside, y)
        elif KIND == _PRIMAL:
            excess = rate * _load(g_ptr, at, inside) * reciprocal(gain)
            value, slope = psi_and_slope(x, p, K)
            y = solve(value - excess, x, excess, slope, p, K)
            _store_solved(out_ptr, status_ptr, at, inside, y)
        else:
            t = x * reciprocal(gain)
            z = solve_near(t, t, p, K)
            y = gain * psi(z - rate * _load(g_ptr, at, inside), p, K)
            _store_solved(out_ptr, status_ptr, at, inside, y)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, g_ptr, y_ptr, lr_ptr, gain_ptr, w_ptr, s_ptr, c_ptr,
    grad_x_ptr, grad_g_ptr, grad_gain_ptr, partial_ptr, C, n, columns,
    K: tl.constexpr, KIND: tl.constexpr, GAIN: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
):
    """Gradients of ``_map_kernel`` of one tile, and the tile's share of those that are sums.

    Whatever the kind, the gradient of a coefficient theta is sum (qa d_theta psi(a) +
    qb d_theta psi(b)) for two points a and b of each element and their weights. Partial sums:
    ``(3 K + 3, columns, C)``.
    """
    LAST: tl.constexpr = CB > 1  # the axis of the entries
    rows, channel, entries, column = _tile(C, columns, CB, NB)
    p = coefficients(w_ptr, s_ptr, c_ptr, channel, C, K)
    entry = column * NB + entries
    inside = (rows < C) & (entry < n)
    at = rows.to(tl.int64) * n + entry
    grad = _load(grad_ptr, at, inside)
    x = _load(x_ptr, at, inside)
    gain = _load_gain(gain_ptr, channel, at, inside, GAIN)
    value, slope = psi_and_slope(x, p, K)
    grad_lr = tl.zeros_like(x)
    if KIND == _FORWARD:
        a, qa = x, grad * gain
        grad_x = qa * slope
        grad_gain = grad * value
    elif KIND == _INVERSE:
        # x is the root here: q = grad / psi'(x).
        a, qa = x, -grad / slope
        grad_x = -qa / gain
        grad_gain = qa * value / gain
    else:
        rate = tl.load(lr_ptr).to(tl.float32)
        g = _load(g_ptr, at, inside)
        if KIND == _PRIMAL:
            b = _load(y_ptr, at, inside)
            value_b, slope_b = psi_and_slope(b, p, K)
            q = grad / slope_b
            a, qa, qb = x, q, -q
            grad_x = q * slope
            grad_z = q / gain
            grad_gain = grad_z * rate * g / gain
        else:
            b = solve_near(x / gain, x / gain, p, K)
            a = b - rate * g
            value_a, slope_a = psi_and_slope(a, p, K)
            value_b, slope_b = psi_and_slope(b, p, K)
            qa = grad * gain
            grad_z = qa * slope_a
            qb = -grad_z / slope_b
            grad_x = -qb / gain
            grad_gain = grad * value_a + qb * value_b / gain
        tl.store(grad_g_ptr + at, -rate * grad_z, mask=inside)
        grad_lr = -g * grad_z
    tl.store(grad_x_ptr + at, grad_x, mask=inside)
    if GAIN == _ELEMENT:
        tl.store(grad_gain_ptr + at, grad_gain, mask=inside)

    if CB > 1:
        to = tl.program_id(0) // columns * CB + tl.arange(0, CB)
    else:
        to = rows
    keep = to < C
    to = partial_ptr + column * C + to
    slot = columns.to(tl.int64) * C
    qa = tl.where(inside, qa, 0.0)
    weight = qa
    if KIND == _PRIMAL or KIND == _DUAL:
        qb = tl.where(inside, qb, 0.0)
        weight = qa + qb
    # Not unrolled: the sums of all units in flight at once would spill.
    for k in range(K):
        unit = load_unit(w_ptr, s_ptr, c_ptr, k, channel, C)
        value, slope, moment = sigmoid_sums(a, qa, unit, p)
        if KIND == _PRIMAL or KIND == _DUAL:
            value_b, slope_b, moment_b = sigmoid_sums(b, qb, unit, p)
            value += value_b
            slope += slope_b
            moment += moment_b
        tl.store(to + (3 * k) * slot, tl.sum(value, LAST), mask=keep)
        tl.store(to + (3 * k + 1) * slot, tl.sum(slope, LAST), mask=keep)
        tl.store(to + (3 * k + 2) * slot, tl.sum(moment, LAST), mask=keep)
    tl.store(to + (3 * K) * slot, tl.sum(weight, LAST), mask=keep)
    tl.store(to + (3 * K + 1) * slot, tl.sum(tl.where(inside, grad_gain, 0.0), LAST), mask=keep)
    tl.store(to + (3 * K + 2) * slot, tl.sum(tl.where(inside, grad_lr, 0.0), LAST), mask=keep)


@triton.jit
def _sum_columns(partial_ptr, slot, columns, C, channel, JB: tl.constexpr, CB: tl.constexpr):
    """One slot of the partial sums over all columns, in an order that never changes: ``(CB,)``."""
    total = tl.zeros([JB, CB], tl.float32)
    base = partial_ptr + slot * columns.to(tl.int64) * C
    for start in range(0, columns, JB):
        column = start + tl.arange(0, JB)[:, None]
        inside = (column < columns) & (channel[None, :] < C)
        total += tl.load(base + column.to(tl.int64) * C + channel[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _collect_kernel(
    partial_ptr, w_ptr, s_ptr, c_ptr, grad_w_ptr, grad_s_ptr, grad_c_ptr, grad_gain_ptr,
    grad_lr_ptr, C, columns, K: tl.constexpr, JB: tl.constexpr, CB: tl.constexpr,
):
    """Second stage of the sums: unit k of a block of channels, or (k = K) gain and rate."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    inside = channel < C
    k = tl.program_id(1)
    if k < K:
        at = k * C + channel
        w = tl.load(w_ptr + at, mask=inside, other=0.0)
        s = tl.load(s_ptr + at, mask=inside, other=1.0)
        c = tl.load(c_ptr + at, mask=inside, other=0.0)
        values = _sum_columns(partial_ptr, 3 * k, columns, C, channel, JB, CB)
        slopes = _sum_columns(partial_ptr, 3 * k + 1, columns, C, channel, JB, CB)
        moments = _sum_columns(partial_ptr, 3 * k + 2, columns, C, channel, JB, CB)
        weights = _sum_columns(partial_ptr, 3 * K, columns, C, channel, JB, CB)
        # reference.psi_units_gradient, with s (u - c) = t and the constant sigma(-s c) taken out.
        t0 = tl.minimum(tl.maximum(-s * c, -1e9), 1e9)
        r0 = tl.rsqrt(t0 * t0 + 1.0)
        slope0 = r0 * r0 * r0
        tl.store(grad_w_ptr + at, values - weights * (t0 * r0), mask=inside)
        tl.store(grad_s_ptr + at, w * (moments / s + c * slope0 * weights), mask=inside)
        tl.store(grad_c_ptr + at, w * s * (slope0 * weights - slopes), mask=inside)
    else:
        gain = _sum_columns(partial_ptr, 3 * K + 1, columns, C, channel, JB, CB)
        rate = _sum_columns(partial_ptr, 3 * K + 2, columns, C, channel, JB, CB)
        tl.store(grad_gain_ptr + channel, gain, mask=inside)
        tl.store(grad_lr_ptr + channel, rate, mask=inside)


class _Call:
    """What the launches of one operator share: the view of the tensors, and the tiles over it."""

    def __init__(self, like: Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor):
        if not (like.is_cuda or triton.knobs.runtime.interpret):
            raise InputError(
                f"Triton kernels cannot run on {like.device}: pass CUDA tensors, or set "
                "TRITON_INTERPRET=1 before triton is imported"
            )
        if like.dim() != 2 or like.dtype not in _DTYPES:
            raise InputError(
                f"Invalid tensor of shape {tuple(like.shape)} and dtype {like.dtype}: pass (C, n), "
                "float32, bfloat16 or float16"
            )
        self.shape, self.like = like.shape, like
        self.channels, self.entries = like.shape
        self.units = w.shape[0]
        for name, x in (("w", w), ("s", s), ("c", c)):
            _check_float32(name, x, ((self.units, self.channels),))
        self.w, self.s, self.c = (x.contiguous() for x in (w, s, c))
        self.gain_kind = _NONE.value
        if gain is not None:
            _check_float32("gain", gain, ((self.channels,), tuple(like.shape)))
            self.gain_kind = (_CHANNEL if gain.dim() == 1 else _ELEMENT).value
            gain = gain.contiguous()
        self.gain = gain
        # The smallest tile that holds a row; long rows take several of the largest.
        self.nb, self.cb = next((t for t in _TILES if t[0] >= self.entries), _TILES[-1])

    def columns(self, rounds: int) -> int:
        """Tiles across a row, when a program does ``rounds`` of them."""
        return triton.cdiv(self.entries, self.nb * rounds)

    def operand(self, name: str, x: Tensor) -> Tensor:
        """x, contiguous, if it has the operator's shape."""
        if x.shape != self.shape or x.dtype not in _DTYPES:
            raise InputError(
                f"Invalid {name} of shape {tuple(x.shape)} and dtype {x.dtype}: pass "
                f"{tuple(self.shape)}, float32, bfloat16 or float16"
            )
        return x.contiguous()

    def rate(self, lr: float | Tensor) -> Tensor:
        """lr as a tensor on the device; a number is written there without synchronising."""
        if isinstance(lr, Tensor) and lr.device == self.like.device:
            return lr
        return torch.full((), float(lr), dtype=torch.float32, device=self.like.device)

    def map(self, kind: int, x: Tensor, g: Tensor | None, lr: Tensor | None):
        out = torch.empty_like(x)
        status = torch.zeros(1, dtype=torch.int32, device=x.device)
        columns = self.columns(_ROUNDS)
        if out.numel():
            _map_kernel[triton.cdiv(self.channels, self.cb) * columns,](
                x, g, lr, self.gain, self.w, self.s, self.c, out, status,
                self.channels, self.entries, columns, K=self.units, KIND=kind, GAIN=self.gain_kind,
                CB=self.cb, NB=self.nb, ROUNDS=_ROUNDS, num_warps=_WARPS,
            )
        return out, status

    def backward(self, kind: int, grad: Tensor, x: Tensor, g=None, y=None, lr=None):
        grad_x = torch.empty_like(x)
        grad_g = None if g is None else torch.empty_like(g)
        per_element = self.gain_kind == _ELEMENT.value
        grad_gain = torch.empty_like(self.gain) if per_element else None
        columns = self.columns(1)
        partial = self.w.new_empty(3 * self.units + 3, columns, self.channels)
        sums = [torch.empty_like(x) for x in (self.w, self.s, self.c)]
        channel_gain, channel_lr = self.w.new_empty(2, self.channels)
        if x.numel():
            _backward_kernel[triton.cdiv(self.channels, self.cb) * columns,](
                grad, x, g, y, lr, self.gain, self.w, self.s, self.c, grad_x, grad_g, grad_gain,
                partial, self.channels, self.entries, columns,
                K=self.units, KIND=kind, GAIN=self.gain_kind, CB=self.cb, NB=self.nb,
                num_warps=_WARPS,
            )
        if self.channels:
            # 1024 lanes, over channels first, so that reads are contiguous.
            cb = min(triton.next_power_of_2(self.channels), 32)
            jb = min(triton.next_power_of_2(max(columns, 1)), 1024 // cb)
            _collect_kernel[triton.cdiv(self.channels, cb), self.units + 1](
                partial, self.w, self.s, self.c, *sums, channel_gain, channel_lr,
                self.channels, columns, K=self.units, JB=jb, CB=cb, num_warps=4,
            )
        if self.gain_kind == _CHANNEL.value:
            grad_gain = channel_gain
        return grad_x, grad_g, channel_lr, grad_gain, sums


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_float32(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if x.dtype != torch.float32 or tuple(x.shape) not in shapes:
        raise InputError(
            f"Invalid {name} of shape {tuple(x.shape)} and dtype {x.dtype}: pass float32 of shape "
            + " or ".join(map(str, shapes))
        )


def forward(u: Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """S(u) = gain psi(u), ``(C, n)``, in the dtype of ``u``."""
    call = _Call(u, gain, w, s, c)
    return call.map(_FORWARD.value, u.contiguous(), None, None)[0]


def inverse(
    t: Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """S^-1(t), ``(C, n)``, in the dtype of ``t``, and the status."""
    call = _Call(t, gain, w, s, c)
    return call.map(_INVERSE.value, t.contiguous(), None, None)


def step(
    x: Tensor, g: Tensor, lr: float | Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor,
    primal: bool,
) -> tuple[Tensor, Tensor]:
    """S^-1(S(x) - lr g) if primal, else S(S^-1(x) - lr g), in the dtype of ``x``; the status."""
    call = _Call(x, gain, w, s, c)
    kind = (_PRIMAL if primal else _DUAL).value
    return call.map(kind, x.contiguous(), call.operand("g", g), call.rate(lr))


def forward_backward(
    grad: Tensor, u: Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor
) -> Gradients:
    """Gradients of ``forward``, from that of its result."""
    call = _Call(u, gain, w, s, c)
    grad_u, _, _, grad_gain, sums = call.backward(
        _FORWARD.value, call.operand("grad", grad), u.contiguous()
    )
    return Gradients(grad_u, grad_gain, *sums)


def inverse_backward(
    grad: Tensor, y: Tensor, gain: Tensor | None, w: Tensor, s: Tensor, c: Tensor
) -> Gradients:
    """Gradients of ``inverse``, from that of its result and the result y."""
    call = _Call(y, gain, w, s, c)
    grad_t, _, _, grad_gain, sums = call.backward(
        _INVERSE.value, call.operand("grad", grad), y.contiguous()
    )
    return Gradients(grad_t, grad_gain, *sums)


def step_backward(
    grad: Tensor, x: Tensor, g: Tensor, y: Tensor, lr: float | Tensor, gain: Tensor | None,
    w: Tensor, s: Tensor, c: Tensor, primal: bool,
) -> StepGradients:
    """Gradients of ``step``, from that of its result, x and the result y; lr's is 0-dim float32.

    The dual kind solves for S^-1(x) once more rather than keeping it.
    """
    call = _Call(x, gain, w, s, c)
    kind = (_PRIMAL if primal else _DUAL).value
    grad_x, grad_g, grad_lr, grad_gain, sums = call.backward(
        kind, call.operand("grad", grad), x.contiguous(), call.operand("g", g),
        call.operand("y", y), call.rate(lr),
    )
    return StepGradients(grad_x, grad_g, grad_lr.sum(), grad_gain, *sums)
