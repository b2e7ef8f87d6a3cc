r"""The separable map between a change of basis and back, along one mode of a tensor.

    separable_rotated(u) = eps u + sum_t M_t^T S_t(M_t u)

is what ``maps.KroneckerNeural`` is made of: all of it for tensors with one mode of more than one
entry, and its innermost part for others. As separate operators it is a pass over the tensor (a read
and a write) for M, one for S, one for M^T, one for the sum of several terms and one for eps u; the
kernel makes it one. The passes of a whole map with one term:

    modes                 separate    with the kernel
    (n, 1) or (1, n)         6         1
    (out, in)                6         4
    (out, 1, k k)            8         4
    (out, in, k k)           8         6

With R terms all but the last, eps u, go over R tensors, and one more sums them; the kernel of a
single mode takes the sum in and stays one pass. (Not counted, since they are the same in both
columns: copies that ``torch.matmul`` makes of a factor that it broadcasts along earlier modes.)

What it cannot save: the products of the other modes, since a program would need all of a tensor;
anything for vectors, which have no M (S and eps u are 2), or where neither the first nor the last
mode has at most ``LARGEST_MODE`` entries: such products are bounded by multipliers, not by memory.
Nor does it save anything for gradients: backward needs M u and S(M u) and computes them again, 2
passes, as many as were saved, for 2 tensors less to keep.
"""

import torch
from torch import Tensor

from mirror_opt import backends
from mirror_opt.backends import plain, triton
from mirror_opt.backends.rotation import LARGEST_MODE, Rotation
from mirror_opt.errors import InputError
from mirror_opt.ops.separable import _call, _empty_like, _implementation, _library, _register
from mirror_opt.reference import Units

__all__ = ["LARGEST_MODE", "rotation_is_fused", "separable_rotated"]

_library.define(
    "separable_rotated(Tensor u, Tensor factor, Tensor gain, Tensor w, Tensor s, Tensor c,"
    " float eps, bool left, str sigma) -> Tensor"
)


def _fake(u: Tensor, *args) -> Tensor:
    return _empty_like(u)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.left, ctx.sigma = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad: Tensor):
    u, factor, gain, *units = ctx.saved_tensors
    rotation = Rotation(u.shape, factor, gain, units, ctx.left)
    coefficients = (rotation.gain, *rotation.units, ctx.sigma)
    v = rotation.rotate(u)
    grad_v, grad_gain, *grad_units = _call(
        "separable_backward", rotation.rotate(grad), v, *coefficients, False
    )
    grad_factor = None
    if ctx.needs_input_grad[1]:
        y = _call("separable_forward", v, *coefficients)
        grad_factor = rotation.factor_gradient(y, grad) + rotation.factor_gradient(grad_v, u)
    return (
        ctx.eps * grad + rotation.back(grad_v),
        grad_factor,
        grad_gain.reshape(gain.shape),
        *(g.reshape(x.shape) for g, x in zip(grad_units, units, strict=True)),
        None,
        None,
        None,
    )


def _vmap(info, dims, *args):
    (u, *coefficients), batch = args[:6], info.batch_size
    u = u.expand(batch, *u.shape) if dims[0] is None else u.movedim(dims[0], 0)
    members = u.shape[1]
    # Coefficients that do not vary are shared by all members, as they are; else each has its own.
    if any(dim is not None for dim in dims[1:6]):
        for i, (x, dim) in enumerate(zip(coefficients, dims[1:6], strict=True)):
            at = 0 if i < 2 else 1  # behind K
            x = x.unsqueeze(at) if dim is None else x.movedim(dim, at)
            repeats = members // x.shape[at + 1]
            x = x.unsqueeze(at + 1).expand(*x.shape[:at], batch, repeats, *x.shape[at + 1 :])
            coefficients[i] = x.flatten(at, at + 2)
    result = _call("separable_rotated", u.flatten(0, 1), *coefficients, *args[6:])
    return result.unflatten(0, (batch, members)), 0


_register(
    "separable_rotated",
    _implementation("rotated", 0, 3, 8),
    _fake,
    _save,
    _gradient,
    _vmap,
    plain.rotated,
)


def rotation_is_fused(u: Tensor, units: int, sigma: str) -> bool:
    """Whether ``separable_rotated`` of tensors like u with K units is one kernel.

    Raises:
        InputError: the backend that was chosen by name does not serve separable maps of u.
    """
    if torch.compiler.is_compiling():  # what backend serves is decided when the graph runs
        return u.is_cuda and u.dtype == torch.float32 and sigma == "algebraic"
    return backends.choose("forward", u, units, sigma) is triton


def separable_rotated(
    u: Tensor,
    factor: Tensor,
    gain: Tensor,
    units: Units,
    sigma: str = "algebraic",
    *,
    eps: float = 0.0,
    left: bool,
) -> Tensor:
    r"""eps u + sum_t M_t^T S_t(M_t u), S_t = gain_t psi_t, differentiable to any order.

    Args:
        u: ``(members, h, w)``, floating: matrices.
        factor: M, ``(P, T, n, n)`` for a P that divides ``members``: member m has those of m % P.
        gain: positive, ``(P, T, h, w)``.
        units: coefficients ``(K, P, T, C)`` of C channels, equal stretches of the rows of M u.
        sigma: a key of ``reference.SIGMAS``.
        eps: weight of the identity.
        left: M mixes the rows, M u with n = h; else the columns, u M^T with n = w. n is at most
            ``LARGEST_MODE``.

    Returns:
        ``(members, h, w)``, contiguous.

    Raises:
        InputError: the shapes or dtypes do not fit, or the backend that was chosen by name does
            not serve these operands.

    Example:
        >>> u, eye = torch.randn(1, 2, 5), torch.eye(2).expand(1, 3, 2, 2)
        >>> gain, unit = torch.ones(1, 3, 2, 5), torch.zeros(0, 1, 3, 1)
        >>> y = separable_rotated(u, eye, gain, Units(unit, unit, unit), eps=0.5, left=True)
        >>> torch.allclose(y, 3.5 * u)
        True
    """
    tensors = (u, factor, gain, *units)
    shapes = [tuple(x.shape) for x in tensors]
    if u.dim() != 3 or factor.dim() != 4 or units.w.dim() != 4:
        raise InputError(
            f"got shapes {shapes}: pass (members, h, w), (P, T, n, n) and (K, P, T, C)"
        )
    (members, h, w), (period, terms), (count, *_, channels) = (
        u.shape,
        factor.shape[:2],
        units.w.shape,
    )
    n = h if left else w
    wanted = [(period, terms, n, n), (period, terms, h, w), *3 * [(count, period, terms, channels)]]
    if shapes[1:] != wanted or members % max(period, 1) or h % max(channels, 1):
        raise InputError(
            f"factor, gain, w, s and c of u {shapes[0]} have shapes {shapes[1:]}: pass {wanted}, "
            f"with a P that divides {members} and a C that divides {h}"
        )
    if not (u.numel() and period and channels):
        raise InputError(
            f"got u of shape {shapes[0]} and {channels} channels: pass at least one entry"
        )
    if n > LARGEST_MODE:
        raise InputError(f"got a mode of {n} entries: pass at most {LARGEST_MODE}")
    if len({x.dtype for x in tensors}) > 1:
        raise InputError(f"got dtypes {[x.dtype for x in tensors]}: pass one")
    return _call("separable_rotated", *tensors, float(eps), left, sigma)
