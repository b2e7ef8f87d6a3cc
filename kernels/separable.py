r"""The separable map S(u) = gain psi(u) as Triton kernels: forward, inverse, step and backward.

Tensors are seen as rows that share coefficients: u ``(rows, n)``, gain ``(gain_rows, n)``, and w, s
and c ``(K, columns)``, all contiguous. Row r has the coefficients of column ``r % columns`` and the
gains of row ``r % gain_rows``; ``rows`` is a multiple of both. gain, w, s and c are float32; u, and
what is shaped like it, is float32, bfloat16 or float16; arithmetic is float32. sigma is the
algebraic t / sqrt(1 + t^2).

A solve returns its status, 0-dim int32, the worst ``newton.Status``, without synchronising;
entries that were not solved are NaN. Sums are taken in an order that the shapes alone decide, so
that a result is the same bit for bit whenever it is computed again.
"""

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

__all__ = ["backward", "check_device", "forward", "inverse", "step"]

# Entries of a tile and its rows: short rows share a warp, so that its lanes are not idle. Eight
# entries a thread are two 16-byte accesses of float32 and one of the half precisions. One warp a
# program makes the test of convergence a vote, without a barrier.
_TILES = ((1, 32), (4, 8), (16, 2), (64, 1), (256, 1))
_WARPS = 1
# Tiles of a row that one program does, since every program reads the coefficients.
_ROUNDS = 8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORWARD, _INVERSE, _STEP = (tl.constexpr(i) for i in range(3))


@triton.jit
def _tile(rows, tiles, CB: tl.constexpr, NB: tl.constexpr):
    """The rows of a program, in reach, and which of them exist; its entries; which tile it is."""
    index = tl.program_id(0)
    tile = (index % tiles).to(tl.int64)
    if CB > 1:
        row = index // tiles * CB + tl.arange(0, CB)[:, None]
        return tl.minimum(row, rows - 1), row < rows, tl.arange(0, NB)[None, :], tile
    else:
        row = index // tiles
        return row, row < rows, tl.arange(0, NB), tile


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_solved(out_ptr, status_ptr, at, inside, y):
    """Stores y; where it is not finite, as it is stored, NaN, and the status."""
    finite = tl.abs(y.to(out_ptr.dtype.element_ty).to(tl.float32)) < float("inf")
    if any_true(finite == 0):
        # As newton.Status; see ``solve`` for what tells one from the other.
        code = tl.where(finite, 0, tl.where(y == float("inf"), 1, 2))
        tl.atomic_max(status_ptr, tl.max(code))
        y = tl.where(finite, y, float("nan"))
    tl.store(out_ptr + at, y, mask=inside)


