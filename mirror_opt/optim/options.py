"""Legal options of a parameter group, and what follows from them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError, is_number
from mirror_opt.maps import Euclidean, MirrorMap, SeparableNeural
from mirror_opt.optim.scalars import as_scalar
from mirror_opt.optim.sharded import check_placements, is_sharded, local, whole

__all__ = [
    "RUN_OPTIONS",
    "Group",
    "check_decay",
    "check_group",
    "check_options",
    "check_rounding",
    "check_run_options",
    "drop_repeated",
    "has_fused_step",
    "is_anchored",
    "keeps_dual",
    "parameter_name",
    "state_dtype",
]

Group = dict[str, Any]

# These hold for the optimizer as a whole, and for a run rather than its checkpoint; and what says
# nothing in a group.
RUN_OPTIONS = {"differentiable": False, "nonfinite": None}

_FUSED = (SeparableNeural, Euclidean)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHOICES: dict[str, tuple] = {
    "nesterov": (True, False),
    "maximize": (True, False),
    "dual_state": (True, False, None),
    "anchor": ("auto", "init", "zero"),
    "rounding": ("nearest", "stochastic"),
    "foreach": (True, False, None),
    "fused": (True, False, None),
    "differentiable": (True, False),
    "nonfinite": ("raise", "skip", "propagate", None),
}


def has_fused_step(mirror_map: MirrorMap) -> bool:
    """Whether there is a fused step for the map: for no subclass, whose mathematics are its own."""
    return type(mirror_map) in _FUSED


def keeps_dual(group: Group) -> bool:
    """Whether the group keeps its dual state."""
    if group["dual_state"] is None:
        return not group["mirror_map"].forward_is_closed
    return group["dual_state"]


def is_anchored(group: Group) -> bool:
    """Whether the group's map acts on the displacement from the initial parameters."""
    if group["anchor"] == "auto":
        return group["mirror_map"].anchored
    return group["anchor"] == "init"


def state_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The dtype of all state of a parameter: at least float32 beside a dual state."""
    return at_least_float32(p.dtype) if keeps_dual(group) else p.dtype


def parameter_name(group: Group, slot: int) -> str:
    """A parameter for an error message: by its name if the user gave one."""
    if "param_names" in group:
        return f"parameter {group['param_names'][slot]!r}"
    p = group["params"][slot]
    shape = "no shape yet" if is_lazy(p) else f"shape {tuple(p.shape)}"
    return f"parameter {slot} of its group, of {shape}"


def check_options(options: Group) -> None:
    """Raises InputError for an option out of its legal range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InputError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    _check_number("lr", lr, math.inf)
    _check_number("momentum", options["momentum"], 1)
    _check_number("weight_decay", options["weight_decay"], math.inf)
    for name, choices in _CHOICES.items():
        if not isinstance(options[name], bool | str | None) or options[name] not in choices:
            legal = ", ".join(map(repr, choices))
            raise InputError(f"Invalid {name}={_shown(options[name])}: pass one of {legal}")
    if options["nesterov"] and options["momentum"] == 0:
        raise InputError("Invalid nesterov=True with momentum=0: pass a momentum in (0, 1)")
    if options["foreach"] and options["differentiable"]:
        raise InputError("Invalid foreach=True with differentiable=True: pass foreach=False")
    if options["fused"] and (options["foreach"] or options["differentiable"]):
        other = "foreach" if options["foreach"] else "differentiable"
        raise InputError(f"Invalid fused=True with {other}=True: pass one of them")
    if options["rounding"] == "stochastic" and (options["fused"] or options["differentiable"]):
        other = "fused" if options["fused"] else "differentiable"
        raise InputError(f"Invalid rounding='stochastic' with {other}=True: pass {other}=False")
    if not isinstance(options["mirror_map"], MirrorMap):
        raise InputError(
            f"Invalid mirror_map={_shown(options['mirror_map'])}: pass an instance of a map in "
            "mirror_opt.maps, such as maps.Hypentropy()"
        )


def drop_repeated(group: Group) -> None:
    """Keeps each parameter once; torch has warned of it."""
    params = group["params"]
    places = {p: i for i, p in reversed([*enumerate(params)])}
    if len(places) < len(params):
        first = sorted(places.values())
        for name in {"params", "param_names"} & group.keys():
            group[name] = [group[name][i] for i in first]


