r"""S, its inverse and a mirror step, elementwise, with gradients of every order.

Implicit differentiation (Blondel et al., "Efficient and modular implicit differentiation", 2022):
with y = S^-1(t) and q = dL/dy / S'(y),

    dL/dt = q,   dL/dtheta = -sum q d_theta S(y)

for the gain and the coefficients theta. Backward needs y only, none of the Newton iterations. Its
own gradients are those of the formulas in plain PyTorch, so that every order is right.

Under ``torch.func`` transforms the operators go through ``torch.autograd.Function``, since
gradients registered with ``torch.library`` do not compose with them. In forward mode, which neither
has at every order, all is plain PyTorch: S^-1 is then a few steps of Newton from the root itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mirror_opt import backends, reference
from mirror_opt.backends import plain
from mirror_opt.newton import NewtonError, Status
from mirror_opt.reference import Units

__all__ = ["separable_forward", "separable_inverse", "separable_step"]

_MAP = "Tensor gain, Tensor w, Tensor s, Tensor c, str sigma"
_library = torch.library.Library("mirror_opt", "DEF")
_library.define(f"separable_forward(Tensor u, {_MAP}) -> Tensor")
_library.define(f"separable_inverse(Tensor t, {_MAP}) -> (Tensor, Tensor)")
_library.define(f"separable_step(Tensor x, Tensor g, Tensor lr, {_MAP}) -> (Tensor, Tensor)")
_library.define(
    f"separable_backward(Tensor grad, Tensor at, {_MAP}, bool inverted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# How they run: real tensors, and tensors that have only a shape.


def _implementation(operator: str, x: int, w: int, sigma: int) -> Callable:
    """Calls the backend that serves the arguments at these places."""

    def run(*args):
        module = backends.choose(operator, args[x], len(args[w]), args[sigma])
        return getattr(module, operator)(*args)

    return run


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


def _fake_forward(u: Tensor, *args) -> Tensor:
    return _empty_like(u)


def _fake_solve(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    return _empty_like(x), x.new_empty((), dtype=torch.int32)


def _fake_backward(grad: Tensor, *args) -> tuple[Tensor, ...]:
    return tuple(_empty_like(x) for x in args[:5])


# Gradients.


def _save_forward(ctx, inputs, output) -> None:
    *tensors, ctx.sigma = inputs
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx, grad: Tensor):
    return *_call("separable_backward", grad, *ctx.saved_tensors, ctx.sigma, False), None


def _save_inverse(ctx, inputs, output) -> None:
    _, *coefficients, ctx.sigma = inputs
    y, status = output
    ctx.mark_non_differentiable(status)
    ctx.save_for_backward(y, *coefficients)


def _inverse_gradient(ctx, grad: Tensor, _):
    return *_call("separable_backward", grad, *ctx.saved_tensors, ctx.sigma, True), None


def _save_step(ctx, inputs, output) -> None:
    *tensors, ctx.sigma = inputs
    y, status = output
    ctx.mark_non_differentiable(status)
    ctx.save_for_backward(y, *tensors)


def _step_gradient(ctx, grad: Tensor, _):
    y, x, g, lr, *coefficients = ctx.saved_tensors
    q, *at_y = _call("separable_backward", grad, y, *coefficients, ctx.sigma, True)
    grad_x, *at_x = _call("separable_backward", q, x, *coefficients, ctx.sigma, False)
    both = (a + b for a, b in zip(at_x, at_y, strict=True))
    return grad_x, -lr * q, -(g * q).sum(), *both, None


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.sigma, ctx.inverted = inputs
    ctx.save_for_backward(*tensors)


def _backward_gradient(ctx, *grads: Tensor):
    def formula(grad: Tensor, at: Tensor, gain: Tensor, w: Tensor, s: Tensor, c: Tensor):
        return plain.backward(grad, at, gain, w, s, c, ctx.sigma, ctx.inverted)

    pull = torch.func.vjp(formula, *ctx.saved_tensors)[1]
    return *pull(grads), None, None


# vmap: the mapped dimension goes first, that of w, s and c behind K.


def _batch(info, dims: Sequence[int | None], args: Sequence, places: str, shared: bool) -> list:
    """Arguments with the mapped dimension.

    ``places`` has a letter for each tensor: x, shaped as the result; g, the gain; k, w, s or c.
    ``shared`` lets gain or coefficients broadcast along the mapped dimension if they do not vary.
    """
    vary = {place for place, dim in zip(places, dims, strict=False) if dim is not None}
    moved = list(args)
    for i, place in enumerate(places):
        to = 1 if place == "k" else 0
        x = args[i].unsqueeze(to) if dims[i] is None else args[i].movedim(dims[i], to)
        if place == "x" or place in vary or not shared:
            x = x.expand(*x.shape[:to], info.batch_size, *x.shape[to + 1 :])
        moved[i] = x
    return moved


def _vmap_forward(info, dims, *args):
    return _call("separable_forward", *_batch(info, dims, args, "xgkkk", shared=True)), 0


def _vmap_inverse(info, dims, *args):
    result = _call("separable_inverse", *_batch(info, dims, args, "xgkkk", shared=True))
    return result, (0, None)


def _vmap_step(info, dims, x: Tensor, g: Tensor, lr: Tensor, *args):
    places = (*dims[:2], *dims[3:])
    x, g, *rest = _batch(info, places, (x, g, *args), "xxgkkk", shared=True)
    if dims[2] is not None:  # a rate for each: the operator takes one, so they go into g
        g, lr = g * lr.reshape(-1, *[1] * (g.dim() - 1)), lr.new_ones(())
    return _call("separable_step", x, g, lr, *rest), (0, None)


def _vmap_backward(info, dims, *args):
    # Not shared: a gradient for each.
    batched = _batch(info, dims, args, "xxgkkk", shared=False)
    return _call("separable_backward", *batched), (0, 0, 1, 1, 1)


# All of it together.

_OPERATORS: dict[str, Callable] = {}
_FUNCTIONS: dict[str, Callable] = {}
_IN_FORWARD_MODE: dict[str, Callable] = {}


def _register(
    name: str,
    run: Callable,
    fake: Callable,
    save: Callable,
    gradient: Callable,
    vmap: Callable,
    forward_mode: Callable,
) -> None:
    """An operator, and the function that takes its place in forward mode."""
    _library.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"mirror_opt::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, gradient, setup_context=save, lib=_library)
    torch.library.register_vmap(qualified, vmap, lib=_library)
    operator = getattr(torch.ops.mirror_opt, name).default
    _OPERATORS[name] = operator
    methods = {"forward": operator, "setup_context": save, "backward": gradient, "vmap": vmap}
    function: Any = type(
        name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()}
    )
    _FUNCTIONS[name] = function.apply
    _IN_FORWARD_MODE[name] = forward_mode


def _call(name: str, *args):
    if torch.compiler.is_compiling():
        return _OPERATORS[name](*args)
    if torch.autograd.forward_ad._current_level >= 0:
        return _IN_FORWARD_MODE[name](*args)
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name](*args)
    return _OPERATORS[name](*args)


def _differentiable_inverse(t: Tensor, *args) -> tuple[Tensor, Tensor]:
    # Each step of Newton from the constant root doubles the orders of derivatives that are right:
    # 1, 3, 7.
    y, status = _FUNCTIONS["separable_inverse"](*(x.detach() for x in (t, *args[:4])), args[4])
    gain, *units, sigma = args
    for _ in range(3):
        residual = plain.forward(y, *args) - t
        y = y - residual / (gain * reference.psi_slope(y, Units(*units), sigma))
    return y, status


def _differentiable_step(x: Tensor, g: Tensor, lr: Tensor, *args) -> tuple[Tensor, Tensor]:
    return _differentiable_inverse(plain.forward(x, *args) - lr * g, *args)


_register(
    "separable_forward",
    _implementation("forward", 0, 2, 5),
    _fake_forward,
    _save_forward,
    _forward_gradient,
    _vmap_forward,
    plain.forward,
)
_register(
    "separable_inverse",
    _implementation("inverse", 0, 2, 5),
    _fake_solve,
    _save_inverse,
    _inverse_gradient,
    _vmap_inverse,
    _differentiable_inverse,
)
_register(
    "separable_step",
    _implementation("step", 0, 4, 7),
    _fake_solve,
    _save_step,
    _step_gradient,
    _vmap_step,
    _differentiable_step,
)
_register(
    "separable_backward",
    _implementation("backward", 1, 3, 6),
    _fake_backward,
    _save_backward,
    _backward_gradient,
    _vmap_backward,
    plain.backward,
)


# How they are called.


def separable_forward(u: Tensor, gain: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    r"""S(u) = gain psi(u), differentiable to any order.

    Args:
        u: ``(*)``, floating.
        gain: positive, broadcasts against u.
        units: coefficients ``(K, *)`` that broadcast against ``u[None]``.
        sigma: a key of ``reference.SIGMAS``.

    Raises:
        InputError: the backend that was chosen by name does not serve these operands.
    """
    u, gain, *aligned = _aligned((u,), gain, units)
    choice = (u, len(aligned[0]), sigma)
    if not torch.compiler.is_compiling() and backends.choose("forward", *choice) is plain:
        # Autograd keeps what the operator's backward would compute again.
        return gain * reference.psi(u, Units(*aligned), sigma)
    return _call("separable_forward", u, gain, *aligned, sigma)


def separable_inverse(t: Tensor, gain: Tensor, units: Units, sigma: str = "algebraic") -> Tensor:
    r"""The y with gain psi(y) = t, differentiable to any order.

    Args:
        t: ``(*)``, floating.
        gain, units, sigma: as in ``separable_forward``, with a positive lower slope bound.

    Raises:
        NewtonError: a solve on the CPU failed. On other devices, where asking would synchronise,
            and in compiled code, entries that failed are NaN.
        InputError: the backend that was chosen by name does not serve these operands.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> units = Units(one, 2 * one, 0 * one)
        >>> t = torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64)
        >>> y = separable_inverse(t, 3 * one[0], units)
        >>> bool(((separable_forward(y, 3 * one[0], units) - t).abs() <= 1e-9).all())
        True
    """
    return _solved(*_call("separable_inverse", *_aligned((t,), gain, units), sigma))


def separable_step(
    x: Tensor,
    g: Tensor,
    lr: float | Tensor,
    gain: Tensor,
    units: Units,
    sigma: str = "algebraic",
    *,
    primal: bool = True,
) -> Tensor:
    r"""One mirror step, differentiable to any order: S^-1(S(x) - lr g), for ``primal``.

    Without ``primal``, where the formula is that of grad h*, S(S^-1(x) - lr g).

    Args:
        x, g: ``(*)``, floating: the point and the gradient there.
        lr: a number or a tensor with one element.
        gain, units, sigma: as in ``separable_inverse``.

    Raises:
        NewtonError, InputError: as ``separable_inverse``.
    """
    if not primal:
        z = separable_inverse(x, gain, units, sigma) - lr * g
        return separable_forward(z, gain, units, sigma)
    x, g, *coefficients = _aligned((x, g), gain, units)
    lr = lr.to(x).reshape(()) if isinstance(lr, Tensor) else x.new_tensor(lr)
    return _solved(*_call("separable_step", x, g, lr, *coefficients, sigma))


def _aligned(xs: Sequence[Tensor], gain: Tensor, units: Units) -> list[Tensor]:
    """The operands with equal dtypes and dimensions, x in the full shape."""
    tensors = [*xs, gain, *units]
    if len({x.dtype for x in tensors}) > 1:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
        *xs, gain, w, s, c = (x.to(dtype) for x in tensors)
        units = Units(w, s, c)
    if not units.w.shape == units.s.shape == units.c.shape:
        units = Units(*torch.broadcast_tensors(*units))
    x, (count, *rest) = xs[0], units.w.shape
    if gain.shape == x.shape == xs[-1].shape and len(rest) == x.dim():
        fits = all(r in (1, n) for r, n in zip(rest, x.shape, strict=True))
        if fits:  # as the maps call it; what follows takes its time
            return [*xs, gain, *units]
    shape = torch.broadcast_shapes(*(x.shape for x in xs), gain.shape, rest)
    if gain.dim() < len(shape):
        gain = gain.reshape(*[1] * (len(shape) - gain.dim()), *gain.shape)
    if len(rest) < len(shape):
        missing = [1] * (len(shape) - len(rest))
        units = Units(*(x.reshape(count, *missing, *rest) for x in units))
    return [*(x if x.shape == shape else x.expand(shape) for x in xs), gain, *units]


def _solved(y: Tensor, status: Tensor) -> Tensor:
    if status.device.type == "cpu" and not torch.compiler.is_compiling():
        worst = Status(int(status))
        if worst is not Status.CONVERGED:
            raise NewtonError(worst)
    return y