@triton.jit
def _map_kernel(
    x_ptr, g_ptr, lr_ptr, gain_ptr, w_ptr, s_ptr, c_ptr, out_ptr, status_ptr, rows, n, columns,
    gain_rows, tiles, K: tl.constexpr, KIND: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """out = S(x), S^-1(x) or S^-1(S(x) - lr g)."""
    row, exists, entries, tile = _tile(rows, tiles, CB, NB)
    p = coefficients(w_ptr, s_ptr, c_ptr, row % columns, columns, K)
    if KIND == _STEP:
        rate = tl.load(lr_ptr).to(tl.float32)
    first = tile * (NB * ROUNDS)
    for start in range(first, tl.minimum(first + NB * ROUNDS, n), NB):
        entry = start + entries
        inside = exists & (entry < n)
        at = row.to(tl.int64) * n + entry
        x = _load(x_ptr, at, inside)
        gain_at = (row % gain_rows).to(tl.int64) * n + entry
        gain = tl.load(gain_ptr + gain_at, mask=inside, other=1.0)
        if KIND == _FORWARD:
            tl.store(out_ptr + at, gain * psi(x, p, K), mask=inside)
        elif KIND == _INVERSE:
            # Without a better start: |psi(t) - t| is bounded.
            t = x * reciprocal(gain)
            _store_solved(out_ptr, status_ptr, at, inside, solve_near(t, t, p, K))
        else:
            excess = rate * _load(g_ptr, at, inside) * reciprocal(gain)
            value, slope = psi_and_slope(x, p, K)
            y = solve(value - excess, x, excess, slope, p, K)
            _store_solved(out_ptr, status_ptr, at, inside, y)


@triton.jit
def _backward_kernel(
    grad_ptr, u_ptr, gain_ptr, w_ptr, s_ptr, c_ptr, grad_u_ptr, grad_gain_ptr, partial_ptr,
    rows, n, columns, gain_rows, tiles,
    K: tl.constexpr, INVERTED: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
):
    """Gradients in u and gain of one tile, and the tile's share of those in w, s and c.

    The latter are sum q d_theta psi(u) with a weight q for each entry. A tile leaves its sums over
    the entries of q (sigma - sigma_0), q (sigma' - sigma'_0) and q u sigma' for each unit, with
    sigma_0 that at u = 0, as one column of ``(3 K, sharing rows and their tiles, columns)``. Taken
    apart entry by entry, the differences are exact near u = 0, and zero there.
    """
    row, exists, entries, tile = _tile(rows, tiles, CB, NB)
    channel = row % columns
    p = coefficients(w_ptr, s_ptr, c_ptr, channel, columns, K)
    entry = tile * NB + entries
    inside = exists & (entry < n)
    at = row.to(tl.int64) * n + entry
    grad = _load(grad_ptr, at, inside)
    u = _load(u_ptr, at, inside)
    gain_at = (row % gain_rows).to(tl.int64) * n + entry
    gain = tl.load(gain_ptr + gain_at, mask=inside, other=1.0)
    value, slope = psi_and_slope(u, p, K)
    if INVERTED:
        grad_u = grad / (gain * slope)
        grad_gain = -grad_u * value
        q = -grad_u * gain
    else:
        q = grad * gain
        grad_u = q * slope
        grad_gain = grad * value
    tl.store(grad_u_ptr + at, grad_u, mask=inside)
    tl.store(grad_gain_ptr + at, grad_gain, mask=inside)

    LAST: tl.constexpr = CB > 1  # the axis of the entries
    # An argument of 1 is a constant, which has no .to().
    stretch = tl.cast(rows // columns, tl.int64) * tiles * columns
    to = partial_ptr + ((row // columns).to(tl.int64) * tiles + tile) * columns + channel
    # Not unrolled: the sums of all units in flight at once would spill.
    for k in range(K):
        unit = load_unit(w_ptr, s_ptr, c_ptr, k, channel, columns)
        value, slope, lever = sigmoid_sums(u, q, unit, p)
        _store_sum(to + 3 * k * stretch, value, exists, LAST)
        _store_sum(to + (3 * k + 1) * stretch, slope, exists, LAST)
        _store_sum(to + (3 * k + 2) * stretch, lever, exists, LAST)


@triton.jit
def _store_sum(to, x, exists, LAST: tl.constexpr):
    """Stores the sums over the entries of x; those outside are zero, as their gradient was."""
    if LAST:
        tl.store(to, tl.sum(x, 1, keep_dims=True), mask=exists)
    else:
        tl.store(to, tl.sum(x, 0), mask=exists)


@triton.jit
def _sum_stretch(partial_ptr, slot, length, columns, channel, JB: tl.constexpr, CB: tl.constexpr):
    """One slot of the tiles' sums, for a block of channels: ``(CB,)``."""
    total = tl.zeros([JB, CB], tl.float32)
    base = partial_ptr + slot * tl.cast(length, tl.int64) * columns
    for start in range(0, length, JB):
        at = start + tl.arange(0, JB)[:, None]
        inside = (at < length) & (channel[None, :] < columns)
        at = at.to(tl.int64) * columns + channel[None, :]
        total += tl.load(base + at, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _collect_kernel(
    partial_ptr, w_ptr, s_ptr, c_ptr, grad_w_ptr, grad_s_ptr, grad_c_ptr, length, columns,
    JB: tl.constexpr, CB: tl.constexpr,
):
    """The second stage of the sums, and the gradients in w, s and c of unit k from them."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    inside = channel < columns
    k = tl.program_id(1)
    at = k * columns + channel
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    s = tl.load(s_ptr + at, mask=inside, other=0.0)
    c = tl.load(c_ptr + at, mask=inside, other=0.0)
    values = _sum_stretch(partial_ptr, 3 * k, length, columns, channel, JB, CB)
    slopes = _sum_stretch(partial_ptr, 3 * k + 1, length, columns, channel, JB, CB)
    levers = _sum_stretch(partial_ptr, 3 * k + 2, length, columns, channel, JB, CB)
    # reference.psi_units_gradient, the terms of u apart from those of c.
    tl.store(grad_w_ptr + at, values, mask=inside)
    tl.store(grad_s_ptr + at, w * (levers - c * slopes), mask=inside)
    tl.store(grad_c_ptr + at, -w * s * slopes, mask=inside)


def forward(u: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """S(u), shaped as ``u`` and in its dtype."""
    return _map(_FORWARD, u, None, None, gain, (w, s, c))[0]


def inverse(t: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """S^-1(t), shaped as ``t`` and in its dtype, and the status."""
    return _map(_INVERSE, t, None, None, gain, (w, s, c))


def step(
    x: Tensor, g: Tensor, lr: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """S^-1(S(x) - lr g), shaped as ``x`` and in its dtype, and the status; ``lr`` is 0-dim."""
    return _map(_STEP, x, g, lr, gain, (w, s, c))


def backward(
    grad: Tensor, at: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, inverted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of S in u = ``at``, gain, w, s and c, from that of S(u); two launches.

    With ``inverted`` those of S^-1, whose value is ``at``. The gain's is ``(rows, n)`` float32: one
    for each entry.
    """
    _check(gain, (w, s, c), at=at, grad=grad)
    (rows, n), (units, columns) = at.shape, w.shape
    grad_u, grad_gain = torch.empty_like(at), torch.empty_like(at, dtype=torch.float32)
    sums = [torch.zeros_like(x) for x in (w, s, c)]
    if not at.numel():
        return grad_u, grad_gain, *sums
    nb, cb = _tile_shape(n)
    tiles = triton.cdiv(n, nb)
    length = rows // columns * tiles
    partial = w.new_empty(3 * units, length, columns)
    _backward_kernel[triton.cdiv(rows, cb) * tiles,](
        grad, at, gain, w, s, c, grad_u, grad_gain, partial, rows, n, columns, gain.shape[0],
        tiles, K=units, INVERTED=inverted, CB=cb, NB=nb, num_warps=_WARPS,
    )
    if units:
        # 1024 lanes, along the columns first, where the sums are contiguous.
        cb = min(triton.next_power_of_2(columns), 32)
        jb = min(triton.next_power_of_2(length), 1024 // cb)
        _collect_kernel[triton.cdiv(columns, cb), units](
            partial, w, s, c, *sums, length, columns, JB=jb, CB=cb, num_warps=4
        )
    return grad_u, grad_gain, *sums


def _map(
    kind: tl.constexpr, x: Tensor, g: Tensor | None, lr: Tensor | None, gain: Tensor,
    units: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    _check(gain, units, x=x, **({} if g is None else {"g": g}))
    (rows, n), (count, columns) = x.shape, units[0].shape
    out = torch.empty_like(x)
    status = torch.zeros((), dtype=torch.int32, device=x.device)
    if out.numel():
        nb, cb = _tile_shape(n)
        tiles = triton.cdiv(n, nb * _ROUNDS)
        _map_kernel[triton.cdiv(rows, cb) * tiles,](
            x, g, lr, gain, *units, out, status, rows, n, columns, gain.shape[0], tiles,
            K=count, KIND=kind.value, CB=cb, NB=nb, ROUNDS=_ROUNDS, num_warps=_WARPS,
        )
    return out, status


def _tile_shape(n: int) -> tuple[int, int]:
    """The smallest tile that holds a row; long rows take several of the largest."""
    return next((tile for tile in _TILES if tile[0] >= n), _TILES[-1])


def check_device(x: Tensor) -> None:
    """Raises InputError where Triton has no way to run."""
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise InputError(
            f"Triton kernels cannot run on {x.device}: pass CUDA tensors, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )


def _check(gain: Tensor, units: tuple[Tensor, Tensor, Tensor], **xs: Tensor) -> None:
    """Raises InputError unless the tensors fit the first of ``xs``."""
    x, w = next(iter(xs.values())), units[0]
    check_device(x)
    wanted = {"gain": (gain, (gain.shape[0], x.shape[-1]), _DTYPES[:1])}
    wanted |= {name: (y, w.shape, _DTYPES[:1]) for name, y in zip("wsc", units, strict=True)}
    wanted |= {name: (y, x.shape, _DTYPES) for name, y in xs.items()}
    for name, (y, shape, dtypes) in wanted.items():
        if y.device != x.device:
            raise InputError(f"Invalid {name} on {y.device}: pass tensors on {x.device}")
        if y.dim() != 2 or y.shape != shape or y.dtype not in dtypes or not y.is_contiguous():
            raise InputError(
                f"Invalid {name} of shape {tuple(y.shape)}, dtype {y.dtype} and strides "
                f"{y.stride()}: pass {tuple(shape)}, contiguous, {' or '.join(map(str, dtypes))}"
            )
    # Of the products of indices, those with n are of 64 bits.
    if max(x.shape[0] + _TILES[0][1], w.numel(), gain.shape[0]) >= 2**31:
        raise InputError(
            f"Invalid operands of {x.shape[0]} rows and {w.numel()} coefficients: pass fewer than "
            "2^31 to the Triton kernels, or choose use_backend('torch')"
        )
    for name, count in (("gain", gain.shape[0]), ("w", w.shape[1])):
        if x.shape[0] % max(count, 1):
            raise InputError(
                f"Invalid {name} for {count} rows: pass a number that divides {x.shape[0]}"
            )
