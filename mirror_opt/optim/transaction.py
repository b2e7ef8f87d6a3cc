"""A step of all groups, taken whole or not at all.

One number decides it, ``stop``: 0-dim, and not zero where nothing may change, as GradScaler's
``found_inf`` (None: nothing can stop the step). It is asked where that costs nothing, or where an
error has to be raised; else every part of the step is handed it and selects by it on the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mirror_opt.newton import NewtonError, Status
from mirror_opt.optim.fused import FusedStep, attempt, fused_step, may_fuse
from mirror_opt.optim.options import Group, check_run_options, parameter_name
from mirror_opt.optim.plan import Lists, Plan, plan
from mirror_opt.optim.scalars import either, reads_freely
from mirror_opt.optim.sharded import anywhere, local, meshes
from mirror_opt.optim.state import States
from mirror_opt.optim.update import all_finite

__all__ = ["take"]

_Failure = tuple[Group, NewtonError]


def take(
    optimizer: Optimizer, collect: Callable[[Group], Lists], states: States | None
) -> list[Lists] | None:
    """Takes a step of all groups.

    Args:
        optimizer: whose ``defaults`` say what to do about results that are not finite.
        collect: what a step of a group reads, its state created where it is missing.
        states: where that state is; None in a compiled step, where there is no undoing.

    Returns:
        What the step read; None where it was not taken, and nothing but new state has changed.

    Raises:
        InputError, FloatingPointError, NewtonError: as ``MirrorDescent.step``.
    """
    groups, differentiable = optimizer.param_groups, optimizer.defaults["differentiable"]
    for group in groups:
        check_run_options(group, optimizer.defaults)
    every = [p for group in groups for p in group["params"]]
    shared, free = meshes(every), reads_freely(every)
    policy = optimizer.defaults["nonfinite"] or ("raise" if free else "skip")
    asks = free or policy == "raise"
    grad_scale, stop = _from_scaler(optimizer, shared)
    if stop is not None and asks:
        if stop:
            return None
        stop = None

    # A solve that fails in one process must not keep it from meeting the others: go on.
    failures: list[_Failure] = []
    lists = [x for x in _each(collect, groups, failures) if x.params]
    simple = len(lists) == 1 and not (failures or shared or differentiable or stop is not None)
    if simple:
        status = attempt(lists[0], grad_scale)
        if status is not None:
            _check(status)
            return lists

    fused: list[FusedStep | None] = [None] * len(lists)
    if not differentiable:
        fused = [fused_step(x, grad_scale) for x in lists]
        if free or policy != "propagate":  # else they leave out the elements that fail
            # Who propagates does not ask other processes whether theirs fail.
            with_others = shared if policy != "propagate" else []
            could_fail = _could_fail(groups, fused, grad_scale, with_others)
            if could_fail is not None and asks:
                if could_fail:  # then take the steps that can be undone
                    fused = [None] * len(lists)
            else:
                stop = either(stop, could_fail)

    unfused = [x for x, step in zip(lists, fused, strict=True) if step is None]
    planned = functools.partial(plan, grad_scale=grad_scale, differentiable=differentiable)
    plans = _each(planned, unfused, failures)
    if failures and policy == "propagate":
        raise _failed_solve(groups, *failures[0])
    if (plans or failures or shared) and policy != "propagate":
        bad = (~all_finite([t for x in plans for t in x.outcome()])).float()
        bad = anywhere(torch.ones_like(bad) if failures else bad, shared)
        # A select would let autograd multiply the NaN that it hides by zero: there, ask.
        if policy == "raise" or differentiable or failures:
            if bad:
                if policy == "skip":
                    return None
                raise _failure(groups, plans, failures)
        else:
            stop = either(stop, bad)

    # The one step that a skip has to be known of: it keeps no state that it has made.
    if states is not None and states.changed and stop is not None and not stop.is_meta and stop:
        return None
    for x in plans:
        x.take(stop, optimizer.state if differentiable else None)
    for step in filter(None, fused):
        _check(step.take(stop, grad_scale))
    return lists


def _from_scaler(optimizer: Optimizer, shared: list) -> tuple[Tensor | None, Tensor | None]:
    """What GradScaler has set: the scale of the gradients, and a flag to skip the step."""
    grad_scale, found_inf = (getattr(optimizer, x, None) for x in ("grad_scale", "found_inf"))
    if grad_scale is not None:
        grad_scale = grad_scale.reshape(())
    if isinstance(found_inf, int):  # the sum of no flags, where there are no gradients
        found_inf = torch.tensor(float(found_inf), device="cpu")
    if found_inf is not None:
        found_inf = anywhere(found_inf.reshape(()), shared)
    return grad_scale, found_inf


def _could_fail(
    groups: list[Group], fused: list[FusedStep | None], grad_scale: Tensor | None, shared: list
) -> Tensor | None:
    """1 where one of the fused steps could fail, 0-dim; None where there are none to ask for."""
    flags = [step.could_fail(grad_scale) for step in fused if step is not None]
    if not flags:
        if not (shared and any(map(may_fuse, groups))):
            return None
        flags = [torch.zeros((), device="cpu")]  # this process holds nothing, but others do
    flag = functools.reduce(torch.maximum, (flag.to(flags[0]) for flag in flags))
    return anywhere(flag, shared)


def _each(function: Callable[[Any], Any], xs: list, failures: list[_Failure]) -> list:
    """The function of each group, or of what it reads; where a solve fails, a failure instead."""
    results = []
    for x in xs:
        try:
            results.append(function(x))
        except NewtonError as error:
            failures.append((x.group if isinstance(x, Lists) else x, error))
    return results


def _check(status: Status | None) -> None:
    if status not in (None, Status.CONVERGED):
        raise NewtonError(status)


_ADVICE = "nothing was changed: lower lr, clip the gradients, or pass nonfinite='skip'"


def _failure(groups: list[Group], plans: list[Plan], failures: list[_Failure]) -> ArithmeticError:
    """The error of a step that may not be taken."""
    cause = _nonfinite_gradient(groups)
    if cause is None and failures:
        return _failed_solve(groups, *failures[0])
    error = FloatingPointError(cause or _nonfinite_result(groups, plans))
    error.__cause__ = failures[0][1] if failures else None
    return error


def _failed_solve(groups: list[Group], group: Group, error: NewtonError) -> NewtonError:
    where = f"the step of group {_place(groups, group)}" if len(groups) > 1 else "the step"
    named = NewtonError(error.status, f"{where} was not taken, and nothing was changed")
    named.__cause__ = error
    return named


def _nonfinite_gradient(groups: list[Group]) -> str | None:
    """Names the first gradient that is not finite."""
    for group in groups:
        for slot, p in enumerate(group["params"]):
            if p.grad is not None and p.numel() > 0 and not all_finite([local(p.grad)]):
                return f"the gradient of {_named(groups, group, slot)} holds NaN or Inf; {_ADVICE}"
    return None


def _nonfinite_result(groups: list[Group], plans: list[Plan]) -> str:
    """Says where finite gradients led to a value that is not finite."""
    for x in plans:
        for i, slot in enumerate(x.slots):
            name = _named(groups, x.group, slot)
            if not all_finite([x.old.params[i]]):
                return f"{name} holds NaN or Inf already; {_ADVICE}"
            state = [*x.new.buffers[i : i + 1], *x.new.duals[i : i + 1]]
            if not all_finite(state):
                kept = " or ".join(
                    ["the momentum"] * bool(x.new.buffers) + ["the dual state"] * bool(x.new.duals)
                )
                return f"{kept} of {name} leaves the range of {state[0].dtype}; {_ADVICE}"
            if not all_finite([x.new.params[i]]):
                return f"the step of {name} leaves the range of {x.new.params[i].dtype}; {_ADVICE}"
    return f"the step fails in another process that holds shards; {_ADVICE}"


def _named(groups: list[Group], group: Group, slot: int) -> str:
    unnamed = len(groups) > 1 and "param_names" not in group
    return parameter_name(group, slot) + f" (group {_place(groups, group)})" * unnamed


def _place(groups: list[Group], group: Group) -> int:
    return next(i for i, other in enumerate(groups) if other is group)
