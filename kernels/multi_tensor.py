r"""The mirror step of a whole list of tensors, in place, in one launch.

Two tables in device memory describe the work. ``tensors`` has a row of addresses and sizes for each
tensor, ``programs`` a row for each program: a stretch of one channel, whose coefficients are then
numbers, or a few entries of a tensor whose channels are too short for that. Both are made once and
kept, so that a step is a launch, without synchronising, also while a CUDA graph is captured.

A parameter is seen as ``(C, n)``, with C and K from its coefficients ``(K, C)``. With displacement
u = phi - anchor, direction d (the gradient, or momentum) and S = gain psi,

    stateless    z = grad h((1 - lr decay) phi - anchor)        dual state    z = zeta + z_0
    z <- z - lr d,   phi <- anchor + grad h*(z),   zeta <- z - z_0

where grad h is S and grad h* its inverse (primal), or the other way round (dual). With weight decay
a dual state recomputes z from the decayed, unrounded anchor + grad h*(z). Arithmetic is float32.

An element for which the solve fails, or whose result is not finite in the parameter's dtype, keeps
its parameter and state, and the status tells.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirror_opt.errors import InputError
from mirror_opt.kernels.device import any_true, coefficients, psi, psi_and_slope, solve

__all__ = ["step_"]

# A program does a stretch of a channel tile by tile. Eight entries a thread are two 16-byte
# accesses of float32 and one of the half precisions; one warp a program makes the test of
# convergence a vote without a barrier, and keeps the coefficients in uniform registers.
_WIDE, _STRETCH, _WARPS = 256, 2048, 1
# Channels shorter than this leave more than half of a wide tile idle. Their entries go one to a
# thread, each with its own coefficients.
_NARROW, _SHORT = 32, 128

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NONE, _CHANNEL, _ELEMENT = (tl.constexpr(i) for i in range(3))
_FIELDS = tl.constexpr(12)


@triton.jit
def _read(address, start, entry, inside, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Entries of a tensor in float32; dividing and multiplying shows an alignment of 16 bytes."""
    address += start * (T.primitive_bitwidth // 8)
    if ALIGNED:
        x = tl.load((address // 16 * 16).to(tl.pointer_type(T)) + entry)
    else:
        x = tl.load(address.to(tl.pointer_type(T)) + entry, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _write(address, start, entry, inside, x, T: tl.constexpr, ALIGNED: tl.constexpr):
    address += start * (T.primitive_bitwidth // 8)
    if ALIGNED:
        tl.store((address // 16 * 16).to(tl.pointer_type(T)) + entry, x.to(T))
    else:
        tl.store(address.to(tl.pointer_type(T)) + entry, x.to(T), mask=inside)


@triton.jit
def _read_all(
    row, start, entry, inside, GAIN: tl.constexpr, MOMENTUM: tl.constexpr, ANCHOR: tl.constexpr,
    DUAL: tl.constexpr, DUAL_INIT: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    STATE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """What the step reads of a tile, with zeros for what it does not."""
    param, grad, gain, buffer, anchor, dual, dual_init = row
    zero = tl.zeros(entry.shape, tl.float32)
    x = _read(param, start, entry, inside, PARAM, ALIGNED)
    g = _read(grad, start, entry, inside, GRAD, ALIGNED)
    e = _read(gain, start, entry, inside, tl.float32, ALIGNED) if GAIN == _ELEMENT else zero
    b = _read(buffer, start, entry, inside, STATE, ALIGNED) if MOMENTUM else zero
    a = _read(anchor, start, entry, inside, STATE, ALIGNED) if ANCHOR else zero
    zeta = _read(dual, start, entry, inside, tl.float32, ALIGNED) if DUAL else zero
    z0 = _read(dual_init, start, entry, inside, tl.float32, ALIGNED) if DUAL_INIT else zero
    return x, g, e, b, a, zeta, z0


@triton.jit
def _write_all(
    row, start, entry, inside, y, b, zeta, MOMENTUM: tl.constexpr, DUAL: tl.constexpr,
    PARAM: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):
    param, grad, gain, buffer, anchor, dual, dual_init = row
    _write(param, start, entry, inside, y, PARAM, ALIGNED)
    if MOMENTUM:
        _write(buffer, start, entry, inside, b, STATE, ALIGNED)
    if DUAL:
        _write(dual, start, entry, inside, zeta, tl.float32, ALIGNED)


@triton.jit
def _solve_from(t, x, p):
    value, slope = psi_and_slope(x, p)
    return solve(t, x, value - t, slope, p)


@triton.jit
def _step_kernel(
    tensors_ptr, programs_ptr, lr, momentum, weight_decay, grad_scale_ptr, found_inf_ptr,
    status_ptr, K: tl.constexpr, PRIMAL: tl.constexpr, GAIN: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, ANCHOR: tl.constexpr,
    DUAL: tl.constexpr, DUAL_INIT: tl.constexpr, RATE_ON_DEVICE: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr,
):
    run = True
    if found_inf_ptr is not None:
        run = tl.load(found_inf_ptr) == 0.0
    if run:
        rate = tl.load(lr).to(tl.float32) if RATE_ON_DEVICE else lr
        scale = -1.0 if MAXIMIZE else 1.0
        if grad_scale_ptr is not None:
            scale = scale / tl.load(grad_scale_ptr).to(tl.float32)
        program = programs_ptr + tl.program_id(0) * 4
        channel = tl.load(program + 1)
        begin = tl.load(program + 2)
        end = tl.load(program + 3)
        fields = tensors_ptr + tl.load(program) * _FIELDS
        channels = tl.load(fields + 10)
        row = (
            tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 6),
            tl.load(fields + 7), tl.load(fields + 8), tl.load(fields + 9),
        )
        w_ptr = tl.load(fields + 3).to(tl.pointer_type(tl.float32))
        s_ptr = tl.load(fields + 4).to(tl.pointer_type(tl.float32))
        c_ptr = tl.load(fields + 5).to(tl.pointer_type(tl.float32))
        if channel >= 0:
            p = coefficients(w_ptr, s_ptr, c_ptr, channel, channels, K)
            # Bits below 16 bytes of any address that is used; absent tensors have the address 0.
            PARAM_BYTES: tl.constexpr = PARAM.primitive_bitwidth // 8  # noqa: N806
            low = row[0] + begin * PARAM_BYTES
            low |= row[1] + begin * (GRAD.primitive_bitwidth // 8)
            low |= row[3] + row[4]
            for start in range(begin, end, WIDE):
                _update(
                    row, start, end, channel, p, rate, scale, momentum, weight_decay, status_ptr,
                    (low & 15) == 0, PRIMAL, GAIN, MOMENTUM, NESTEROV, DECAY, ANCHOR, DUAL,
                    DUAL_INIT, PARAM, GRAD, STATE, WIDE,
                )
        else:
            pass
