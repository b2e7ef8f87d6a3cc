r"""The mirror step of a whole list of tensors, in place, in one launch.

Two tables in device memory describe the work: ``tensors`` has a row of addresses and sizes for each
tensor, ``programs`` a row for each program. A program does a stretch of one channel, whose
coefficients are then numbers, or, in a tensor whose channels are too short for that, a few entries
with their own coefficients. The tables are made once for a list and kept, so that a step is one
launch, without synchronising, also while a CUDA graph is captured.

A parameter is seen as ``(C, n)``, with C and K from its coefficients ``(K, C)``. With the direction
d (the gradient, or its momentum) and S = gain psi,

    stateless    z = grad h((1 - lr decay) phi - anchor)        dual state    z = zeta + z_0
    z <- z - lr d,   phi <- anchor + grad h*(z),   zeta <- z - z_0

where grad h is S and grad h* its inverse (primal), or the other way round (dual). With weight decay
a dual state recomputes z from the decayed, unrounded anchor + grad h*(z). Arithmetic is float32.

An element whose solve fails, or whose result is not finite in the parameter's dtype, keeps its
parameter and state, and the status tells.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mirror_opt.kernels.device import (
    any_true,
    coefficients,
    psi,
    psi_and_slope,
    reciprocal,
    solve,
    solve_near,
)
from mirror_opt.kernels.separable import check_device
from torch import Tensor

from mirror_opt.errors import InputError

__all__ = ["step_"]

# A program does a stretch of a channel tile by tile. Eight entries a thread are two 16-byte
# accesses of float32 and one of the half precisions; one warp a program makes the test of
# convergence a vote without a barrier, and keeps the coefficients in uniform registers.
_WIDE, _STRETCH, _WARPS = 256, 2048, 1
# Work is cut into about this many programs before stretches grow.
_PROGRAMS = 2048
# Channels shorter than this leave more than half of a wide tile idle. Their entries go one to a
# thread, which has room for coefficients of its own.
_NARROW, _SHORT = 32, 128

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NONE, _CHANNEL, _ELEMENT = (tl.constexpr(i) for i in range(3))
_FIELDS = tl.constexpr(12)
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
    """What the step reads of a tile, and zeros for what it does not."""
    none = tl.zeros(entry.shape, tl.float32)
    x = _read(row.param, start, entry, inside, 0.0, PARAM, ALIGNED)
    g = _read(row.grad, start, entry, inside, 0.0, GRAD, ALIGNED)
    e, b, a, zeta, z0 = none, none, none, none, none
    if o.gain == _ELEMENT:
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
    per_gain = tl.full(x.shape, 1.0, tl.float32) if o.gain == _NONE else reciprocal(gain)
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
    row, start, begin, end, channel, p, rates, status_ptr, o, K: tl.constexpr,
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
    if o.gain == _CHANNEL:
        gain = tl.load(row.gain.to(tl.pointer_type(tl.float32)) + channel)
        gain = tl.broadcast_to(gain, x.shape)
    g *= rates.scale
    if o.momentum:
        buffer = rates.momentum * buffer + g
        g = rates.momentum * buffer + g if o.nesterov else buffer
    y, zeta = _mirror(x, rates.lr * g, anchor, zeta, z0, gain, rates.shrink, p, o, K)
    # Rounding to a half precision can overflow.
    rounded = tl.abs(y.to(PARAM).to(tl.float32))
    failed = any_true((rounded < float("inf")) == 0)
    if whole & (failed == 0):
        _write_all(row, start, entry, None, y, buffer, zeta, o, PARAM, STATE, ALIGNED)
    else:
        good = (entry >= first) & (entry < limit) & (rounded < float("inf"))
        _write_all(row, start, entry, good, y, buffer, zeta, o, PARAM, STATE, ALIGNED)
    if failed:
        # As newton.Status. The iteration limit alone gives +Inf in float32.
        code = tl.where(y == float("inf"), 1, 2)
        tl.atomic_max(status_ptr, tl.max(tl.where(rounded < float("inf"), 0, code)))


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
                    row, start, begin, end, channel, shared, rates, status_ptr,
                    _Options(PRIMAL, GAIN, MOMENTUM, NESTEROV, DECAY, ANCHOR, DUAL, DUAL_INIT),
                    K, PARAM, GRAD, STATE, WIDE, True,
                )
        else:
            # Lanes beyond the end read the coefficients of the last entry.
            entry = tl.minimum(begin + tl.arange(0, NARROW), end - 1)
            channel_of = entry // tl.load(at + 11)
            own = coefficients(w_ptr, s_ptr, c_ptr, channel_of, channels, K)
            _update(
                row, begin, begin, end, channel_of, own, rates, status_ptr,
                _Options(PRIMAL, GAIN, MOMENTUM, NESTEROV, DECAY, ANCHOR, DUAL, DUAL_INIT),
                K, PARAM, GRAD, STATE, NARROW, False,
            )


class _Item(NamedTuple):
    """One tensor of the list with what belongs to it, all laid out alike; None where absent."""

    param: Tensor
    grad: Tensor
    gain: Tensor | None
    buffer: Tensor | None
    anchor: Tensor | None
    dual: Tensor | None
    dual_init: Tensor | None
    w: Tensor
    s: Tensor
    c: Tensor

    def fields(self) -> tuple[int, ...]:
        """The row of the table of tensors."""
        channels = self.w.shape[1]
        addresses = (0 if x is None else x.data_ptr() for x in self)
        return (*addresses, channels, self.param.numel() // channels)


def _is_wide(row: tuple[int, ...]) -> bool:
    """Whether programs do stretches of a channel: in long channels, at addresses of 16 bytes."""
    return row[-1] >= _SHORT and not any(address % 16 for address in row[:7])


# Tables by what they hold, the last used last. A captured graph reads its tables at every replay,
# so those are kept for good.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_captured: list[Tensor] = []
_MAX_TABLES = 64


def _table(key: tuple, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A table in device memory, copied there without synchronising when it is new."""
    key = (device, *key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        host = make()
        if device.type == "cuda":
            host = host.pin_memory()
        table = host.to(device, non_blocking=True)
        if capturing:
            # The copy is part of the graph: before a replay the table is empty.
            _captured.extend((host, table))
            return table
        _tables[key] = table
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    elif capturing:
        _captured.append(table)
    _tables.move_to_end(key)
    return table


def _programs(shapes: Sequence[tuple[int, int, bool]]) -> Tensor:
    """Rows (tensor, channel or -1, begin, end), int64, for tensors (C, n), wide or not."""
    # Shorter stretches where there is too little work to fill a large GPU with long ones.
    total = sum(channels * n for channels, n, _ in shapes)
    stretch = min(max(total // _PROGRAMS // _WIDE, 1) * _WIDE, _STRETCH)
    rows = []
    for i, (channels, n, wide) in enumerate(shapes):
        if wide:
            pieces = triton.cdiv(n, stretch)
            channel = torch.arange(channels).repeat_interleave(pieces)
            begin = channel * n + torch.arange(pieces).repeat(channels) * stretch
            end = torch.minimum(begin + stretch, (channel + 1) * n)
        else:
            begin = torch.arange(0, channels * n, _NARROW)
            channel = torch.full_like(begin, -1)
            end = (begin + _NARROW).clamp(max=channels * n)
        rows.append(torch.stack([torch.full_like(begin, i), channel, begin, end], 1))
    return torch.cat(rows)


def _check(item: _Item) -> None:
    """Raises InputError unless the tensors of an item fit each other."""
    param, w = item.param, item.w
    check_device(param)
    shape, channels = tuple(param.shape), w.shape[-1]
    if w.dim() != 2 or channels == 0 or param.numel() % channels:
        raise InputError(
            f"Invalid w of shape {tuple(w.shape)} for a parameter of shape {shape}: pass (K, C), "
            "where C divides its number of elements"
        )
    floats, single = tuple(_DTYPES), (torch.float32,)
    dtypes_of = dict.fromkeys(_Item._fields, single)
    dtypes_of |= dict.fromkeys(("param", "grad", "buffer", "anchor"), floats)
    for name, x in item._asdict().items():
        shapes = [tuple(w.shape)] if name in "wsc" else [shape]
        if name == "gain":
            shapes.append((channels,))
        if x is not None and (x.dtype not in dtypes_of[name] or tuple(x.shape) not in shapes):
            raise InputError(
                f"Invalid {name} of shape {tuple(x.shape)} and dtype {x.dtype}: pass "
                f"{' or '.join(map(str, shapes))}, {' or '.join(map(str, dtypes_of[name]))}"
            )
    states = {x.dtype for x in (item.buffer, item.anchor) if x is not None}
    if len(states) > 1:
        raise InputError(f"buffers and anchors of dtypes {states}: pass one dtype for both")


def _laid_out(item: _Item) -> _Item:
    """The item with all tensors in one order in memory, as they are where that is so already."""
    # A channels-last weight keeps its output channels outermost: it is served as it lies.
    param, layout = item.param, torch.contiguous_format
    if param.dim() == 4 and not param.is_contiguous() and item.w.shape[1] in (1, param.shape[0]):
        layout = torch.channels_last
    return _Item(
        *(
            x if x is None
            else x.contiguous(memory_format=layout) if x.shape == param.shape
            else x.contiguous()
            for x in item
        )
    )


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float | Tensor,
    gains: Sequence[Tensor] | None,
    ws: Sequence[Tensor],
    ss: Sequence[Tensor],
    cs: Sequence[Tensor],
    *,
    primal: bool,
    buffers: Sequence[Tensor] | None = None,
    anchors: Sequence[Tensor] | None = None,
    duals: Sequence[Tensor] | None = None,
    dual_inits: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    status: Tensor | None = None,
) -> Tensor:
    r"""One mirror step of every parameter, in place, without synchronising.

    One launch for each combination of dtypes, K and kind of gain in the list: one, as a rule.
    Tensors that are neither contiguous nor channels-last are copied there and back. Autograd does
    not see the change.

    Args:
        params: float32, bfloat16 or float16, of any shape.
        grads: as ``params``.
        lr: a number, or a tensor with one element, read where it is.
        gains: float32, shaped as the parameter or ``(C,)``; None: 1.
        ws, ss, cs: coefficients of psi, float32 ``(K, C)``; a parameter is seen as ``(C, n)``.
        primal: S is grad h, else grad h*.
        buffers: momentum b, changed; needed when ``momentum`` is not 0.
        anchors: None: 0. Of the dtype of ``buffers``.
        duals: zeta, float32, changed; None: a stateless step.
        dual_inits: z_0, float32; None: 0.
        momentum, nesterov, weight_decay, maximize: as in ``mirror_opt.MirrorDescent``.
        grad_scale: one element; the gradients are divided by it.
        found_inf: one element; unless it is 0 nothing changes.
        status: int32 ``(1,)``, raised to the worst ``newton.Status``; None: a new one.

    Returns:
        The status.

    Raises:
        InputError: tensors do not fit each other. Nothing has changed then.
    """
    if (momentum != 0) != (buffers is not None):
        raise InputError(f"Invalid {momentum=}: pass buffers with a momentum, and None without")
    lists = (params, grads, gains, buffers, anchors, duals, dual_inits, ws, ss, cs)
    absent: Sequence[None] = [None] * len(params)
    if any(x is not None and len(x) != len(params) for x in lists):
        raise InputError(f"lists of {[len(x or ()) for x in lists]} tensors: pass one of each")
    given = [_Item(*x) for x in zip(*(absent if x is None else x for x in lists), strict=True)]
    for item in given:
        _check(item)
    if status is None:
        status = torch.zeros(1, dtype=torch.int32, device=params[0].device if params else None)
    given = [item for item in given if item.param.numel()]
    items = [_laid_out(item) for item in given]
    groups = defaultdict(list)
    for item in items:
        state = next((x.dtype for x in (item.buffer, item.anchor) if x is not None), torch.float32)
        gain = _NONE if item.gain is None else _ELEMENT
        if item.gain is not None and item.gain.shape != item.param.shape:
            gain = _CHANNEL
        key = (item.param.dtype, item.grad.dtype, state, item.w.shape[0], gain.value)
        groups[key].append(item.fields())
    on_device = isinstance(lr, Tensor) and lr.device == status.device
    for (param, grad, state, k, gain), rows in groups.items():
        shapes = tuple((*row[-2:], _is_wide(row)) for row in rows)
        programs = _table(("programs", shapes), status.device, lambda s=shapes: _programs(s))
        tensors = _table(("tensors", *rows), status.device, lambda r=rows: torch.tensor(r))
        _step_kernel[len(programs),](
            tensors, programs, lr if on_device else float(lr), float(momentum),
            float(weight_decay), grad_scale, found_inf, status,
            K=k, PRIMAL=primal, GAIN=gain, MOMENTUM=momentum != 0, NESTEROV=nesterov,
            DECAY=weight_decay != 0, MAXIMIZE=maximize, ANCHOR=anchors is not None,
            DUAL=duals is not None, DUAL_INIT=dual_inits is not None, LR_ON_DEVICE=on_device,
            PARAM=_DTYPES[param], GRAD=_DTYPES[grad], STATE=_DTYPES[state],
            WIDE=_WIDE, NARROW=_NARROW, num_warps=_WARPS,
        )
    for before, item in zip(given, items, strict=True):
        for old, new in (
            (before.param, item.param), (before.buffer, item.buffer), (before.dual, item.dual)
        ):
            if new is not old:
                old.copy_(new)
    return status
