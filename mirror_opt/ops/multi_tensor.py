"""The multi-tensor step: a list of parameters, in place, in one launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mirror_opt import backends
from mirror_opt.backends.step import Step
from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError
from mirror_opt.reference import Units

__all__ = ["exceeds", "is_observed", "separable_step_", "take"]


@torch.library.custom_op(
    "mirror_opt::separable_step_", mutates_args=("params", "buffers", "duals", "status")
)
def _step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], lr: Tensor, gains: Sequence[Tensor],
    ws: Sequence[Tensor], ss: Sequence[Tensor], cs: Sequence[Tensor], buffers: Sequence[Tensor],
    anchors: Sequence[Tensor], duals: Sequence[Tensor], dual_inits: Sequence[Tensor],
    grad_scale: Tensor | None, found_inf: Tensor | None, status: Tensor, momentum: float,
    weight_decay: float, nesterov: bool, maximize: bool, primal: bool, sigma: str,
) -> None:  # fmt: skip
    _take(Step(
        params, grads, lr, gains, ws, ss, cs, buffers, anchors, duals, dual_inits, grad_scale,
        found_inf, status, momentum, weight_decay, nesterov, maximize, primal, sigma,
    ))  # fmt: skip


@_step_.register_fake
def _(*args) -> None:
    pass


def is_observed(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody has to see the operator, and not only its result.

    Calling an operator that Python implements through the dispatcher costs as much as the step of a
    small network.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or not {Tensor, Parameter}.issuperset(map(type, tensors))
    )


def _take(step: Step) -> None:
    if step.params:
        backends.choose("step_", step.params[0], len(step.ws[0]), step.sigma).step_(step)


def take(step: Step) -> None:
    """``separable_step_`` of lists that are known to fit each other."""
    if is_observed(step.params):
        _step_(*step)
    else:
        _take(step)
        torch.autograd.graph.increment_version(
            (*step.params, *step.buffers, *step.duals, step.status)
        )


@torch.library.custom_op("mirror_opt::exceeds", mutates_args=())
def _exceeds(xs: Sequence[Tensor], bound: float) -> Tensor:
    return backends.choose("exceeds", xs[0], 0, "algebraic").exceeds(xs, bound)


@_exceeds.register_fake
def _(xs: Sequence[Tensor], bound: float) -> Tensor:
    return xs[0].new_empty((), dtype=torch.float32)


def exceeds(xs: Sequence[Tensor], bound: float) -> Tensor:
    """1 if the magnitude of some entry is above the bound, or NaN, else 0: 0-dim float32.

    In the form of ``found_inf``, and on the device of the first tensor, without reading it back.

    Args:
        xs: one or more floating tensors.
        bound: less than 1e38.
    """
    if is_observed(xs):
        return _exceeds(xs, bound)
    return backends.choose("exceeds", xs[0], 0, "algebraic").exceeds(xs, bound)


def separable_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float | Tensor,
    gains: Sequence[Tensor],
    units: Sequence[Units],
    *,
    primal: bool,
    buffers: Sequence[Tensor] = (),
    anchors: Sequence[Tensor] = (),
    duals: Sequence[Tensor] = (),
    dual_inits: Sequence[Tensor] = (),
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    status: Tensor | None = None,
    sigma: str = "algebraic",
) -> Tensor:
    r"""The step of ``optim.MirrorDescent`` on a list of parameters, in place, in one launch.

    With displacement u = phi - anchor and direction d (the gradient, or momentum),

        stateless    z = grad h((1 - lr decay) phi - anchor)       dual state    z = zeta + z_0
        z <- z - lr d,   phi <- anchor + grad h*(z),   zeta <- z - z_0

    where grad h is S and grad h* its inverse (primal), or the other way round. With weight decay a
    dual state takes z from the decayed, unrounded anchor + grad h*(z). An element whose result is
    not finite in its dtype keeps parameter and state, and the status tells. Nothing is read back
    from an accelerator. Empty lists stand for what there is not.

    Args:
        params: float32, bfloat16, float16 or float64, of any shape; float64 on the CPU only.
        grads: shaped as the parameters; float64 beside float64 parameters, otherwise float32,
            float16 or bfloat16.
        lr: a number or a tensor with one element.
        gains: shaped as the parameters, in the dtype of the coefficients; empty: 1.
        units: coefficients ``(K, C)`` for each parameter, which is seen as ``(C, n)``; float32, or
            float64 beside float64 parameters.
        primal: whether S is grad h; else it is grad h*.
        buffers: momentum b, changed, in a dtype as of ``grads``; needed when ``momentum`` is not 0.
        anchors: phi_0, in a dtype as of ``grads``; empty: 0.
        duals: zeta, in the dtype of the coefficients, changed; empty: a stateless step.
        dual_inits: z_0, in the dtype of the coefficients; empty: 0.
        momentum, nesterov, weight_decay, maximize: as in ``optim.MirrorDescent``.
        grad_scale: one element, by which the gradients are divided.
        found_inf: one element; unless it is 0 nothing changes.
        status: 0-dim int32, raised to the worst ``newton.Status``; None: a new one.
        sigma: a key of ``reference.SIGMAS``.

    Returns:
        The status.

    Raises:
        InputError: the lists do not fit each other, or the backend that was chosen by name does not
            serve them. Nothing has changed then.
    """
    if (momentum != 0) != bool(buffers):
        raise InputError(f"Invalid {momentum=}: pass buffers with a momentum, and none without")
    lists: dict[str, Sequence[Any]] = {
        "grads": grads, "gains": gains, "buffers": buffers, "anchors": anchors, "duals": duals,
        "dual_inits": dual_inits, "units": units,
    }  # fmt: skip
    for name, tensors in lists.items():
        if len(tensors) != len(params) and (tensors or name in ("grads", "units")):
            raise InputError(f"{len(params)} params and {len(tensors)} {name}: pass one for each")
        if name != "units":
            for i, (x, p) in enumerate(zip(tensors, params, strict=False)):
                if x.shape != p.shape:
                    raise InputError(
                        f"{name}[{i}] has shape {tuple(x.shape)}: pass that of params[{i}], "
                        f"{tuple(p.shape)}"
                    )
    wide = [at_least_float32(p.dtype) for p in params]
    for i, (p, dtype, (w, s, c)) in enumerate(zip(params, wide, units, strict=True)):
        if not w.shape == s.shape == c.shape or w.dim() != 2 or w.shape[0] != units[0].w.shape[0]:
            shapes = [tuple(x.shape) for x in (w, s, c)]
            raise InputError(f"units[{i}] has shapes {shapes}: pass (K, C) three times, one K")
        if p.numel() % max(w.shape[1], 1):
            raise InputError(
                f"units[{i}] has {w.shape[1]} channels, which do not divide params[{i}] of shape "
                f"{tuple(p.shape)}: pass (K, C) with a C that does"
            )
        for x in (w, s, c, *(xs[i] for xs in (gains, duals, dual_inits) if xs)):
            if x.dtype != dtype or wide[0] != dtype:
                raise InputError(
                    f"coefficients and dual state of params[{i}] are {x.dtype}: pass {dtype} for "
                    f"{p.dtype}, and float64 parameters in a list of their own"
                )
        for name in ("grads", "buffers", "anchors"):
            for x in lists[name][i : i + 1]:
                wider = at_least_float32(x.dtype)
                if not x.is_floating_point() or wider != dtype:
                    raise InputError(
                        f"{name}[{i}] is {x.dtype}: pass a floating dtype that {dtype} holds, as "
                        f"beside params[{i}] of {p.dtype}"
                    )
    device = params[0].device if params else None
    ws, ss, cs = ([u[k] for u in units] for k in range(3))
    every = {**lists, "params": params, "units": [*ws, *ss, *cs]}
    for name, tensors in every.items():
        for i, x in enumerate(tensors):
            if x.device != device:
                raise InputError(f"{name}[{i}] is on {x.device}: pass all tensors on {device}")
    if status is None:
        status = torch.zeros((), dtype=torch.int32, device=device)
    elif status.dtype != torch.int32 or status.numel() != 1 or device not in (None, status.device):
        raise InputError(
            f"status is of {status.dtype}, shape {tuple(status.shape)}, on {status.device}: pass "
            f"one int32 on {device}"
        )
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, x in scalars.items():
        if isinstance(x, Tensor) and (x.numel() != 1 or not (x.is_cpu or x.device == device)):
            raise InputError(
                f"{name} has shape {tuple(x.shape)}, on {x.device}: pass one element, on the CPU "
                f"or on {device}"
            )
    if not isinstance(lr, Tensor):
        # Read there, wherever the parameters and whatever the default device are.
        lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
    take(Step(
        params, grads, lr, gains, ws, ss, cs, buffers, anchors, duals, dual_inits, grad_scale,
        found_inf, status, momentum, weight_decay, nesterov, maximize, primal, sigma,
    ))  # fmt: skip
    return status
