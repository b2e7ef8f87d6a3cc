r"""The separable map between a change of basis and back, along one mode, as a Triton kernel.

    out = eps u + sum_t M_t^T S_t(M_t u),   S_t(v) = gain_t psi_t(v) elementwise

u is ``(members, h, w)``, matrices whose mode M acts on: the rows (``left``, M u, n = h) or the
columns (u M^T, n = w). M is ``(P, T, n, n)``, gain ``(P, T, h, w)``, and w, s and c are
``(K, P, T, C)``, all contiguous. Member m has the coefficients m % P, and row i of its v those of
channel i // (h / C). All but u are float32; u is float32, bfloat16 or float16; arithmetic is
float32, the matrix products in full (no TF32). 1 <= n <= ``LARGEST_MODE``.

A program reads its columns of u, the lines along which M acts, and writes those of out: nothing in
between, nor a term of the sum, is in memory. It goes through v in slices of 16 of its n entries,

    v[s] = sum_k M[s, k] u[k],   out += M[s, :]^T S(v[s]),

so that neither product has more than 16 entries of a line in flight: the operands of a product that
no tensor core serves are registers, and whole lines of 64 would spill. M and, for n > 16, the lines
of u are read again for every slice, from the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirror_opt.backends.rotation import LARGEST_MODE
from mirror_opt.errors import InputError
from mirror_opt.kernels.device import coefficients, psi
from mirror_opt.kernels.separable import check_device

__all__ = ["rotated"]

# Entries of a slice; no product of blocks is smaller.
_SLICE = 16
# Columns of a tile, warps and registers a thread for the n of a line, rounded up: eight entries of
# out a thread. Without a limit of their own the assembler aims lower, for more warps, and spills.
_TILES = {16: (64, 4, 255), 32: (32, 4, 128), 64: (32, 8, 128), 128: (16, 8, 128)}
# Fewer columns of one channel than this do not fill a tile: then it takes columns of several.
_FEW = 16

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the channel of an entry of v depends on: nothing within a tile, its column, its place on it.
_ONE, _COLUMN, _LINE = (tl.constexpr(i) for i in range(3))


@triton.jit
def _rotated_kernel(
    u_ptr, factor_ptr, gain_ptr, w_ptr, s_ptr, c_ptr, out_ptr, n, columns, stretch, period,
    channels, tiles, eps, T: tl.constexpr, K: tl.constexpr, LEFT: tl.constexpr,
    CHANNEL: tl.constexpr, SLICES: tl.constexpr, SB: tl.constexpr, NB: tl.constexpr,
    CB: tl.constexpr,
):  # fmt: skip
    """A tile of columns. ``stretch``: columns, or for _LINE entries of a line, of one channel."""
    tile = tl.program_id(0) % tiles
    member = tl.program_id(0) // tiles
    if CHANNEL == _ONE:
        channel = tile % channels
        first = channel * stretch + tile // channels * CB
        end = (channel + 1) * stretch
    else:
        first = tile * CB
        end = columns
    column = first + tl.arange(0, CB)[None, :]
    exists = column < end
    along = columns if LEFT else 1
    across = column if LEFT else column * n
    size = tl.cast(n, tl.int64) * columns  # a constant where it is 1
    u_ptr += member * size
    out_ptr += member * size

    entry = tl.arange(0, NB)[:, None]
    inside = (entry < n) & exists
    at = entry * along + across
    out = eps * tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    part = tl.arange(0, SB)
    for t in range(T):
        term = member % period * T + t
        factor = factor_ptr + term * n * n
        gains = gain_ptr + term * size
        for start in range(0, SLICES * SB, SB):
            row = start + part[:, None]
            v = tl.zeros([SB, CB], tl.float32)
            for behind in range(0, SLICES * SB, SB):
                k = behind + part
                known = (row < n) & (k[None, :] < n)
                m = tl.load(factor + row * n + k[None, :], mask=known, other=0.0)
                k = k[:, None]
                x = tl.load(u_ptr + (k * along + across), mask=(k < n) & exists, other=0.0)
                v = tl.dot(m, x.to(tl.float32), v, input_precision="ieee")
            if CHANNEL == _LINE:
                channel = tl.minimum(row, n - 1) // stretch
            elif CHANNEL == _COLUMN:
                channel = tl.minimum(column, end - 1) // stretch
            p = coefficients(
                w_ptr, s_ptr, c_ptr, term * channels + channel, period * T * channels, K
            )
            gain = tl.load(gains + (row * along + across), mask=(row < n) & exists, other=0.0)
            v = gain * psi(v, p, K)
            # M[s, :]^T
            k = start + part[None, :]
            m = tl.load(factor + k * n + entry, mask=(k < n) & (entry < n), other=0.0)
            out = tl.dot(m, v, out, input_precision="ieee")
    tl.store(out_ptr + at, out, mask=inside)


def rotated(
    u: Tensor, factor: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor, eps: float, left: bool
) -> Tensor:
    """out, shaped as ``u`` and in its dtype; one launch.

    Raises:
        InputError: shapes, dtypes or strides are others than the module says, or n is above
            ``LARGEST_MODE``.
    """
    _check(u, factor, gain, (w, s, c), left)
    (members, h, _), (period, terms, n, _), (units, _, _, channels) = u.shape, factor.shape, w.shape
    out = torch.empty_like(u)
    if not u.numel():
        return out
    columns = u[0].numel() // n
    stretch = h // channels
    nb = max(triton.next_power_of_2(n), _SLICE)
    cb, warps, registers = _TILES[nb]
    if left and channels > 1:
        channel = _LINE
    elif stretch < _FEW and channels > 1:
        channel = _COLUMN
    else:
        channel, stretch = _ONE, columns // channels
    tiles = triton.cdiv(columns, cb)
    if channel is _ONE:
        tiles = channels * triton.cdiv(stretch, cb)
    _rotated_kernel[members * tiles,](
        u, factor, gain, w, s, c, out, n, columns, stretch, period, channels, tiles, eps,
        T=terms, K=units, LEFT=left, CHANNEL=channel.value, SLICES=triton.cdiv(n, _SLICE),
        SB=_SLICE, NB=nb, CB=cb, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return out


def _check(
    u: Tensor, factor: Tensor, gain: Tensor, units: tuple[Tensor, Tensor, Tensor], left: bool
) -> None:
    check_device(u)
    (members, h, w), (period, terms, n) = u.shape, factor.shape[:3]
    channels = units[0].shape[-1]
    wanted = {
        "u": (u, u.shape, _DTYPES),
        "factor": (factor, (period, terms, h if left else w, n), _DTYPES[:1]),
        "gain": (gain, (period, terms, h, w), _DTYPES[:1]),
    }
    shape = (len(units[0]), period, terms, channels)
    wanted |= {name: (y, shape, _DTYPES[:1]) for name, y in zip("wsc", units, strict=True)}
    for name, (y, shape, dtypes) in wanted.items():
        if y.shape != shape or y.dtype not in dtypes or not y.is_contiguous():
            raise InputError(
                f"Invalid {name} of shape {tuple(y.shape)}, dtype {y.dtype} and strides "
                f"{y.stride()}: pass {tuple(shape)}, contiguous, {' or '.join(map(str, dtypes))}"
            )
    if members % period or h % channels:
        raise InputError(
            f"Invalid coefficients for {period} members and {channels} channels: pass numbers that "
            f"divide {members} and {h}"
        )
    if n > LARGEST_MODE:
        raise InputError(f"Invalid mode of {n} entries: pass at most {LARGEST_MODE}")
    if max(h * w, factor.numel(), units[0].numel()) >= 2**31:
        raise InputError(
            f"Invalid matrices of {h * w} entries, {factor.numel()} entries of factors and "
            f"{units[0].numel()} coefficients: pass fewer than 2^31 of each"
        )
