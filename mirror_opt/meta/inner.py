"""The inner loop: a few mirror steps on one task, as a pure function of the meta-parameters."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from mirror_opt.dtypes import at_least_float32, without_autocast
from mirror_opt.errors import InputError
from mirror_opt.maps.base import MirrorMap, dot
from mirror_opt.newton import NewtonError

__all__ = ["InnerLoop", "LossFn", "NotBatchableError", "Step", "moved", "over_tasks"]

LossFn = Callable[[Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]


def _twice_differentiable() -> contextlib.AbstractContextManager:
    """Attention by the one way of torch that has second derivatives."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


class _WeightNormByHand(TorchFunctionMode):
    """Weight norm by its formula: torch's own has wrong second derivatives, to 2.13, and no
    batching rule."""

    @staticmethod
    def where_needed(model: nn.Module) -> contextlib.AbstractContextManager:
        """The mode where the model uses weight norm."""
        if torch.compiler.is_compiling() or not any(map(_has_weight_norm, model.modules())):
            return contextlib.nullcontext()
        return _WeightNormByHand()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = args
        others = [d for d in range(v.dim()) if d != dim % v.dim()] if dim != -1 else None
        return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _WeightNorm) or any(isinstance(hook, WeightNorm) for hook in hooks)


class NotBatchableError(InputError):
    """torch cannot batch an operation over tasks."""


def over_tasks(function: Callable) -> Callable:
    """The function of one task as one of a batch of tasks, by ``torch.func.vmap``.

    Raises:
        NotBatchableError: an operation of the model or the loss cannot be batched.
    """
    batched = torch.func.vmap(function, randomness="different")

    def call(*args: Any) -> Any:
        try:
            return batched(*args)
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            if "vmap" in first or "atching rule" in first:
                raise NotBatchableError(
                    f"engine='vmap' cannot run this model or loss: pass engine='loop' ({first})"
                ) from error
            raise

    return call


def moved(zeta: Tensors, rate: Tensor, gradient: Tensors) -> Tensors:
    """zeta - rate g, whose product is taken in the dtype of zeta: half's would lose it."""
    return tuple(z - rate * g.to(z.dtype) for z, g in zip(zeta, gradient, strict=True))


class Step(NamedTuple):
    """What one inner step did. The first of a run (``loss`` None) is the starting point.

    Attributes:
        params: the adapted parameters after the step.
        loss: support loss before the step, 0-dim (for a batch of tasks, this and all that follow
            are ``(T,)``).
        slope: ``<g, phi_new - phi>``, 0-dim: the first-order change of the loss, positive when the
            step went uphill; None unless asked for.
        accepted: whether the step was taken, 0-dim bool; None without a guard.
    """

    params: tuple[Tensor, ...]
    loss: Tensor | None = None
    slope: Tensor | None = None
    accepted: Tensor | None = None


