"""One mirror-descent step on lists of tensors, out of place."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_opt.dtypes import at_least_float32
from mirror_opt.maps import MirrorMap
from mirror_opt.optim.rounding import round_stochastically
from mirror_opt.optim.scalars import as_scalar, is_zero
from mirror_opt.optim.sharded import OnShards

__all__ = [
    "Rule",
    "Tensors",
    "Update",
    "all_finite",
    "mirror_descent",
    "through",
    "widened",
]

Tensors = list[Tensor]


class Rule(NamedTuple):
    """How a group steps.

    Attributes:
        mirror_map: acts on ``total`` tensors, of which those of a step are the ones at ``slots``.
        lr, momentum, nesterov, weight_decay, maximize: the options of ``MirrorDescent``.
        foreach: use multi-tensor kernels.
        differentiable: autograd records the step.
        draws: round bfloat16 parameters and momentum stochastically, each with this generator.
        coefficients: of the map for the ``total`` tensors, where they are known.
    """

    mirror_map: MirrorMap | OnShards
    slots: list[int]
    total: int
    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    foreach: bool
    differentiable: bool
    draws: Sequence[torch.Generator | None] | None = None
    coefficients: Sequence[Any] | None = None


class Update(NamedTuple):
    """What a step makes of its lists; ``buffers`` and ``duals`` are empty where those given are."""

    params: Tensors
    buffers: Tensors
    duals: Tensors


def mirror_descent(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    buffers: Tensors,
    anchors: Tensors,
    dual_inits: Tensors,
    duals: Tensors,
) -> Update:
    r"""The equations of ``MirrorDescent`` for one parameter group.

    Args:
        params, grads: one entry for each parameter that has a gradient.
        buffers: momentum b_k; empty without momentum.
        anchors: phi_0; empty when the anchor is zero.
        dual_inits: z_0; empty when it is zero.
        duals: zeta = z - z_0; empty for a stateless step.

    Returns:
        New tensors in the dtype of those that they are to replace.

    Raises:
        NewtonError: a solve of the map failed.
    """
    mirror_map, slots, total, lr, momentum, nesterov, weight_decay, maximize, *_ = rule
    draws, differentiable = rule.draws, rule.differentiable
    add, scale = (_foreach_add, _foreach_scale) if rule.foreach else (_forloop_add, _forloop_scale)
    unmoved = is_zero(lr) and not differentiable
    lr = as_scalar(lr, differentiable)
    if isinstance(lr, Tensor) and any(p.dtype == torch.float64 for p in params):
        lr = lr.double()  # else 1 - lr decay would be rounded to the dtype of the rate
    coefficients = mirror_map.coefficients() if rule.coefficients is None else rule.coefficients

    def primal(duals: Tensors) -> Tensors:
        zs = add(duals, dual_inits) if dual_inits else duals
        xs = through(mirror_map.inverse, zs, slots, total, coefficients)
        return add(xs, anchors) if anchors else xs

    def dual(xs: Tensors) -> Tensors:
        xs = add(xs, anchors, -1) if anchors else xs
        zs = through(mirror_map, xs, slots, total, coefficients)
        return add(zs, dual_inits, -1) if dual_inits else zs

    # The direction, operation by operation as SGD computes it.
    directions = scale(grads, -1) if maximize else grads
    new_buffers: Tensors = []
    if buffers and draws is None:
        directions = _as_dtype_of(buffers, directions)
        new_buffers = add(scale(buffers, momentum), directions)
        directions = add(directions, new_buffers, momentum) if nesterov else new_buffers
    elif buffers and draws is not None:
        # Rounded to nearest, buffers would stay as they are where the momentum is near 1.
        directions = widened(directions)
        moving = add(scale(widened(buffers), momentum), directions)
        new_buffers = _drawn(buffers, moving, draws)
        directions = add(directions, moving, momentum) if nesterov else moving

    if unmoved:  # to the last bit, as a way through the map and back would not leave them
        return Update(params, new_buffers, duals)
    zs = duals
    if weight_decay != 0 or not duals:
        # Autograd keeps the point, which must not be the parameter that is overwritten.
        xs = primal(duals) if duals else widened(params, copy=differentiable)
        zs = dual(scale(xs, 1 - lr * weight_decay) if weight_decay != 0 else xs)
    zs = add(zs, widened(directions), -lr)
    xs = primal(zs)
    if draws is not None:
        xs = _drawn(params, xs, draws)
    return Update(_as_dtype_of(params, xs), new_buffers, _as_dtype_of(duals, zs) if duals else [])


def through(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Tensors,
    slots: list[int],
    count: int,
    coefficients: Sequence[Any] | None = None,
) -> Tensors:
    """A map's function on ``count`` places: these tensors at ``slots``, None at the others."""
    full: list[Tensor | None] = [None] * count
    for slot, tensor in zip(slots, tensors, strict=True):
        full[slot] = tensor
    result = function(full, coefficients)
    return [x for slot in slots if (x := result[slot]) is not None]


def widened(xs: Tensors, copy: bool = False) -> Tensors:
    """In at least float32, where a step is computed before it is rounded once."""
    return [x.to(at_least_float32(x.dtype), copy=copy) for x in xs]


def all_finite(tensors: Tensors) -> Tensor:
    """0-dim bool, on the device of the first tensor: whether all entries are finite."""
    device = tensors[0].device if tensors else "cpu"
    tensors = [t.detach() for t in tensors if t.numel()]
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    extremes: Sequence[Tensor]
    if all(t.device.type == "cpu" for t in tensors):
        # Both propagate NaN; here aminmax is the faster by far, on a GPU the multi-tensor norm.
        extremes = [extreme for t in tensors for extreme in torch.aminmax(t)]
    else:
        extremes = torch._foreach_norm(tensors, ord=math.inf)
    # Comparable in one call each: one device, and a dtype that holds every value.
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors})
    return torch.stack([extreme.to(device, dtype) for extreme in extremes]).isfinite().all()


def _as_dtype_of(likes: Tensors, xs: Tensors) -> Tensors:
    return [x.to(like.dtype) for like, x in zip(likes, xs, strict=True)]


def _drawn(likes: Tensors, xs: Tensors, draws: Sequence[torch.Generator | None]) -> Tensors:
    """In the dtypes of others, those of bfloat16 rounded stochastically."""
    return [
        round_stochastically(x, draw) if like.dtype == torch.bfloat16 else x.to(like.dtype)
        for like, x, draw in zip(likes, xs, draws, strict=True)
    ]


def _forloop_add(xs: Tensors, ys: Tensors, alpha: float | Tensor = 1) -> Tensors:
    if isinstance(alpha, Tensor):
        return [x + alpha * y for x, y in zip(xs, ys, strict=True)]
    return [x.add(y, alpha=alpha) for x, y in zip(xs, ys, strict=True)]


def _forloop_scale(xs: Tensors, factor: float | Tensor) -> Tensors:
    return [x * factor for x in xs]


def _foreach_add(xs: Tensors, ys: Tensors, alpha: float | Tensor = 1) -> Tensors:
    if isinstance(alpha, Tensor):
        return list(torch._foreach_add(xs, _foreach_scale(ys, alpha)))
    return list(torch._foreach_add(xs, ys, alpha=alpha))


def _foreach_scale(xs: Tensors, factor: float | Tensor) -> Tensors:
    if isinstance(factor, Tensor) and xs and factor.device != xs[0].device:
        return _forloop_scale(xs, factor)  # only single operations take one that lies elsewhere
    return list(torch._foreach_mul(xs, factor))
