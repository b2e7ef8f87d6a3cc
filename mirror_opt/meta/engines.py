r"""How a batch of tasks is run: one after the other, or all at once.

``loop`` runs the tasks in turn and leaves one autograd graph: the best choice on a CPU for
convolutions, which ``vmap`` turns into slow grouped ones. ``vmap`` runs them as one batched
computation: the best choice for small networks and on a GPU.

The meta-gradient is taken by autograd over one graph, in which ``vmap`` batches the forward pass
alone (``differentiation="batched"`` of ``InnerLoop``). Gradients taken by ``torch.func`` within
``vmap`` are not to be differentiated again: through batch, instance and layer norm with weights the
result is silently wrong (PyTorch, at least to 2.13).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree as pytree

from mirror_opt.errors import InputError
from mirror_opt.maps.base import MirrorMap
from mirror_opt.meta.inner import InnerLoop, NotBatchableError, over_tasks
from mirror_opt.newton import NewtonError

__all__ = ["ENGINES", "Automatic", "check_tasks", "choose_engine", "map_tasks", "mean_loss"]

ENGINES = ("loop", "vmap")

TaskFn = Callable[..., Any]  # (inner, *task tensors) -> nested tensors


def choose_engine(engine: str, model: nn.Module, mirror_map: MirrorMap) -> str:
    """Resolves ``"auto"``, and raises InputError for an engine that cannot serve model or map."""
    if engine not in ("auto", *ENGINES):
        raise InputError(f"Invalid {engine=}: pass 'auto', 'loop' or 'vmap'")
    reason = next(filter(None, map(_not_batchable, model.modules())), None)
    if engine == "vmap" and reason is not None:
        raise InputError(f"engine='vmap' cannot {reason}, or pass engine='loop'")
    if engine == "vmap" and not mirror_map.inverse_is_batchable:
        raise InputError(
            f"engine='vmap' cannot batch the inverse of this {type(mirror_map).__name__}: build it "
            "with parametrization='dual', or pass engine='loop'"
        )
    if engine != "auto":
        return engine
    if not mirror_map.inverse_is_batchable:
        return "loop"
    if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        return "loop"  # torch batches attention that is differentiated twice by a loop, and warns
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    on_gpu = any(p.is_cuda for p in model.parameters())
    return "loop" if reason is not None or (convolutional and not on_gpu) else "vmap"


def _not_batchable(module: nn.Module) -> str | None:
    """What ``torch.func.vmap`` cannot do for a module, and what to do about it; None if it can."""
    if isinstance(module, _NormBase) and module.training and module.track_running_stats:
        return (
            "update the running statistics of batch or instance norm: build the model with "
            "track_running_stats=False, call model.eval()"
        )
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # It would hold that row still for the first task of a batch only, without a word.
        return "hold the row padding_idx of an nn.Embedding still: build it without"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "change an embedding in its forward pass: build it without max_norm"
    if isinstance(module, nn.RNNBase):
        return f"batch {type(module).__name__}: build the model without"
    if isinstance(module, nn.TransformerEncoderLayer) and not module.training:
        return "batch the fast path of nn.TransformerEncoderLayer: call model.train()"
    if isinstance(module, _SpectralNorm) and module.training:
        return "update the vectors of spectral_norm: call model.eval()"
    return None


class Automatic:
    """Takes the best engine, and the tasks in turn from where torch turns out not to batch them."""

    def __init__(self) -> None:
        self._in_turn: set[str] = set()  # what torch cannot batch

    def run(self, what: str, function: Callable[[str], Any], engine: str, inner: InnerLoop) -> Any:
        """``function(engine)`` with the engine that a learner asks for.

        Args:
            what: names the function, in a warning and in what is remembered.
            engine: as the learner takes it.

        Raises:
            InputError: the engine cannot serve the model or the map.
        """
        best = choose_engine(engine, inner.model, inner.mirror_map)
        if engine != "auto" or best == "loop":
            return function(best)
        if what in self._in_turn:
            return function("loop")
        rewind = _rewinder(inner.rates.device)
        try:
            return function(best)
        except torch.OutOfMemoryError:
            raise
        except (NotBatchableError, RuntimeError) as error:
            # Not all that torch cannot batch is told in words of its own; if it is no matter of
            # batching, the tasks in turn raise it again.
            reason = str(error).partition("\n")[0]
        rewind()  # as if it had not been tried
        result = function("loop")
        self._in_turn.add(what)
        warnings.warn(f"{what} takes the tasks in turn: {reason}", stacklevel=3)
        return result


def map_tasks(engine: str, function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor]) -> Any:
    """``function(inner, *task)`` for every task, its tensors stacked along a new first dimension.

    Args:
        engine: ``"loop"`` or ``"vmap"``.
        inner: for one task.
        function: returns nested tuples, lists or dicts of tensors. With ``"vmap"`` they must not be
            differentiated through the support gradients that it takes.
        tasks: tensors whose first dimension counts the tasks.
    """
    check_tasks(tasks)
    if engine == "vmap":
        within, rewind = replace(inner, differentiation="func"), _rewinder(inner.rates.device)
        try:
            return over_tasks(lambda *task: function(within, *task))(*tasks)
        except NewtonError:
            # A solve that fails does so for all of them: in turn, for its own task only.
            rewind()
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
    check_tasks(tasks)
    run = _looped if engine == "loop" else _batched
    return run(function, inner, tasks, skip)


def _rewinder(device: torch.device) -> Callable[[], None]:
    """What takes torch's generators, of the CPU and of a device, back to where they are now."""
    generators = [torch.default_generator]
    # Some devices have no generators of their own (cpu, meta), or keep theirs to themselves (mps).
    own = getattr(getattr(torch, device.type, None), "default_generators", ())
    generators += own[device.index or 0 :][:1]
    states = [generator.get_state() for generator in generators]

    def rewind() -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return rewind


def check_tasks(tasks: Sequence[Tensor]) -> None:
    """Raises InputError unless all tensors hold the same number of tasks, and at least one."""
    counts = [len(x) if x.dim() else 0 for x in tasks]
    if not counts[0]:
        raise InputError("got a batch of no tasks: pass tensors (T, n, *) with T of at least 1")
    if len(set(counts)) > 1:
        raise InputError(f"got tensors of {counts} tasks: pass (T, n, *) with one T for all")


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
    return torch.stack(kept).mean() if kept else _none_kept(query), query, support


def _batched(function: TaskFn, inner: InnerLoop, tasks: Sequence[Tensor], skip: bool):
    batched = replace(inner, differentiation="batched")
    query, support = function(batched, *tasks)
    keep = _kept(query, support, skip)
    kept = query
    if skip and not bool(keep.all()):
        if not bool(keep.any()):
            return _none_kept(query.detach()), query.detach(), support.detach()
        kept, _ = function(batched, *(x[keep] for x in tasks))  # as in _looped: without the others
    return kept.mean(), query.detach(), support.detach()


def _none_kept(query: Tensor) -> Tensor:
    """The mean over no tasks."""
    return query.new_full((), math.nan)
