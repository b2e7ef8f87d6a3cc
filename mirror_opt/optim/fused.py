"""The fused step of a parameter group: when there is one, and what it takes.

It serves ``maps.SeparableNeural``, by our operator, and ``maps.Euclidean``, by torch's own SGD. A
step changes all or nothing; these work in place, and the operator keeps single elements that fail.
So the step is fused only where it cannot fail: when everything it reads is below a bound that no
result can leave the range of float32 from.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from mirror_opt import backends
from mirror_opt.backends import cpp, plain
from mirror_opt.backends.step import Step
from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError
from mirror_opt.maps import Euclidean, MirrorMap, SeparableNeural
from mirror_opt.maps.separable import NeuralUnits, Separable
from mirror_opt.newton import Status
from mirror_opt.ops import exceeds
from mirror_opt.ops.multi_tensor import is_observed, take
from mirror_opt.optim.options import Group, has_fused_step
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.scalars import as_scalar, is_zero, reads_freely, usable_on
from mirror_opt.optim.sharded import is_sharded, local, on_shards
from mirror_opt.optim.update import Tensors

__all__ = ["FusedStep", "attempt", "fused_step", "may_fuse", "may_fuse_scaled"]

# |x| <= _BOUND, 1 / _SCALE <= gain <= _SCALE and lr <= _SCALE keep every result below 1e36.
_BOUND, _SCALE = 1e15, 1e9


@dataclass(frozen=True)
class _Coefficients:
    """What the operator needs of a map, and what they were computed from."""

    sources: list[Tensor]
    versions: list[list[int]]
    gains: list[Tensor]
    units: tuple[list[Tensor], list[Tensor], list[Tensor]]  # w, s and c
    moderate: bool  # within the bounds
    table: Tensor | None  # of the C++ library, for ``attempt``; None where it does not serve them

    def of(self, slots: list[int]) -> list[list[Tensor]]:
        """Gains, w, s and c of the parameters that have a gradient."""
        lists = [self.gains, *self.units]
        if len(slots) == len(self.gains):
            return lists
        return [[xs[slot] for slot in slots] for xs in lists]


@dataclass(frozen=True)
class FusedStep:
    """A group's step, not yet taken."""

    lists: Lists

    @property
    def moderate(self) -> bool:
        """Whether the map's coefficients, if it has any, are within the bounds."""
        return True

    def could_fail(self, grad_scale: Tensor | None) -> Tensor:
        """1 where the step could fail, else 0: 0-dim, on the device of the parameters."""
        group, _, params, *others = self.lists
        read = [x for xs in others for x in xs] + ([] if self.lists.duals else params)
        half = any(p.dtype == torch.float16 for p in params)
        flag = exceeds(read, _BOUND if self.moderate and not half else -1.0)
        rate = as_scalar(group["lr"]) * _growth(group)
        if isinstance(rate, Tensor):
            rate = usable_on(flag.device, rate)
            flag = torch.clamp(flag + (~(rate.abs() <= _SCALE)).float(), max=1.0)
        elif not abs(rate) <= _SCALE:
            flag = torch.ones_like(flag)
        # A scale below 1 would make gradients larger than what was read.
        return flag if grad_scale is None else torch.maximum(flag, (grad_scale < 1).to(flag))

    def take(self, stop: Tensor | None, grad_scale: Tensor | None) -> Status | None:
        """Takes the step; the status, None where it cannot be read freely.

        Args:
            stop: not zero where nothing is to change; None: nothing stops it.
            grad_scale: what gradients are divided by. Both are 0-dim and on any device: other
                groups may be on others.
        """
        device = self.lists.params[0].device
        stop, grad_scale = (None if x is None else x.to(device) for x in (stop, grad_scale))
        return self._take(stop, grad_scale)

    def _take(self, stop: Tensor | None, grad_scale: Tensor | None) -> Status | None:
        raise NotImplementedError


@dataclass(frozen=True)
class SeparableStep(FusedStep):
    """By ``mirror_opt::separable_step_``."""

    coefficients: _Coefficients

    @property
    def moderate(self) -> bool:
        return self.coefficients.moderate

    def _take(self, stop: Tensor | None, grad_scale: Tensor | None) -> Status | None:
        group, slots, params, grads, buffers, anchors, dual_inits, duals = self.lists
        mirror_map = group["mirror_map"]
        gains, w, s, c = self.coefficients.of(slots)
        lr = as_scalar(group["lr"])
        if isinstance(lr, Tensor):
            lr = usable_on(params[0].device, lr)
        else:
            lr = torch.tensor(lr, dtype=torch.float64, device="cpu")  # whatever the default
        status = torch.zeros((), dtype=torch.int32, device=params[0].device)
        take(Step(
            params, grads, lr, gains, w, s, c, buffers, anchors, duals, dual_inits, grad_scale,
            stop, status, group["momentum"], group["weight_decay"], group["nesterov"],
            group["maximize"], mirror_map.parametrization == "primal", "algebraic",
        ))  # fmt: skip
        return Status(int(status)) if reads_freely(params) else None


