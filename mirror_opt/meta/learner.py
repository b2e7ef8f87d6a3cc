"""MetaLearner: learns where to start, in which geometry to move, and how fast."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mirror_opt.dtypes import at_least_float32, without_autocast
from mirror_opt.errors import InputError, is_integer, is_number
from mirror_opt.maps.base import MirrorMap
from mirror_opt.maps.classical import Euclidean
from mirror_opt.meta.adapted import Adapted, AdaptedBatch, Evaluation, raise_nonfinite
from mirror_opt.meta.engines import Automatic, check_tasks, choose_engine, map_tasks, mean_loss
from mirror_opt.meta.inner import InnerLoop, LossFn
from mirror_opt.meta.parameters import adapted_parameters
from mirror_opt.meta.stability import check_guard, guarded_run
from mirror_opt.untraced import untraced

__all__ = ["MetaLearner"]


class MetaLearner(nn.Module):
    r"""Adapts a model to tasks by mirror descent and learns how, through the unrolled steps.

    The meta-parameters are the init phi_0 (the model's own parameters), those of the mirror map,
    and with ``learn_lr`` a log rate for each inner step. For tasks with support S_t and query Q_t,
    ``meta_loss`` is the mean over t of L(phi_K(S_t); Q_t), phi_K from K mirror steps (Finn, Abbeel
    and Levine 2017; Zhang, Li and Giannakis 2025).

    Args:
        model: any ``nn.Module``; it is not changed, and its parameters are the init.
        mirror_map: the geometry; ``maps.Euclidean()`` (MAML) when None.
        lr: alpha, the inner step size, > 0.
        steps: K, the trained horizon: an integer >= 1, or ``(low, high)`` for training over a
            random horizon: in training mode each ``meta_loss`` draws one, uniformly, from torch's
            generator; everything else takes ``high``.
        first_order: drop second derivatives (first-order MAML).
        learn_lr: learn a rate for each inner step, starting at ``lr``.
        adapt: name patterns (``fnmatch``) of the parameters that adapt; all when None. The others
            are meta-learned and stay as they are within a task (ANIL, Raghu et al. 2020). The map
            must be built from ``MetaLearner.adapted_parameters(model, adapt)``.
        engine: ``"loop"``, ``"vmap"``, or ``"auto"``, which warns where torch turns out not to
            batch the tasks and takes them in turn; see ``meta.engines``.
        guard: ``"auto"`` guards the steps beyond the trained horizon K, True guards every step,
            False none; see ``meta.stability``.
        nonfinite: ``"raise"`` reports a non-finite loss with task and step; ``"skip"`` leaves the
            task out of ``meta_loss``.

    Raises:
        InputError: an argument is out of range, or the map does not fit the parameters.

    Example:
        >>> from mirror_opt import maps
        >>> model = nn.Linear(3, 1)
        >>> learner = MetaLearner(model, maps.KroneckerNeural(model.parameters()), lr=0.1, steps=2)
        >>> x, y = torch.randn(4, 8, 3), torch.randn(4, 8, 1)
        >>> loss = learner.meta_loss(nn.functional.mse_loss, x, y, x, y)
        >>> loss.backward()
        >>> learner.adapt(nn.functional.mse_loss, x[0], y[0])(x[0]).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        mirror_map: MirrorMap | None = None,
        *,
        lr: float = 0.01,
        steps: int | tuple[int, int] = 5,
        first_order: bool = False,
        learn_lr: bool = False,
        adapt: Iterable[str] | None = None,
        engine: str = "auto",
        guard: str | bool = "auto",
        nonfinite: str = "raise",
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"Invalid model of type {type(model).__name__}: pass an nn.Module")
        if not isinstance(mirror_map, MirrorMap | None):
            raise InputError(
                f"Invalid {mirror_map=}: pass an instance of a map in mirror_opt.maps, such as "
                "maps.KroneckerNeural(model.parameters())"
            )
        for name, value in (("first_order", first_order), ("learn_lr", learn_lr)):
            if not isinstance(value, bool):
                raise InputError(f"Invalid {name}={value!r}: pass True or False")
        if not (is_number(lr) and 0 < lr < float("inf")):
            raise InputError(f"Invalid {lr=}: pass a finite step size above 0")
        horizon = tuple(steps) if isinstance(steps, tuple | list) else (steps, steps)
        if not (
            all(map(is_integer, horizon)) and len(horizon) == 2 and 1 <= horizon[0] <= horizon[1]
        ):
            raise InputError(f"Invalid {steps=}: pass an integer >= 1 or a pair 1 <= low <= high")
        check_guard(guard)
        if nonfinite not in ("raise", "skip"):
            raise InputError(f"Invalid {nonfinite=}: pass 'raise' or 'skip'")
        mirror_map = Euclidean() if mirror_map is None else mirror_map
        adapted = adapted_parameters(model, adapt)
        mirror_map.check(list(adapted.values()))
        choose_engine(engine, model, mirror_map)
        self.model, self.mirror_map = model, mirror_map
        self.names = tuple(adapted)
        self.horizon, self.steps = horizon, horizon[1]
        self.first_order, self.guard = first_order, guard
        self.engine, self.nonfinite = engine, nonfinite
        self._automatic = Automatic()
        like = next(iter(adapted.values()))
        # One rate a step, so that the logs cost nothing and the rates stay positive.
        log_lr = torch.full((self.steps,), lr, dtype=torch.float64).log()
        log_lr = log_lr.to(at_least_float32(like.dtype)).to(like.device)
        self.log_lr = nn.Parameter(log_lr, requires_grad=learn_lr)

    adapted_parameters = staticmethod(adapted_parameters)

    def inner_loop(self) -> InnerLoop:
        """The inner loop at the present meta-parameters: shared by all tasks of a meta-batch.

        Raises:
            InputError: the init is not in the domain of the mirror map.
        """
        named = dict(self.model.named_parameters())
        init = tuple(named.pop(name) for name in self.names)
        frozen = {**named, **dict(self.model.named_buffers())}
        self.mirror_map.check_domain(init)  # which an outer step may have left
        with without_autocast(init):
            coefficients = self.mirror_map.coefficients()
        return InnerLoop(
            self.model,
            self.mirror_map,
            self.names,
            init,
            frozen,
            coefficients,
            self.log_lr.exp(),
            self.steps,
            "autograd",
        )

    # Adaptation.

    def _runner(self, guard: str | bool | None, steps: int):
        guard = self.guard if guard is None else check_guard(guard)
        if guard == "auto" and steps > self.steps:
            return partial(guarded_run, trusted=self.steps)
        return guarded_run if guard is True else InnerLoop.run

    def _adapt(self, runner, inner: InnerLoop, loss_fn: LossFn, x: Tensor, y: Tensor, steps: int):
        """(adapted parameters, support losses, accepted) of one task."""
        trail = list(runner(inner, loss_fn, x, y, steps, first_order=self.first_order))
        trace = [step.loss for step in trail[1:]]
        tasks = (len(x),) if inner.differentiation == "batched" else ()
        losses = torch.stack(trace, -1) if trace else inner.rates.new_zeros(*tasks, 0)
        accepted = [step.accepted for step in trail[1:] if step.accepted is not None]
        return trail[-1].params, losses, torch.stack(accepted, -1) if accepted else ()

    def adapt(
        self,
        loss_fn: LossFn,
        x: Tensor,
        y: Tensor,
        *,
        steps: int | None = None,
        guard: str | bool | None = None,
    ) -> Adapted:
        """Adapts to one task with support set ``(x, y)``.

        Args:
            loss_fn: ``loss_fn(prediction, y)``, a 0-dim tensor.
            x, y: the support set; the first dimension counts the examples.
            steps: inner steps; the trained horizon when None.
            guard: overrides the learner's.

        Returns:
            The adapted model, differentiable back to the meta-parameters.

        Raises:
            InputError: ``steps`` or ``guard`` is out of range.
            NonFiniteLossError: a support loss was not finite (``nonfinite="raise"``).
        """
        steps = self._check_steps(steps)
        inner = self.inner_loop()
        params, losses, accepted = self._adapt(
            self._runner(guard, steps), inner, loss_fn, x, y, steps
        )
        if self.nonfinite == "raise":
            raise_nonfinite(losses.detach().unsqueeze(0))
        named = dict(zip(self.names, params, strict=True))
        accepted = accepted if isinstance(accepted, Tensor) else None
        return Adapted(inner, named, losses.detach(), accepted)

    def adapt_batch(
        self,
        loss_fn: LossFn,
        x: Tensor,
        y: Tensor,
        *,
        steps: int | None = None,
        guard: str | bool | None = None,
    ) -> AdaptedBatch:
        """Adapts to T tasks; as ``adapt`` with a leading dimension T on ``x`` and ``y``.

        Differentiable like ``adapt``.

        Raises:
            InputError: as ``adapt``.
            NonFiniteLossError: as ``adapt``.
        """
        steps = self._check_steps(steps)
        check_tasks((x, y))
        inner, runner = self.inner_loop(), self._runner(guard, steps)

        def task(inner: InnerLoop, x: Tensor, y: Tensor):
            return self._adapt(runner, inner, loss_fn, x, y, steps)

        def run(engine: str):
            if engine == "vmap" and torch.is_grad_enabled():
                return engine, task(replace(inner, differentiation="batched"), x, y)
            return engine, map_tasks(engine, task, inner, (x, y))

        engine, (params, losses, accepted) = self._automatic.run(
            "adapt_batch", run, self.engine, inner
        )
        if self.nonfinite == "raise":
            raise_nonfinite(losses.detach())
        named = dict(zip(self.names, params, strict=True))
        accepted = accepted if isinstance(accepted, Tensor) else None
        return AdaptedBatch(inner, engine, named, losses.detach(), accepted)

    # Meta-learning.

    def meta_loss(
        self,
        loss_fn: LossFn,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        *,
        steps: int | None = None,
    ) -> Tensor:
        """The mean query loss after adaptation over T tasks, 0-dim.

        ``backward()`` gives the meta-gradient of every meta-parameter, with every engine.

        torch cannot compile what is differentiated twice: of a compiled function the second-order
        loss is left out, and runs as it is. What can be compiled is the inner step, whose gradient
        is then traced: ``docs/examples/compiled_inner_step.py``.

        Args:
            loss_fn: ``loss_fn(prediction, y)``, a 0-dim tensor.
            support_x, support_y, query_x, query_y: ``(T, n, *)``.
            steps: inner steps; when None the trained horizon, drawn anew where it is a range.

        Raises:
            InputError: ``steps`` is out of range.
            NonFiniteLossError: a loss was not finite (``nonfinite="raise"``), or all were.
        """
        tasks = (support_x, support_y, query_x, query_y)
        if torch.compiler.is_compiling() and not self.first_order:
            return self._meta_loss_outside_graphs(loss_fn, tasks, steps)
        return self._meta_loss(loss_fn, tasks, steps)

    @untraced
    def _meta_loss_outside_graphs(self, *args: Any) -> Tensor:
        return self._meta_loss(*args)

    def _meta_loss(self, loss_fn: LossFn, tasks: Sequence[Tensor], steps: int | None) -> Tensor:
        low, high = self.horizon
        if steps is None and self.training and low < high:
            steps = int(torch.randint(low, high + 1, (), device="cpu"))
        steps = self._check_steps(steps)

        def task(inner: InnerLoop, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor):
            params, losses, _ = self._adapt(InnerLoop.run, inner, loss_fn, sx, sy, steps)
            return inner.loss(loss_fn, params, qx, qy), losses

        skip = self.nonfinite == "skip"
        inner = self.inner_loop()
        loss, query, support = self._automatic.run(
            "meta_loss",
            lambda engine: mean_loss(engine, task, inner, tasks, skip),
            self.engine,
            inner,
        )
        if not skip or not bool(torch.isfinite(loss)):
            raise_nonfinite(support, query)
        return loss

    @torch.no_grad()
    def evaluate(
        self,
        loss_fn: LossFn,
        metric_fn: LossFn,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        *,
        adapt_steps: Sequence[int] = (0, 1, 2, 3, 5, 10),
        guard: str | bool | None = None,
    ) -> Evaluation:
        """Adapts to T tasks and measures the query sets after chosen numbers of steps.

        Args:
            loss_fn: the support loss, ``loss_fn(prediction, y)``.
            metric_fn: ``metric_fn(prediction, y)``, a 0-dim tensor.
            support_x, support_y, query_x, query_y: ``(T, n, *)``.
            adapt_steps: after how many steps to measure.
            guard: overrides the learner's.

        Returns:
            Metrics and the course of every task. Non-finite values are reported as they are: a
            diverged task is a result.

        Raises:
            InputError: ``adapt_steps`` or ``guard`` is out of range.
        """
        if not isinstance(adapt_steps, Sequence) or not adapt_steps or None in adapt_steps:
            raise InputError(f"Invalid {adapt_steps=}: pass one or more numbers of steps")
        steps = max(map(self._check_steps, adapt_steps))
        runner = self._runner(guard, steps)

        def task(inner: InnerLoop, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor):
            metrics, trail = {}, []
            for k, step in enumerate(runner(inner, loss_fn, sx, sy, steps, slopes=True)):
                if k in adapt_steps:
                    metrics[k] = metric_fn(inner.predict(step.params, qx), qy)
                trail.append(step)

            def collect(name: str) -> Any:
                values = [getattr(step, name) for step in trail[1:]]
                return torch.stack(values) if values and values[0] is not None else ()

            return metrics, collect("loss"), collect("slope"), collect("accepted")

        tasks, inner = (support_x, support_y, query_x, query_y), self.inner_loop()
        metrics, *trails = self._automatic.run(
            "evaluate", lambda engine: map_tasks(engine, task, inner, tasks), self.engine, inner
        )
        empty = query_x.new_zeros(query_x.shape[0], 0)
        losses, slopes, accepted = (t if isinstance(t, Tensor) else None for t in trails)
        return Evaluation(
            metrics,
            empty if losses is None else losses,
            empty if slopes is None else slopes,
            accepted,
        )

    def calibrate(self, loss_fn: LossFn, support_x: Tensor, support_y: Tensor) -> None:
        """Sets the scale of the map to the first Euclidean step, -alpha g, on a batch of tasks.

        Call it once, before training.

        Args:
            loss_fn: the support loss, as ``adapt`` takes it.
            support_x, support_y: ``(T, n, *)``.

        Raises:
            InputError: there are no tasks, or a gradient is not finite. The map is as before then.
        """
        check_tasks((support_x, support_y))
        inner = self.inner_loop()
        with torch.no_grad():
            displacements = [
                [-inner.rate(0) * g for g in inner.gradient(inner.init, loss_fn, x, y)[0]]
                for x, y in zip(support_x, support_y, strict=True)
            ]
        if not all(bool(d.isfinite().all()) for task in displacements for d in task):
            raise InputError(
                "a support gradient at the init is not finite: look for NaN in the inputs, or for "
                "an init that has diverged"
            )
        with without_autocast(inner.init):
            self.mirror_map.calibrate(displacements)

    def param_groups(
        self, *, init_lr: float, map_lr: float, rate_lr: float = 1e-2
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: ``init``, and ``map`` and ``rate`` where learned.

        Args:
            init_lr, map_lr, rate_lr: the outer learning rates.
        """
        groups: list[dict[str, Any]] = [
            {"name": "init", "params": list(self.model.parameters()), "lr": init_lr},
            {"name": "map", "params": list(self.mirror_map.parameters()), "lr": map_lr},
            {"name": "rate", "params": [self.log_lr], "lr": rate_lr},
        ]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return [group for group in groups if group["params"]]

    def _check_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.steps
        if not is_integer(steps) or steps < 0:
            raise InputError(f"Invalid {steps=}: pass an integer of at least 0")
        return steps
