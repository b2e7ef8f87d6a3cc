"""The fused step of a parameter group: when there is one, and what it takes.

It serves ``maps.SeparableNeural``. A step changes all or nothing; the operator works in place and
keeps single elements that fail. So the step is fused only where it cannot fail: when everything it
reads is below a bound that no result can leave the range of float32 from.
"""

import math
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mirror_opt import backends
from mirror_opt.backends import plain
from mirror_opt.errors import InputError
from mirror_opt.maps import MirrorMap, SeparableNeural
from mirror_opt.maps.separable import NeuralUnits, Separable
from mirror_opt.newton import Status
from mirror_opt.ops import exceeds, separable_step_
from mirror_opt.optim.options import Group
from mirror_opt.optim.sharded import local, on_shards
from mirror_opt.optim.update import Tensors
from mirror_opt.reference import Units

__all__ = ["FusedStep", "fused_step", "may_fuse"]

# |x| <= _BOUND, 1 / _SCALE <= gain <= _SCALE and lr <= _SCALE keep every result below 1e36.
_BOUND, _SCALE = 1e15, 1e9


@dataclass(frozen=True)
class _Coefficients:
    """What the operator needs of a map, and what they were computed from."""

    versions: tuple
    gains: list[Tensor]
    units: list[Units]
    moderate: bool  # within the bounds


@dataclass(frozen=True)
class FusedStep:
    """A group's step, not yet taken. The lists are those of ``update.mirror_descent``."""

    group: Group
    slots: list[int]
    params: Tensors
    grads: Tensors
    buffers: Tensors
    anchors: Tensors
    dual_inits: Tensors
    duals: Tensors
    coefficients: _Coefficients

    @property
    def on_accelerator(self) -> bool:
        return self.params[0].device.type != "cpu"

    def found_inf(self, grad_scale: Tensor | None) -> Tensor:
        """0 where the step cannot fail, else 1: 0-dim, on the device of the parameters."""
        lists = (self.grads, self.buffers, self.anchors, self.dual_inits, self.duals)
        read = [x for xs in lists for x in xs] + ([] if self.duals else self.params)
        lr, half = self.group["lr"], any(p.dtype == torch.float16 for p in self.params)
        if isinstance(lr, Tensor):
            large = False
            read += [lr] if lr.device == self.params[0].device else []
        else:
            large = lr * max(1.0, self.group["weight_decay"]) > _SCALE
        certain = self.coefficients.moderate and not half and not large
        flag = exceeds(read, _BOUND if certain else -1.0)
        # A scale below 1 would make gradients larger than what was read.
        return flag if grad_scale is None else torch.maximum(flag, (grad_scale < 1).to(flag))

    def take(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> Status | None:
        """Takes the step; the status, None on an accelerator and in compiled code."""
        group = self.group
        mirror_map = group["mirror_map"]
        status = separable_step_(
            self.params,
            self.grads,
            group["lr"],
            [self.coefficients.gains[slot] for slot in self.slots],
            [self.coefficients.units[slot] for slot in self.slots],
            primal=mirror_map.parametrization == "primal",
            buffers=self.buffers,
            anchors=self.anchors,
            duals=self.duals,
            dual_inits=self.dual_inits,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if self.on_accelerator or torch.compiler.is_compiling():
            return None
        return Status(int(status))


def may_fuse(group: Group) -> bool:
    """Whether the options of the group leave room for fused steps."""
    if group["rounding"] == "stochastic":
        return False
    if group["fused"] is None:
        return group["foreach"] is None and isinstance(group["mirror_map"], SeparableNeural)
    return group["fused"]


def fused_step(group: Group, slots: list[int], params: Tensors, grads: Tensors, *states: Any):
    """The group's ``FusedStep``; None where there is none, unless it was asked for.

    Raises:
        InputError: ``fused=True``, and there is none.
    """
    if not may_fuse(group):
        return None
    reason = _refusal(group, params, grads)
    if reason is None:
        coefficients = _coefficients(group["mirror_map"], group["params"])
        buffers, anchors, dual_inits, duals = states
        return FusedStep(
            group, slots, params, grads, buffers, anchors, dual_inits, duals, coefficients
        )
    if group["fused"]:
        raise InputError(f"fused=True cannot be served: {reason}; pass fused=None")
    return None


def _refusal(group: Group, params: Tensors, grads: Tensors) -> str | None:
    mirror_map = group["mirror_map"]
    if not isinstance(mirror_map, SeparableNeural):
        return f"there is a fused step for SeparableNeural, not for {type(mirror_map).__name__}"
    if len({p.device for p in (*params, *grads)}) > 1:
        return "the parameters are on several devices"
    if len({p.dtype == torch.float64 for p in (*params, *grads)}) > 1:
        return "float64 and other parameters or gradients are in one group"
    if torch.compiler.is_compiling():  # the operator chooses its backend when it runs
        return None if group["fused"] else "torch.compile fuses the step itself"
    units = cast(NeuralUnits, mirror_map.tensors[0])
    if backends.choose("step_", params[0], len(units.p), units.sigma) is plain:
        return f"no fast backend serves {params[0].dtype} on {params[0].device}, {units.sigma}"
    return None


_cache: WeakKeyDictionary[MirrorMap, _Coefficients] = WeakKeyDictionary()


def _coefficients(mirror_map: SeparableNeural, params: Tensors) -> _Coefficients:
    """The map's coefficients, computed anew only when its parameters have changed."""
    if torch.compiler.is_compiling():
        return _compute(mirror_map, params, ())
    versions: tuple = tuple(
        (x._version, x.data_ptr())
        for tensor in mirror_map.tensors
        for x in (*tensor._parameters.values(), *tensor._buffers.values())
        if x is not None
    )
    versions += tuple(local(p).shape for p in params)
    cached = _cache.get(mirror_map)
    if cached is None or cached.versions != versions:
        cached = _cache[mirror_map] = _compute(mirror_map, params, versions)
    return cached


@torch.no_grad()
def _compute(mirror_map: SeparableNeural, params: Tensors, versions: tuple) -> _Coefficients:
    gains, units = [], []
    every = cast(list[Separable], on_shards(mirror_map, params).coefficients())
    for (gain, coefficients, _), p in zip(every, params, strict=True):
        gains.append(gain.expand(local(p).shape).contiguous())
        units.append(Units(*(x.reshape(len(x), math.prod(x.shape[1:])) for x in coefficients)))
    moderate = torch.compiler.is_compiling() or (
        not exceeds([*gains, *(1 / g for g in gains)], _SCALE)
        and not exceeds([x for u in units for x in u], _BOUND)
    )
    return _Coefficients(versions, gains, units, moderate)
