"""What adaptation gives: an adapted model, a batch of them, a course followed step by step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mirror_opt.meta.engines import map_tasks
from mirror_opt.meta.inner import InnerLoop

__all__ = ["Adapted", "AdaptedBatch", "Evaluation", "NonFiniteLossError", "raise_nonfinite"]


class NonFiniteLossError(ArithmeticError):
    """A loss of the inner loop was NaN or Inf.

    Attributes:
        task: the index of the task in the batch.
        step: the inner step before which the support loss was non-finite, from 0; ``"query"`` for
            the query loss after the last step.
    """

    def __init__(self, task: int, step: int | str):
        where = "the query loss" if step == "query" else f"the support loss before step {step}"
        super().__init__(
            f"{where} of task {task} is not finite: lower the inner learning rate, train with "
            "fewer steps, adapt with guard=True, or pass nonfinite='skip'"
        )
        self.task, self.step = task, step

    def __reduce__(self) -> tuple:  # a copy is made from what the error was
        return type(self), (self.task, self.step)


@dataclass(frozen=True)
class Adapted:
    """A model adapted to one task. Call it on inputs to predict.

    Attributes:
        params: the adapted parameters by name, differentiable back to the meta-parameters.
        losses: ``(steps,)`` support loss before each step.
        accepted: ``(steps,)`` whether each step was taken, with a guard; None without.
    """

    inner: InnerLoop
    params: dict[str, Tensor]
    losses: Tensor
    accepted: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The prediction for ``x`` of shape ``(n, *)``."""
        return self.inner.predict(tuple(self.params.values()), x)


@dataclass(frozen=True)
class AdaptedBatch:
    """A model adapted to T tasks; all tensors of ``Adapted`` with a leading dimension T."""

    inner: InnerLoop
    engine: str
    params: dict[str, Tensor]
    losses: Tensor
    accepted: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The predictions ``(T, n, *)`` for ``x`` of shape ``(T, n, *)``."""

        def predict(inner: InnerLoop, x: Tensor, *params: Tensor) -> Tensor:
            return inner.predict(params, x)

        return map_tasks(self.engine, predict, self.inner, (x, *self.params.values()))


@dataclass(frozen=True)
class Evaluation:
    """Adaptation followed step by step, on T tasks.

    Attributes:
        metrics: ``{adaptation steps: (T,) metric on the query sets}``.
        losses: ``(T, steps)`` support loss before each step.
        slopes: ``(T, steps)`` first-order change ``<g, phi_new - phi>`` of the support loss;
            positive where the step went uphill.
        accepted: ``(T, steps)`` whether each step was taken, with a guard; None without.
    """

    metrics: dict[int, Tensor]
    losses: Tensor
    slopes: Tensor
    accepted: Tensor | None


def raise_nonfinite(support: Tensor, query: Tensor | None = None) -> None:
    """Raises NonFiniteLossError for the first non-finite entry of ``(T, K)`` and ``(T,)``."""
    columns = support if query is None else torch.cat([support, query.unsqueeze(1)], 1)
    bad = ~torch.isfinite(columns)
    if bool(bad.any()):
        task, step = (int(i) for i in bad.nonzero()[0])
        raise NonFiniteLossError(task, "query" if step == support.shape[1] else step)
