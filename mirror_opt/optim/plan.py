"""What a step of a parameter group reads and would write, and what is said where it may not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_opt.newton import NewtonError
from mirror_opt.optim.options import Group, parameter_name
from mirror_opt.optim.sharded import local
from mirror_opt.optim.update import Tensors, Update, all_finite

__all__ = ["Lists", "Plan", "attempt_each", "failure"]


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

    def take(self, keep: Tensor | None, states: dict[Tensor, dict] | None = None) -> None:
        """Takes the step.

        Args:
            keep: 0-dim bool, whether to; None: yes.
            states: where new state goes, for autograd has saved what there is; else it is written
                in place.
        """
        kinds = zip(("parameter", "momentum_buffer", "dual"), self.old, self.new, strict=True)
        for kind, old, new in kinds:
            if not old:
                continue
            if keep is not None:
                new = [torch.where(keep.to(o.device), n, o) for o, n in zip(old, new, strict=True)]
            if states is not None and kind != "parameter":
                for p, n in zip(self.old.params, new, strict=True):
                    states[p][kind] = n
            elif self.foreach:
                torch._foreach_copy_(old, new)
            else:
                for o, n in zip(old, new, strict=True):
                    o.copy_(n)


def attempt_each(function: Callable[[Any], Any], xs: list, failures: list[NewtonError]) -> list:
    """The function of each x; of those whose solve fails, the error in ``failures`` instead."""
    results = []
    for x in xs:
        try:
            results.append(function(x))
        except NewtonError as error:
            failures.append(error)
    return results


_ADVICE = "nothing was changed: lower lr, clip the gradients, or pass nonfinite='skip'"


def failure(groups: list[Group], plans: list[Plan], failures: list[NewtonError]) -> ArithmeticError:
    """The error of a step that may not be taken."""
    cause = _nonfinite_gradient(groups)
    if cause is None and failures:
        return failures[0]
    error = FloatingPointError(cause or _nonfinite_result(plans))
    error.__cause__ = failures[0] if failures else None
    return error


def _nonfinite_gradient(groups: list[Group]) -> str | None:
    """Names the first gradient that is not finite."""
    for i, group in enumerate(groups):
        unnamed = len(groups) > 1 and "param_names" not in group
        where = f" (group {i})" if unnamed else ""
        for slot, p in enumerate(group["params"]):
            if p.grad is not None and p.numel() > 0 and not all_finite([local(p.grad)]):
                name = parameter_name(group, slot) + where
                return f"the gradient of {name} holds NaN or Inf; {_ADVICE}"
    return None


def _nonfinite_result(plans: list[Plan]) -> str:
    """Says where finite gradients led to a value that is not finite."""
    for plan in plans:
        for slot, old, new in zip(plan.slots, plan.old.params, plan.new.params, strict=True):
            name = parameter_name(plan.group, slot)
            if not all_finite([old]):
                return f"{name} holds NaN or Inf already; {_ADVICE}"
            if not all_finite([new]):
                return f"the step of {name} leaves the range of {new.dtype}; {_ADVICE}"
        if not all_finite([*plan.new.buffers, *plan.new.duals]):
            return f"the momentum or the dual state overflows; {_ADVICE}"
    return f"the step fails in another process that holds shards; {_ADVICE}"