@dataclass(frozen=True)
class EuclideanStep(FusedStep):
    """By the functions of ``torch.optim.SGD``, after a decay of the weights that is AdamW's."""

    def _take(self, stop: Tensor | None, grad_scale: Tensor | None) -> Status | None:
        group, _, params, grads, buffers, *_ = self.lists
        lr, decay = as_scalar(group["lr"]), group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = usable_on(params[0].device, lr)
        if decay != 0:
            factor = 1 - lr * decay
            if stop is not None:
                # In their dtype: beside a number, a number would become a float32.
                one = torch.ones((), dtype=params[0].dtype, device=stop.device)
                factor = torch.where(stop == 0, factor, one).to(one.dtype)
            torch._foreach_mul_(params, factor)
        sgd(
            params,
            grads,
            cast(list[Tensor | None], buffers or [None] * len(params)),
            # On the CPU its loop is the faster; but only its fused kernel takes found_inf.
            foreach=False,
            fused=stop is not None or not reads_freely(params),
            found_inf=stop,
            weight_decay=0,
            momentum=group["momentum"],
            lr=cast(float, lr),  # or a tensor
            dampening=0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        return None


def attempt(lists: Lists, grad_scale: Tensor | None) -> Status | None:
    """Takes the step of a ``SeparableNeural`` on the CPU where it cannot fail, in a single call.

    For a small network the calls from Python cost more than the arithmetic. So this asks for
    little, leaves it to the library to see whether all is as usual, and where it is not, returns
    None: nothing has changed then, and ``fused_step`` says why or what else there is.
    """
    group, slots, params, grads, buffers, anchors, dual_inits, duals = lists
    mirror_map = group["mirror_map"]
    if not (type(mirror_map) is SeparableNeural and may_fuse(group)) or is_observed(params):
        return None
    if not reads_freely(params) or backends.chosen() not in ("auto", "cpp"):
        return None
    if grad_scale is not None and not grad_scale >= 1:
        return None  # gradients larger than what the library looks at
    coefficients = _coefficients(mirror_map, group["params"])  # to which the table points
    table, lr = coefficients.table, float(group["lr"])
    if table is None or not 0 < abs(lr * _growth(group)) <= _SCALE:
        return None
    status = cpp.attempt(
        params, grads, buffers, anchors, duals, dual_inits,
        table if len(slots) == len(table) else table[slots], lr,
        (-1.0 if group["maximize"] else 1.0) / (1.0 if grad_scale is None else float(grad_scale)),
        group["momentum"], group["weight_decay"], group["nesterov"],
        mirror_map.parametrization == "primal", _BOUND,
    )  # fmt: skip
    if status is None:
        return None
    torch.autograd.graph.increment_version((*params, *buffers, *duals))
    return Status(status)


def _growth(group: Group) -> float:
    """What lr is multiplied by at most; NaN for options that are out of range."""
    decay, momentum = group["weight_decay"], group["momentum"]
    return max(1.0, decay) if decay >= 0 and 0 <= momentum < 1 else math.nan


def may_fuse(group: Group) -> bool:
    """Whether the options of the group leave room for fused steps."""
    if group["rounding"] == "stochastic":
        return False
    if group["fused"] is None:
        return group["foreach"] is None and has_fused_step(group["mirror_map"])
    return group["fused"]


def may_fuse_scaled(group: Group) -> bool:
    """Whether a fused step of the group may divide scaled gradients itself, and leave them."""
    return may_fuse(group) and type(group["mirror_map"]) is SeparableNeural


def fused_step(lists: Lists, grad_scale: Tensor | None = None) -> FusedStep | None:
    """The group's ``FusedStep``; None where there is none, unless it was asked for.

    Raises:
        InputError: ``fused=True``, and there is none.
    """
    group = lists.group
    if not may_fuse(group) or is_zero(group["lr"]):
        return None
    euclidean = type(group["mirror_map"]) is Euclidean
    if torch.compiler.is_compiling() and (euclidean or not group["fused"]):
        return None  # what is compiled is fused too
    reason = _refusal(lists, _euclidean_refusal if euclidean else _separable_refusal)
    if reason is not None:
        if group["fused"]:
            raise InputError(f"fused=True cannot be served: {reason}; pass fused=None")
        return None
    if euclidean:
        # torch's kernel would write the unscaled gradients back.
        return EuclideanStep(lists) if grad_scale is None else None
    return SeparableStep(lists, _coefficients(group["mirror_map"], group["params"]))


def _refusal(lists: Lists, of_map: Callable[[Lists, set[torch.dtype]], str | None]) -> str | None:
    tensors = [*lists.params, *lists.grads]
    if len({x.device for x in tensors}) > 1:
        return "the parameters are on several devices"
    return of_map(lists, {x.dtype for x in tensors})


def _euclidean_refusal(lists: Lists, dtypes: set[torch.dtype]) -> str | None:
    if lists.duals or lists.anchors:
        return "that of Euclidean keeps no anchor and no dual state"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        return "that of Euclidean takes parameters and gradients of float32, or of float64"
    if lists.params[0].is_meta:
        return "there is none on the meta device"
    return None


def _separable_refusal(lists: Lists, dtypes: set[torch.dtype]) -> str | None:
    mirror_map, param = lists.group["mirror_map"], lists.params[0]
    if type(mirror_map) is not SeparableNeural:
        name = type(mirror_map).__name__
        return f"there is a fused step for SeparableNeural and Euclidean, not for {name}"
    if torch.float64 in dtypes and len(dtypes) > 1:
        return "float64 and other parameters or gradients are in one group"
    dtype = at_least_float32(param.dtype)
    if {g.p.dtype for g in mirror_map.groups} != {dtype}:
        return f"the map was built for another dtype than {param.dtype}"
    stored, wide = [*lists.buffers, *lists.anchors], [*lists.duals, *lists.dual_inits]
    computed = [at_least_float32(x.dtype) for x in stored] + [x.dtype for x in wide]
    if any(other != dtype for other in computed):
        return "parameters have changed their dtype since the first step"
    if param.dtype == torch.float16 and not reads_freely([param]):
        return "what leaves the range of float16 is found out by reading back"
    if torch.compiler.is_compiling():
        return None  # the operator chooses its backend when it runs
    units = cast(NeuralUnits, mirror_map.groups[0])
    if backends.choose("step_", param, len(units.p), units.sigma) is plain:
        return f"no fast backend serves {param.dtype} on {param.device}, {units.sigma}"
    return None


_cache: WeakKeyDictionary[MirrorMap, _Coefficients] = WeakKeyDictionary()
_version = operator.attrgetter("_version")


def _coefficients(mirror_map: SeparableNeural, params: Tensors) -> _Coefficients:
    """The map's coefficients, computed anew only when its parameters have changed."""
    if torch.compiler.is_compiling():
        return _compute(mirror_map, params, [], [])
    sources: list[Tensor] = []
    for units in mirror_map.groups._modules.values():
        sources += units._parameters.values()
        sources += units._buffers.values()
    if any(map(Tensor.is_inference, sources)):  # whose changes are not counted
        return _compute(mirror_map, params, [], [])
    versions = [list(map(_version, sources)), list(map(Tensor.data_ptr, sources))]
    versions.append([local(p).shape for p in params if is_sharded(p)])
    cached = _cache.get(mirror_map)
    # The tensors themselves are compared too: another may come to lie where one was.
    if (
        cached is None
        or cached.versions != versions
        or not all(map(operator.is_, cached.sources, sources))
    ):
        cached = _cache[mirror_map] = _compute(mirror_map, params, sources, versions)
    return cached


@torch.no_grad()
def _compute(
    mirror_map: SeparableNeural, params: Tensors, sources: list[Tensor], versions: list[list]
) -> _Coefficients:
    gains, units = [], []
    every = cast(list[Separable], on_shards(mirror_map, params).coefficients())
    for (gain, coefficients, _), p in zip(every, params, strict=True):
        gains.append(gain.expand(local(p).shape).contiguous())
        units.append([x.reshape(len(x), math.prod(x.shape[1:])).contiguous() for x in coefficients])
    moderate = torch.compiler.is_compiling() or (
        not exceeds([*gains, *(1 / g for g in gains)], _SCALE)
        and not exceeds([x for u in units for x in u], _BOUND)
    )
    w, s, c = map(list, zip(*units, strict=True))
    return _Coefficients(
        sources, versions, gains, (w, s, c), moderate,
        _table(gains, (w, s, c), every[0].sigma) if moderate else None,
    )  # fmt: skip


def _table(gains: Tensors, units: tuple[Tensors, Tensors, Tensors], sigma: str) -> Tensor | None:
    if torch.compiler.is_compiling() or cpp.unavailable():
        return None
    if cpp.refusal("step", gains[0], len(units[0][0]), sigma):
        return None
    return cpp.table(gains, *units)
