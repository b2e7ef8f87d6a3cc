"""The state of a step: momentum, anchor and dual state, created where they are missing."""

from typing import Any

import torch
from torch import Tensor

from mirror_opt.errors import InputError
from mirror_opt.optim.options import (
    Group,
    is_anchored,
    keeps_dual,
    parameter_name,
    state_dtype,
)
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.sharded import from_shard, gradient, is_sharded, local, on_shards
from mirror_opt.optim.update import Tensors, through, widened

__all__ = ["init_group"]


def init_group(states: dict[Tensor, Any], lists: Lists) -> None:
    """Collects what a step of the group reads, and creates the state that is missing."""
    group, slots, params, grads, buffers, anchors, dual_inits, duals = lists
    anchored = is_anchored(group)
    stateless = group["momentum"] == 0 and not anchored
    for slot, p in enumerate(group["params"]):
        grad = p.grad
        if grad is None or p.numel() == 0:
            continue
        if grad.layout is not torch.strided:
            raise InputError(
                f"the gradient of {parameter_name(group, slot)} is {grad.layout}: make it "
                "dense (sparse=False in an embedding), or give it to torch.optim.SparseAdam"
            )
        slots.append(slot)
        if is_sharded(p):
            params.append(local(p))
            grads.append(local(gradient(p)))
        else:
            params.append(p)
            grads.append(grad)
        if stateless:
            continue
        state, dtype = states[p], state_dtype(p, group)
        if not state:
            _check_not_captured(p)
        if group["momentum"] != 0:
            # Zeros make mu 0 + g = g of the first step, as SGD's special case does.
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
            buffers.append(local(state["momentum_buffer"]))
        if anchored:
            if "anchor" not in state:
                state["anchor"] = p.to(dtype, copy=True)
            anchors.append(local(state["anchor"]))
    if keeps_dual(group):
        _init_dual(states, group, params, anchors, slots)
        own = [states[group["params"][slot]] for slot in slots]
        duals.extend(local(state["dual"]) for state in own)
        if not anchored:
            dual_inits.extend(local(state["dual_init"]) for state in own)


def _init_dual(
    states: dict[Tensor, Any], group: Group, params: Tensors, anchors: Tensors, slots: list[int]
) -> None:
    whole = [group["params"][slot] for slot in slots]
    missing = [i for i, p in enumerate(whole) if "dual" not in states[p]]
    if not missing:
        return
    _check_not_captured(whole[missing[0]])
    xs = widened([params[i] for i in missing], copy=True)
    if anchors:
        xs = [x - anchors[i] for x, i in zip(xs, missing, strict=True)]
    slots = [slots[i] for i in missing]
    mirror_map = on_shards(group["mirror_map"], group["params"])
    zs = through(mirror_map, xs, slots, len(group["params"]))
    for i, z in zip(missing, zs, strict=True):
        state, z = states[whole[i]], from_shard(z, whole[i])
        if anchors:  # z of a displacement is a displacement already: z_0 is zero
            state["dual"] = z
        else:
            state["dual"], state["dual_init"] = torch.zeros_like(z), z


def _check_not_captured(p: Tensor) -> None:
    """Raises InputError where the state of p is created within a CUDA graph."""
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "a CUDA graph is being captured and would create the state anew at every replay: take "
            "a step before"
        )
