"""A group's step before it is taken: what it reads, and what it would write."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from mirror_opt.errors import InputError
from mirror_opt.optim import blocks
from mirror_opt.optim.options import Group, check_decay, parameter_name
from mirror_opt.optim.rounding import generators
from mirror_opt.optim.sharded import on_shards
from mirror_opt.optim.update import Rule, Tensors, Update, widened

__all__ = ["Lists", "Plan", "plan"]


class Lists(NamedTuple):
    """What a step of a group reads, one entry for each parameter that has a gradient."""

    group: Group
    slots: list[int]
    params: Tensors
    grads: Tensors
    buffers: Tensors
    anchors: Tensors
    dual_inits: Tensors
    duals: Tensors


@dataclass(frozen=True)
class Plan:
    """A group's step before it is taken."""

    group: Group
    foreach: bool
    slots: list[int]
    grads: Tensors
    old: Update
    new: Update

    def outcome(self) -> Tensors:
        """All that has to be finite for the step to be taken."""
        # At a rate of zero parameters and duals stay as they are, also where they are yet to be
        # loaded.
        pairs = zip(self.new, self.old, strict=True)
        params, buffers, duals = ([] if new is old else new for new, old in pairs)
        # A gradient that is not finite shows in the momentum and in a dual state that has moved;
        # elsewhere a map that saturates or a rate of zero could hide it.
        shown = [] if buffers or duals else self.grads
        return [*params, *buffers, *duals, *shown]

    def take(self, stop: Tensor | None, states: dict[Tensor, dict] | None = None) -> None:
        """Takes the step.

        Args:
            stop: 0-dim, not zero where nothing is to change; None: nothing stops it.
            states: where new state goes, for autograd has saved what there is; else it is written
                in place.
        """
        kinds = zip(("parameter", "momentum_buffer", "dual"), self.old, self.new, strict=True)
        for kind, old, new in kinds:
            if not old:
                continue
            if stop is not None:
                pairs = zip(old, new, strict=True)
                new = [torch.where(stop.to(o.device) == 0, n, o) for o, n in pairs]
            if states is not None and kind != "parameter":
                for p, n in zip(self.old.params, new, strict=True):
                    states[p][kind] = n
            elif self.foreach:
                torch._foreach_copy_(old, new)
            else:
                for o, n in zip(old, new, strict=True):
                    o.copy_(n)


def plan(lists: Lists, grad_scale: Tensor | None, differentiable: bool) -> Plan:
    """The plan of a group.

    Raises:
        InputError: weight decay would leave the domain, or autograd cannot record the step.
        NewtonError: a solve of the map failed.
    """
    group, slots, params, grads, buffers, anchors, dual_inits, duals = lists
    for slot, p in zip(slots, params, strict=True) if differentiable else ():
        if p.is_leaf and p.requires_grad:
            raise InputError(
                f"differentiable=True cannot change {parameter_name(group, slot)}, a leaf tensor "
                "that requires grad: pass non-leaf parameters, such as p.clone()"
            )
    check_decay(group)
    if grad_scale is not None:
        grads = [g / grad_scale.to(g.device) for g in widened(grads)]
    foreach = group["foreach"]
    if foreach is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable)
    stochastic = group["rounding"] == "stochastic"
    rule = Rule(
        on_shards(group["mirror_map"], group["params"]),
        slots,
        len(group["params"]),
        group["lr"],
        group["momentum"],
        group["nesterov"],
        group["weight_decay"],
        group["maximize"],
        foreach,
        differentiable,
        generators(group["params"], slots) if stochastic else None,
    )
    new = blocks.step(rule, params, grads, buffers, anchors, dual_inits, duals)
    return Plan(group, foreach, slots, grads, Update(params, buffers, duals), new)
