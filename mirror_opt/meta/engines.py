r"""How a batch of tasks is run: one after the other, or all at once.

``loop`` runs the tasks in turn and leaves one autograd graph: the best choice on a CPU for
convolutions, which ``vmap`` turns into slow grouped ones. ``vmap`` runs them as one batched
computation: the best choice for small networks and on a GPU.

The meta-gradient is taken by autograd over one graph, in which ``vmap`` batches the forward pass
alone (``differentiation="batched"`` of ``InnerLoop``). Gradients taken by ``torch.func`` within
``vmap`` are not to be differentiated again: through batch, instance and layer norm with weights the
result is silently wrong (PyTorch, at least to 2.13).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from mirror_opt.errors import InputError
from mirror_opt.maps.base import MirrorMap
from mirror_opt.meta.inner import InnerLoop

__all__ = ["ENGINES", "choose_engine", "map_tasks", "mean_loss"]

ENGINES = ("loop", "vmap")

TaskFn = Callable[..., Any]  # (inner, *task tensors) -> nested tensors


def choose_engine(engine: str, model: nn.Module, mirror_map: MirrorMap) -> str:
    """Resolves ``"auto"``, and raises InputError for an engine that cannot serve model or map."""
    if engine not in ("auto", *ENGINES):
        raise InputError(f"Invalid {engine=}: pass 'auto', 'loop' or 'vmap'")
    norms = (m for m in model.modules() if isinstance(m, _NormBase))
    updates_buffers = any(m.training and m.track_running_stats for m in norms)
    if engine == "vmap" and updates_buffers:
        raise InputError(
            "engine='vmap' cannot update the running statistics of batch or instance norm: build "
            "the model with track_running_stats=False, call model.eval(), or pass engine='loop'"
        )
    if engine == "vmap" and not mirror_map.inverse_is_batchable:
        raise InputError(
            f"engine='vmap' cannot batch the inverse of this {type(mirror_map).__name__}: build it "
            "with parametrization='dual', or pass engine='loop'"
        )
    if engine != "auto":
        return engine
    if not mirror_map.inverse_is_batchable:
        return "loop"
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    on_gpu = any(p.is_cuda for p in model.parameters())
    return "loop" if updates_buffers or (convolutional and not on_gpu) else "vmap"


def map_tasks(engine: str, function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor]) -> Any:
    """``function(inner, *task)`` for every task, its tensors stacked along a new first dimension.

    Args:
        engine: ``"loop"`` or ``"vmap"``.
        function: returns nested tuples, lists or dicts of tensors. With ``"vmap"`` they must not be
            differentiated through the support gradients that it takes.
        tasks: tensors whose first dimension counts the tasks.
    """
    if engine == "vmap":
        return torch.func.vmap(lambda *task: function(inner, *task), randomness="different")(*tasks)
    results = [function(inner, *task) for task in zip(*tasks, strict=True)]
    return pytree.tree_map(lambda *values: torch.stack(values), *results)


def mean_loss(
    engine: str, function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor], skip: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over tasks of a loss, differentiable in everything that ``inner`` holds.

    Args:
        function: returns ``(query loss, support losses)`` of one task; of all of them with a
            leading dimension T where ``inner`` is batched.
        skip: leave tasks with a non-finite loss out of the mean, instead of letting them spoil it.

    Returns:
        The mean, 0-dim; the query losses ``(T,)``; the support losses ``(T, K)``.
    """
    run = _looped if engine == "loop" else _batched
    return run(function, inner, tasks, skip)


def _kept(query: Tensor, support: Tensor, skip: bool) -> Tensor:
    """Which tasks count: a bool for each."""
    ok = torch.isfinite(query) & torch.isfinite(support).all(-1)
    return ok if skip else torch.ones_like(ok)


def _looped(function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor], skip: bool):
    runs = [function(inner, *task) for task in zip(*tasks, strict=True)]
    # A task that is left out must not be reached by backward at all: zero times its infinite
    # derivatives would be NaN.
    kept = [query for query, support in runs if _kept(query, support, skip)]
    query, support = (torch.stack(x).detach() for x in zip(*runs, strict=True))
    return torch.stack(kept).mean() if kept else query.mean(), query, support


def _batched(function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor], skip: bool):
    batched = replace(inner, differentiation="batched")
    query, support = function(batched, *tasks)
    keep = _kept(query, support, skip)
    kept = query
    if skip and not bool(keep.all()) and bool(keep.any()):
        kept, _ = function(batched, *(x[keep] for x in tasks))  # as in _looped: without the others
    return kept.mean(), query.detach(), support.detach()
