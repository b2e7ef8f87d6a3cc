"""The state of a step: momentum, anchor and dual state, created where they are missing."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mirror_opt.errors import InputError
from mirror_opt.newton import NewtonError
from mirror_opt.optim.options import (
    Group,
    is_anchored,
    keeps_dual,
    parameter_name,
    state_dtype,
)
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.rounding import may_round_to
from mirror_opt.optim.scalars import is_zero
from mirror_opt.optim.sharded import (
    OnShards,
    anywhere,
    from_shard,
    gradient,
    is_elsewhere,
    is_sharded,
    local,
    meshes,
    on_shards,
    united,
)
from mirror_opt.optim.update import Tensors, through, widened

__all__ = ["STATE", "States"]

# What a parameter may have; a user's own entries beside these are left alone.
STATE = frozenset(("momentum_buffer", "anchor", "dual", "dual_init"))

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class States:
    """The state of an optimizer's parameters, which a step that is not taken leaves as it was.

    Args:
        states: the optimizer's ``state``.
    """

    def __init__(self, states: dict[Tensor, dict[str, Any]]):
        self._states = states
        self._replaced: list[tuple[Tensor, str, Tensor | None]] = []

    @property
    def changed(self) -> bool:
        """Whether anything was set."""
        return bool(self._replaced)

    def undo(self) -> None:
        """Takes back all that was set."""
        for p, key, old in reversed(self._replaced):
            if old is not None:
                self._states[p][key] = old
                continue
            del self._states[p][key]
            if not self._states[p]:
                del self._states[p]

    def _set(self, p: Tensor, key: str, value: Tensor) -> None:
        state = self._states[p]
        self._replaced.append((p, key, state.get(key)))
        state[key] = value

    def init_group(
        self, lists: Lists, stale: Collection[Tensor] = (), doubtful: Collection[Tensor] = ()
    ) -> None:
        """Collects what a step of the group reads, and creates the state that is missing.

        Args:
            lists: the group, and its lists to be filled.
            stale: parameters that someone else has changed since the last step, whose dual state
                is to be made from them anew.
            doubtful: parameters whose values have to tell whether they are stale.

        Raises:
            InputError: a gradient is sparse, a parameter has changed its shape, or one was added
                or removed beside a map that owns tensors.
        """
        if torch.is_inference_mode_enabled():
            # State outlives the mode, and outside nothing may write to an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                return self.init_group(lists, stale, doubtful)
        group, slots, params, grads, buffers, anchors, dual_inits, duals = lists
        anchored = is_anchored(group)
        stateless = group["momentum"] == 0 and not anchored
        shapes = getattr(group["mirror_map"], "shapes", None)
        if shapes is not None and len(shapes) != len(group["params"]):
            raise InputError(
                f"the group has {len(group['params'])} parameters now and its mirror map was built "
                f"for {len(shapes)}: build both anew, or leave out a gradient (p.grad = None)"
            )
        for slot, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None or p.numel() == 0 or is_elsewhere(p):
                continue
            if grad.layout is not torch.strided:
                raise InputError(
                    f"the gradient of {parameter_name(group, slot)} is {grad.layout}: make it "
                    "dense (sparse=False in an embedding), or give it to torch.optim.SparseAdam"
                )
            if shapes is not None and p.shape != shapes[slot]:
                raise _changed_shape(group, slot, "its mirror map", shapes[slot])
            slots.append(slot)
            if is_sharded(p):
                params.append(local(p))
                grads.append(local(gradient(p)))
            else:
                params.append(p)
                grads.append(grad)
            state = self._states.get(p, {})
            if shapes is None:  # else p has the shape of the map, and so of its state
                for key in STATE & state.keys():
                    if (shape := state[key].shape) != p.shape:
                        raise _changed_shape(group, slot, "the state of earlier steps", shape)
            if stateless:
                continue
            if not state:
                _check_not_captured(p)
            if group["momentum"] != 0:
                # Zeros make mu 0 + g = g of the first step, as SGD's special case does.
                buffer = state.get("momentum_buffer")
                if buffer is None:
                    buffer = torch.zeros_like(p, dtype=state_dtype(p, group))
                    self._set(p, "momentum_buffer", buffer)
                buffers.append(local(buffer))
            if anchored:
                anchor = state.get("anchor")
                if anchor is None:
                    anchor = p.to(state_dtype(p, group), copy=True)
                    self._set(p, "anchor", anchor)
                    if keeps_dual(group):
                        # The displacement is zero whatever the parameter holds: it may be memory
                        # that a checkpoint is still to be loaded into.
                        self._set(p, "dual", torch.zeros_like(anchor))
                anchors.append(local(anchor))
        if _gathers(group):
            stale, doubtful = _agreed(lists, stale, doubtful)
        if keeps_dual(group):
            self._init_duals(lists, stale, doubtful)
            own = [self._states[group["params"][slot]] for slot in slots]
            duals.extend(local(state["dual"]) for state in own)
            if not anchored:
                dual_inits.extend(local(state["dual_init"]) for state in own)

    def _init_duals(
        self, lists: Lists, stale: Collection[Tensor], doubtful: Collection[Tensor]
    ) -> None:
        group, slots, anchors = lists.group, lists.slots, lists.anchors
        whole = [group["params"][slot] for slot in slots]
        needed = {"dual"} if anchors else {"dual", "dual_init"}
        missing = [
            i
            for i, p in enumerate(whole)
            if p in stale or not needed <= self._states.get(p, {}).keys()
        ]
        doubted = [i for i, p in enumerate(whole) if p in doubtful and i not in missing]
        missing += self._differing(lists, doubted)
        if not missing:
            return
        _check_not_captured(whole[missing[0]])
        xs = [self._unrounded(lists, i) for i in missing]
        if anchors:
            xs = [x - anchors[i] for x, i in zip(xs, missing, strict=True)]
        try:
            zs = _through(lists, missing, xs)
        except NewtonError:
            if not is_zero(group["lr"]):
                raise
            # Memory that a checkpoint is still to be loaded into, as its state is.
            zs = [torch.full_like(x, math.nan) for x in xs]
        for i, z in zip(missing, zs, strict=True):
            p, z = whole[i], from_shard(z, whole[i])
            if anchors:  # z of a displacement is a displacement already: z_0 is zero
                self._set(p, "dual", z)
            else:
                self._set(p, "dual", torch.zeros_like(z))
                self._set(p, "dual_init", z)

    def _unrounded(self, lists: Lists, i: int) -> Tensor:
        """A copy of a parameter in at least float32.

        Entries that still equal the rounded dual state take its unrounded value.
        """
        (x,) = widened([lists.params[i]], copy=True)
        state = self._states.get(lists.group["params"][lists.slots[i]], {})
        if "dual" not in state or x.dtype == lists.params[i].dtype:
            return x
        (old,) = self._of_duals(lists, [i])
        stochastic = lists.group["rounding"] == "stochastic"
        rounds_to = may_round_to if stochastic and lists.params[i].dtype == torch.bfloat16 else _is
        return torch.where(rounds_to(old, lists.params[i]), old, x)

    def _of_duals(self, lists: Lists, places: list[int]) -> Tensors:
        """The parameters at these places as their dual states have them."""
        zs = []
        for i in places:
            state = self._states[lists.group["params"][lists.slots[i]]]
            origin = state.get("dual_init")
            dual = local(state["dual"])
            zs.append(dual if origin is None else dual + local(origin))
        xs = _through(lists, places, zs, inverse=True)
        if not lists.anchors:
            return xs
        return [x + lists.anchors[i] for x, i in zip(xs, places, strict=True)]

    def _differing(self, lists: Lists, places: list[int]) -> list[int]:
        """The places where a parameter is not what its dual state makes it, but for rounding."""
        places = [i for i in places if not lists.params[i].is_meta]
        if not places or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return []  # nothing can be asked
        found, gathers = [], _gathers(lists.group)
        for i, old in zip(places, self._of_duals(lists, places), strict=True):
            x, whole = lists.params[i], lists.group["params"][lists.slots[i]]
            # The parameter was rounded once, to either side; the map rounds on its way.
            numbers = torch.stack([x.to(old.dtype), old, *lists.anchors[i : i + 1]])
            largest = numbers.abs().max() if x.numel() else 0.0
            rounding = _coarseness(x) * x.abs() + 64 * torch.finfo(old.dtype).eps * largest
            differs = ~((x - old).abs() <= rounding).all()
            if gathers:  # all of its processes go through the map, or none
                differs = anywhere(differs, meshes([whole])) != 0
            if bool(differs):
                found.append(i)
        return found


def _gathers(group: Group) -> bool:
    mirror_map = on_shards(group["mirror_map"], group["params"])
    return isinstance(mirror_map, OnShards) and mirror_map.gathers


def _agreed(
    lists: Lists, stale: Collection[Tensor], doubtful: Collection[Tensor]
) -> tuple[set[Tensor], set[Tensor]]:
    """Parameters that are stale, and doubtful, in some process: all of them have to meet for these.

    Raises:
        InputError: a parameter has a gradient in some processes only.
    """
    group = lists.group
    present = {group["params"][slot] for slot in lists.slots}
    absent = set(group["params"]) - present
    present, absent, stale, doubtful = united(group["params"], present, absent, stale, doubtful)
    for slot, p in enumerate(group["params"]):
        if p in present and p in absent:
            raise InputError(
                f"{parameter_name(group, slot)} has a gradient in some processes and none in "
                "others, and its mirror map couples its shards: give one to all (zeros), or none"
            )
    return stale, doubtful


def _coarseness(x: Tensor) -> float:
    """How coarsely the entries were rounded, relative to their size: as a narrower dtype rounds,
    where all are numbers of it, as those that were loaded from a model of that dtype are."""
    narrower = [kind for kind in _FLOATS if kind.itemsize < x.itemsize]
    held = [kind for kind in narrower if torch.equal(x.to(kind).to(x.dtype), x)]
    return max(torch.finfo(kind).eps for kind in (x.dtype, *held))


def _is(x: Tensor, rounded: Tensor) -> Tensor:
    return x.to(rounded.dtype) == rounded


def _through(lists: Lists, places: list[int], xs: Tensors, inverse: bool = False) -> Tensors:
    """The map, or its inverse, of tensors that belong to the parameters at these places."""
    group = lists.group
    mirror_map = on_shards(group["mirror_map"], group["params"])
    function = mirror_map.inverse if inverse else mirror_map
    return through(function, xs, [lists.slots[i] for i in places], len(group["params"]))


def _changed_shape(group: Group, slot: int, whose: str, shape: tuple[int, ...]) -> InputError:
    found = tuple(group["params"][slot].shape)
    return InputError(
        f"{parameter_name(group, slot)} is of shape {found} now, and {whose} of {tuple(shape)}: "
        "build the optimizer anew where parameters change their shape, and a map that owns tensors "
        "too"
    )


def _check_not_captured(p: Tensor) -> None:
    """Raises InputError where the state of p is created within a CUDA graph."""
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "a CUDA graph is being captured and would create the state anew at every replay: take "
            "a step before"
        )