@dataclass(frozen=True)
class InnerLoop:
    r"""Mirror steps from a shared start, with a dual state.

        zeta_0 = 0;   zeta_{k+1} = zeta_k - alpha_k g_k;   phi_k = phi_0 + grad H*(zeta_k)

    for anchored maps, and phi_k = grad h*(grad h(phi_0) + zeta_k) for the others.

    Everything it holds is a tensor that autograd may flow through, so an engine can differentiate
    a run with respect to any of it.

    Attributes:
        model: the network, called through ``torch.func.functional_call``.
        mirror_map: the geometry.
        names: names of the adapted parameters.
        init: phi_0, their values at the start.
        frozen: the other parameters and the buffers, by name.
        coefficients: ``mirror_map.coefficients()``, computed once for all tasks and steps.
        rates: ``(K,)`` step sizes; later steps use the last.
        horizon: K, the number of steps that the meta-parameters were trained for.
        differentiation: how support gradients are taken: ``"autograd"``; ``"func"``, by
            ``torch.func``, as within ``vmap``, where they must not be differentiated again (see
            ``meta.engines``); or ``"batched"``, by autograd for a batch of tasks at once, whose
            parameters, losses, x and y have a leading dimension T.
    """

    model: nn.Module
    mirror_map: MirrorMap
    names: tuple[str, ...]
    init: tuple[Tensor, ...]
    frozen: dict[str, Tensor]
    coefficients: Any
    rates: Tensor
    horizon: int
    differentiation: str

    def predict(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """The network's output for adapted parameters."""
        # Buffers are copied, so that a network that updates its own (running statistics) is left
        # as it was.
        frozen = {
            name: value if isinstance(value, nn.Parameter) or value.requires_grad else value.clone()
            for name, value in self.frozen.items()
        }
        named = {**frozen, **dict(zip(self.names, params, strict=True))}
        with _WeightNormByHand.where_needed(self.model):
            return torch.func.functional_call(self.model, named, (x,))

    def loss(self, loss_fn: LossFn, params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The loss at adapted parameters: 0-dim, or ``(T,)`` for a batch of tasks."""

        def one(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
            value = loss_fn(self.predict(params, x), y)
            if not isinstance(value, Tensor):
                raise InputError(
                    f"loss_fn gave a {type(value).__name__} for a task: pass one that gives a "
                    "0-dim tensor"
                )
            if value.dim():
                raise InputError(
                    f"loss_fn gave a loss of shape {tuple(value.shape)} for a task: pass one that "
                    "gives a 0-dim tensor, such as a mean (reduction='mean')"
                )
            return value

        return self.each(one, params, x, y)

    def each(self, function: Callable, *args: Any) -> Any:
        """The function of one task, for a batch of tasks where there is one."""
        return over_tasks(function)(*args) if self.differentiation == "batched" else function(*args)

    def rate(self, step: int) -> Tensor:
        """alpha of a step, counted from 0."""
        return self.rates[min(step, self.rates.shape[0] - 1)]

    def zero_dual(self, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """zeta_0 for parameters: in float32 for those of less, whose sum of steps it carries."""
        return tuple(torch.zeros_like(p, dtype=at_least_float32(p.dtype)) for p in params)

    def primal_start(self, x: Tensor) -> tuple[Tensor, ...]:
        """phi_0, for each task of a batch with the inputs ``x``."""
        if self.differentiation == "batched":
            return tuple(p.expand(len(x), *p.shape) for p in self.init)
        return self.init

    def dual_start(self) -> tuple[Tensor, ...] | None:
        """grad h(phi_0) for maps that act on phi itself, None for anchored maps."""
        if self.mirror_map.anchored:
            return None
        init = tuple(p.to(at_least_float32(p.dtype)) for p in self.init)
        with without_autocast(init):
            return self.mirror_map(init, self.coefficients)

    def primal(self, zeta: Sequence[Tensor], start: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """phi for a displacement zeta of the dual; NaN for a task whose solve fails, such as one
        that has diverged."""

        def one(zeta: Sequence[Tensor]) -> tuple[Tensor, ...]:
            if start is None:
                delta = self.mirror_map.inverse(zeta, self.coefficients)
                moved = [p + d for p, d in zip(self.init, delta, strict=True)]
            else:
                moved = [z + d for z, d in zip(start, zeta, strict=True)]
                moved = list(self.mirror_map.inverse(moved, self.coefficients))
            return tuple(m.to(p.dtype) for m, p in zip(moved, self.init, strict=True))

        def alone(zeta: Sequence[Tensor]) -> tuple[Tensor, ...]:
            try:
                return one(zeta)
            except NewtonError:
                pairs = zip(zeta, self.init, strict=True)
                return tuple((z * math.nan).to(p.dtype) for z, p in pairs)

        with without_autocast(self.init):
            if self.differentiation == "func":
                return one(zeta)  # for all tasks at once, which ``map_tasks`` then takes in turn
            if self.differentiation == "autograd":
                return alone(zeta)
            try:
                return self.each(one, tuple(zeta))
            except NewtonError:
                each = [alone(task) for task in zip(*zeta, strict=True)]
                return tuple(torch.stack(xs) for xs in zip(*each, strict=True))

    def gradient(
        self, params: Sequence[Tensor], loss_fn: LossFn, x: Tensor, y: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The support gradient and the support loss at ``params``; constants under ``no_grad``."""

        if self.differentiation == "func":
            one = torch.func.grad_and_value(lambda params: self.loss(loss_fn, params, x, y))
            return one(tuple(params))
        if torch.is_inference_mode_enabled():
            raise InputError(
                "adapting takes gradients, which torch.inference_mode() rules out: use no_grad()"
            )
        # Outside vmap plain autograd is cheaper: no dispatch of transforms around every operation.
        tracked = torch.is_grad_enabled()
        with torch.enable_grad(), _twice_differentiable() if tracked else contextlib.nullcontext():
            # A parameter that is frozen outside of the tasks adapts within them.
            at = [p if tracked and p.requires_grad else p.detach().requires_grad_() for p in params]
            value = self.loss(loss_fn, tuple(at), x, y)
            if not value.requires_grad:
                raise InputError(
                    "loss_fn gave a loss without a derivative: compute it from the prediction by "
                    "differentiable operations"
                )
            gradient = torch.autograd.grad(
                value.sum(), at, create_graph=tracked, allow_unused=True, materialize_grads=True
            )
        return gradient, value if tracked else value.detach()

    def run(
        self,
        loss_fn: LossFn,
        x: Tensor,
        y: Tensor,
        steps: int,
        *,
        first_order: bool = False,
        slopes: bool = False,
    ) -> Iterator[Step]:
        """Yields the start and then each of ``steps`` mirror steps on the support set ``(x, y)``.

        Args:
            first_order: treat the support gradients as constants.
            slopes: report ``Step.slope``.
        """
        start = self.dual_start()
        params = self.primal_start(x)
        zeta = self.zero_dual(params)
        yield Step(params)
        for k in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order):
                gradient, loss = self.gradient(params, loss_fn, x, y)
            rate = self.rate(k)
            zeta = moved(zeta, rate, gradient)
            new = self.primal(zeta, start)
            slope = None
            if slopes:
                move = tuple(n - p for n, p in zip(new, params, strict=True))
                slope = self.each(dot, gradient, move).detach()
            params = new
            yield Step(params, loss, slope)
