"""torch.compile of the inner step of the meta-learner, with second-order meta-gradients.

    python docs/examples/compiled_inner_step.py

The graphs that the first tasks take serve all tasks, steps and meta-iterations.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mirror_opt import maps, meta
from mirror_opt.fewshot import Episodes, make_task
from mirror_opt.meta.inner import InnerLoop


def inner_step(inner: InnerLoop, params, zeta, rate: Tensor, x: Tensor, y: Tensor) -> tuple:
    """One mirror step of every task: zeta <- zeta - alpha g, phi <- phi_0 + grad H*(zeta)."""

    def loss(params: tuple[Tensor, ...]) -> Tensor:
        return inner.loss(F.mse_loss, params, x, y).sum()  # each task's has parameters of its own

    # By torch.func, which is traced into the graph; autograd differentiates the graph.
    gradient = torch.func.grad(loss)(params)
    zeta = tuple(z - rate * g for z, g in zip(zeta, gradient, strict=True))
    return inner.primal(zeta, None), zeta  # of an anchored map


def meta_loss(learner: meta.MetaLearner, step: Callable, batch: Episodes) -> Tensor:
    """The mean query loss of a batch of tasks after the learner's number of steps."""
    support_x, support_y, query_x, query_y = batch
    inner = replace(learner.inner_loop(), differentiation="batched")
    params = tuple(p.expand(len(support_x), *p.shape) for p in inner.init)
    zeta = inner.zero_dual(params)
    for k in range(learner.steps):
        params, zeta = step(inner, params, zeta, inner.rate(k), support_x, support_y)
    return inner.loss(F.mse_loss, params, query_x, query_y).mean()


def main(iterations: int = 200, backend: str = "inductor") -> None:
    torch.manual_seed(0)
    task = make_task("sinusoid", shots=10)
    model = task.model()
    learner = meta.MetaLearner(model, maps.KroneckerNeural(model.parameters()), lr=0.01, steps=5)
    outer = torch.optim.Adam(learner.param_groups(init_lr=3e-3, map_lr=3e-3))
    step = torch.compile(inner_step, backend=backend, fullgraph=True)
    for i in range(iterations):
        outer.zero_grad()
        loss = meta_loss(learner, step, task.sample("train", i, tasks=4))
        loss.backward()
        outer.step()
        if i % 50 == 0:
            print(f"meta-iteration {i}: query loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
