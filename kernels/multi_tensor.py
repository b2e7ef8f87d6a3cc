r"""The mirror step of a whole list of tensors, in place, in one launch.

Tables in device memory describe the work (``plans``), so that a step of any list is one launch,
without synchronising, also while a CUDA graph is captured. A program does a stretch of one channel,
whose coefficients are then numbers, or, in a tensor whose channels are too short for that, of
entries with their own coefficients.

A parameter is seen as ``(C, n)``, with C and K from its coefficients ``(K, C)``. With the direction
d (the gradient, or its momentum) and S = gain psi,

    stateless    z = grad h((1 - lr decay) phi - anchor)        dual state    z = zeta + z_0
    z <- z - lr d,   phi <- anchor + grad h*(z),   zeta <- z - z_0

where grad h is S and grad h* its inverse (primal), or the other way round (dual). With weight decay
a dual state recomputes z from the decayed, unrounded anchor + grad h*(z). Arithmetic is float32.

An element whose solve fails, or whose result is not finite in the parameter's dtype, keeps its
parameter and state, and the status tells.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mirror_opt.backends.step import Step
from mirror_opt.kernels import plans
from mirror_opt.kernels.device import (
    any_true,
    coefficients,
    psi,
    psi_and_slope,
    reciprocal,
    solve,
    solve_near,
)

__all__ = ["step_"]

# One warp a program makes the test of convergence a vote without a barrier, and keeps the
# coefficients in uniform registers.
_WARPS = 1

_FIELDS = tl.constexpr(plans.FIELDS)
# Entries of 16 bytes, whatever the dtype.
_UNIT = tl.constexpr(8)


class _Options(NamedTuple):
    """What a launch is compiled for; built where it is passed, since a name would make it data."""

    primal: Any
    gain: Any
    momentum: Any
    nesterov: Any
    decay: Any
    anchor: Any
    dual: Any
    dual_init: Any


class _Row(NamedTuple):
    """Addresses of one tensor; 0 for what it does not have."""

    param: Any
    grad: Any
    gain: Any
    buffer: Any
    anchor: Any
    dual: Any
    dual_init: Any


class _Rates(NamedTuple):
    """Numbers of the launch: what the gradient is multiplied by, and 1 - lr decay, among them."""

    lr: Any
    scale: Any
    momentum: Any
    shrink: Any


@triton.jit
def _at(address, start, entry, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the entries from ``start`` on; an alignment of 16 bytes has to be told."""
    pointer = (address + start * (T.primitive_bitwidth // 8)).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + entry


@triton.jit
def _read(address, start, entry, inside, other, T: tl.constexpr, ALIGNED: tl.constexpr):
    at = _at(address, start, entry, T, ALIGNED)
    if inside is None:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=inside, other=other).to(tl.float32)


@triton.jit
def _write(address, start, entry, inside, x, T: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_at(address, start, entry, T, ALIGNED), x.to(T), mask=inside)


@triton.jit
def _read_all(
    row, start, entry, inside, o, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What the step reads of a tile; zeros for what it does not, and ones for the gain."""
    none = tl.zeros(entry.shape, tl.float32)
    x = _read(row.param, start, entry, inside, 0.0, PARAM, ALIGNED)
    g = _read(row.grad, start, entry, inside, 0.0, GRAD, ALIGNED)
    e = tl.full(entry.shape, 1.0, tl.float32)
    b, a, zeta, z0 = none, none, none, none
    if o.gain:
        e = _read(row.gain, start, entry, inside, 1.0, tl.float32, ALIGNED)
    if o.momentum:
        b = _read(row.buffer, start, entry, inside, 0.0, STATE, ALIGNED)
    if o.anchor:
        a = _read(row.anchor, start, entry, inside, 0.0, STATE, ALIGNED)
    if o.dual:
        zeta = _read(row.dual, start, entry, inside, 0.0, tl.float32, ALIGNED)
    if o.dual_init:
        z0 = _read(row.dual_init, start, entry, inside, 0.0, tl.float32, ALIGNED)
    return x, g, e, b, a, zeta, z0


@triton.jit
def _write_all(
    row, start, entry, inside, y, b, zeta, o, PARAM: tl.constexpr, STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    _write(row.param, start, entry, inside, y, PARAM, ALIGNED)
    if o.momentum:
        _write(row.buffer, start, entry, inside, b, STATE, ALIGNED)
    if o.dual:
        _write(row.dual, start, entry, inside, zeta, tl.float32, ALIGNED)


@triton.jit
def _mirror(x, move, anchor, zeta, z0, gain, shrink, p, o, K: tl.constexpr):
    """The parameter, and the dual state, after z <- z - move."""
    per_gain = reciprocal(gain) if o.gain else tl.full(x.shape, 1.0, tl.float32)
    u = x * shrink - anchor
    if o.dual:
        if o.decay:
            # What u is without the rounding of the parameter.
            if o.primal:
                u = solve_near((zeta + z0) * per_gain, x - anchor, p, K)
            else:
                u = gain * psi(zeta + z0, p, K)
            u = (u + anchor) * shrink - anchor
            if o.primal:
                zeta = gain * psi(u, p, K) - z0
            else:
                zeta = solve_near(u * per_gain, zeta + z0, p, K) - z0
        zeta -= move
        z = zeta + z0
        y = solve_near(z * per_gain, u, p, K) if o.primal else gain * psi(z, p, K)
    elif o.primal:
        value, slope = psi_and_slope(u, p, K)
        excess = move * per_gain
        y = solve(value - excess, u, excess, slope, p, K)
    else:
        y = gain * psi(solve_near(u * per_gain, u * per_gain, p, K) - move, p, K)
    return y + anchor if o.anchor else y, zeta


@triton.jit
def _update(
    row, start, begin, end, p, rates, status_ptr, o, K: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile: of the entries from ``start`` on those in [begin, end)."""
    entry = tl.arange(0, LANES)
    # The first and the last entry of the tile that belong to the program.
    first = tl.maximum(begin - start, 0).to(tl.int32)
    limit = tl.minimum(end - start, LANES).to(tl.int32)
    whole = limit - first == LANES
    # Without a mask, accesses of 16 bytes.
    if whole:
        x, g, gain, buffer, anchor, zeta, z0 = _read_all(
            row, start, entry, None, o, PARAM, GRAD, STATE, ALIGNED
        )
    else:
        inside = (entry >= first) & (entry < limit)
        x, g, gain, buffer, anchor, zeta, z0 = _read_all(
            row, start, entry, inside, o, PARAM, GRAD, STATE, ALIGNED
        )
    g *= rates.scale
    if o.momentum:
        buffer = rates.momentum * buffer + g
        g = rates.momentum * buffer + g if o.nesterov else buffer
    y, zeta = _mirror(x, rates.lr * g, anchor, zeta, z0, gain, rates.shrink, p, o, K)
    # Rounding to a half precision can overflow.
    finite = tl.abs(y.to(PARAM).to(tl.float32)) < float("inf")
    if o.momentum:
        finite &= tl.abs(buffer.to(STATE).to(tl.float32)) < float("inf")
    if o.dual:
        finite &= tl.abs(zeta) < float("inf")
    failed = any_true(finite == 0)
    if whole & (failed == 0):
        _write_all(row, start, entry, None, y, buffer, zeta, o, PARAM, STATE, ALIGNED)
    else:
        good = (entry >= first) & (entry < limit) & finite
        _write_all(row, start, entry, good, y, buffer, zeta, o, PARAM, STATE, ALIGNED)
    if failed:
        # As newton.Status. Of a solve that ends the step, the iteration limit alone gives +Inf in
        # float32.
        code = tl.full(entry.shape, 2, tl.int32)
        if o.primal:
            code = tl.where(y == float("inf"), 1, code)
        tl.atomic_max(status_ptr, tl.max(tl.where(finite, 0, code)))


@triton.jit
def _step_kernel(
    tensors_ptr, programs_ptr, lr, momentum, weight_decay, grad_scale_ptr, found_inf_ptr,
    status_ptr, K: tl.constexpr, PRIMAL: tl.constexpr, GAIN: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
    DUAL: tl.constexpr, DUAL_INIT: tl.constexpr, LR_ON_DEVICE: tl.constexpr, PARAM: tl.constexpr,
    GRAD: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):
    run = True
    if found_inf_ptr is not None:
        run = tl.load(found_inf_ptr) == 0.0
    if run:
        rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else lr
        scale = -1.0 if MAXIMIZE else 1.0
        if grad_scale_ptr is not None:
            scale = scale / tl.load(grad_scale_ptr).to(tl.float32)
        rates = _Rates(rate, scale, momentum, 1.0 - rate * weight_decay if DECAY else 1.0)

        program = programs_ptr + tl.program_id(0) * 4
        channel = tl.load(program + 1)
        begin = tl.load(program + 2)
        end = tl.load(program + 3)
        at = tensors_ptr + tl.load(program) * _FIELDS
        row = _Row(
            tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
            tl.load(at + 5), tl.load(at + 6),
        )
        w_ptr = tl.load(at + 7).to(tl.pointer_type(tl.float32))
        s_ptr = tl.load(at + 8).to(tl.pointer_type(tl.float32))
        c_ptr = tl.load(at + 9).to(tl.pointer_type(tl.float32))
        channels = tl.load(at + 10)
        if channel >= 0:
            shared = coefficients(w_ptr, s_ptr, c_ptr, channel, channels, K)
            # From the aligned entry before, masked.
            for start in range(begin // _UNIT * _UNIT, end, WIDE):
                _update(
                    row, start, begin, end, shared, rates, status_ptr,
                    _Options(PRIMAL, GAIN, MOMENTUM, NESTEROV, DECAY, ANCHOR, DUAL, DUAL_INIT),
                    K, PARAM, GRAD, STATE, WIDE, True,
                )
        else:
            length = tl.load(at + 11)
            for start in range(begin, end, NARROW):
                # Lanes beyond the end read the coefficients of the last entry.
                entry = tl.minimum(start + tl.arange(0, NARROW), end - 1)
                own = coefficients(w_ptr, s_ptr, c_ptr, entry // length, channels, K)
                _update(
                    row, start, begin, end, own, rates, status_ptr,
                    _Options(PRIMAL, GAIN, MOMENTUM, NESTEROV, DECAY, ANCHOR, DUAL, DUAL_INIT),
                    K, PARAM, GRAD, STATE, NARROW, False,
                )


def step_(step: Step) -> None:
    r"""One mirror step of every parameter, in place, without synchronising.

    One launch for each combination of dtypes and K in the list: one, as a rule. Tensors that are
    neither contiguous nor channels-last are copied there and back. Autograd does not see the
    change.

    Args:
        step: as ``mirror_opt.ops.separable_step_`` says, in float32, bfloat16 or float16 with
            coefficients and dual state of float32; anchors of the dtype of ``buffers``.

    Raises:
        InputError: tensors do not fit each other. Nothing has changed then.
    """
    if not step.params:
        return
    device = step.params[0].device
    lists = plans.lists_of(step)
    grad_scale, found_inf = (
        None if x is None else x.to(device) for x in (step.grad_scale, step.found_inf)
    )
    on_device = step.lr.device == device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launches, copies = plans.plan(lists, device)
        for tensors, programs, compiled_for in launches:
            programs = programs.use()
            _step_kernel[len(programs),](
                tensors.use(), programs, step.lr if on_device else float(step.lr),
                float(step.momentum), float(step.weight_decay), grad_scale, found_inf, step.status,
                **compiled_for, PRIMAL=step.primal, MOMENTUM=step.momentum != 0,
                NESTEROV=step.nesterov, DECAY=step.weight_decay != 0, MAXIMIZE=step.maximize,
                ANCHOR=bool(step.anchors), DUAL=bool(step.duals), DUAL_INIT=bool(step.dual_inits),
                LR_ON_DEVICE=on_device, WIDE=plans.WIDE, NARROW=plans.NARROW, num_warps=_WARPS,
            )
    for original, copy in copies:
        for old, new in zip(original.changed(), copy.changed(), strict=True):
            if new is not old:
                old.copy_(new)