def check_group(group: Group, defaults: Group) -> None:
    """Raises InputError for options out of range or parameters that the map does not serve."""
    check_options(group)
    check_run_options(group, defaults)
    if group["fused"] and not has_fused_step(group["mirror_map"]):
        raise InputError(
            f"Invalid fused=True for {type(group['mirror_map']).__name__}: there is a fused step "
            f"for {' and '.join(kind.__name__ for kind in _FUSED)} only, pass fused=None"
        )
    for slot, p in enumerate(group["params"]):
        if is_lazy(p):
            if group["mirror_map"].domain != "reals":
                raise InputError(
                    f"{parameter_name(group, slot)} is not initialised: pass a batch through the "
                    "model first"
                )
        elif p.layout is not torch.strided:
            raise InputError(f"{parameter_name(group, slot)} is {p.layout}: pass p.to_dense()")
        elif torch._debug_has_internal_overlap(local(p)) == 1:
            raise InputError(
                f"{parameter_name(group, slot)} is expanded, so that its entries share memory: "
                "pass p.contiguous()"
            )
        if p.dtype not in _DTYPES:
            raise InputError(
                f"{parameter_name(group, slot)} is {p.dtype}: pass float16, bfloat16, float32 or "
                "float64, and for complex numbers a parameter whose view_as_complex is used"
            )
    check_rounding(group)
    check_placements(group["params"])
    if group["differentiable"] and any(map(is_sharded, group["params"])):
        raise InputError("Invalid differentiable=True with DTensor parameters: pass plain tensors")
    mirror_map = group["mirror_map"]
    bounded = mirror_map.domain != "reals"
    mirror_map.check([whole(p.detach()) if bounded else p for p in group["params"]])
    if is_anchored(group) and mirror_map.domain != "reals":
        raise InputError(
            f"Invalid anchor={group['anchor']!r} for {type(mirror_map).__name__}: displacements "
            f"from an anchor leave its domain ({mirror_map.domain}), pass 'auto' or 'zero'"
        )


def check_run_options(group: Group, defaults: Group) -> None:
    """Raises InputError where a group has a value of its own for what holds for all of them."""
    for name, nothing in RUN_OPTIONS.items():
        if group[name] not in (defaults[name], nothing):
            raise InputError(
                f"Invalid {name}={group[name]!r} in a parameter group: it holds for the whole "
                "optimizer, pass it to MirrorDescent, or set it in its defaults and every group"
            )


def check_rounding(group: Group) -> None:
    """Raises InputError where a parameter is of a dtype that is not rounded as was asked."""
    for slot, p in enumerate(group["params"]):
        if group["rounding"] == "stochastic" and p.dtype == torch.float16:
            raise InputError(
                f"Invalid rounding='stochastic' for {parameter_name(group, slot)}, which is "
                "float16: pass bfloat16 parameters, or rounding='nearest'"
            )


def check_decay(group: Group) -> None:
    """Raises InputError for a decay that takes positive parameters out of their domain.

    As far as the rate can be read without a synchronisation or a cut graph.
    """
    decay, domain = group["weight_decay"], group["mirror_map"].domain
    if decay == 0 or domain == "reals":
        return
    lr = as_scalar(group["lr"])
    if not isinstance(lr, Tensor) and lr * decay >= 1:
        raise InputError(
            f"Invalid weight_decay={decay!r} with {lr=} for parameters that are to stay "
            f"{'on the simplex' if domain == 'simplex' else 'positive'}: their product has to be "
            "below 1" + ", and decay is without effect there" * (domain == "simplex")
        )


def _check_number(name: str, value: Any, upper: float) -> None:
    if isinstance(value, Tensor) and value.is_meta:
        raise InputError(f"Invalid {name} on the meta device: pass a number in [0, {upper})")
    number = value.item() if isinstance(value, Tensor) and name == "lr" else value
    if not is_number(number) or not 0 <= number < upper:
        raise InputError(f"Invalid {name}={_shown(value)}: pass a number in [0, {upper})")


def _shown(value: Any) -> str:
    """A value in one line."""
    return " ".join(repr(value).split())
