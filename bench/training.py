"""Real training: MirrorDescent with several maps against tuned SGD and AdamW.

    python bench/training.py search [--only PROBLEM]    # every optimizer, its grid of rates
    python bench/training.py final  [--only PROBLEM]    # each at its best rate, all seeds

Rows in bench/results/training.json, one for each run, with the metric and the seconds of training
along the way; what is there is not run again. The problems are those of ``bench/problems.py``.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import problems
import torch
from problems import Problem
from results import add_rows, read_rows, revision
from torch import nn

from mirror_opt import MirrorDescent, maps, meta
from mirror_opt.runs.results import versions

NAME = "training"
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
POINTS = 20  # of a curve
DIVERGED = 1e6


class Setting(NamedTuple):
    make: Callable[[int], Problem]
    metric: str
    steps: int
    optimizers: dict[str, tuple[Callable, tuple[float, ...]]]  # and the grid of learning rates


def powers(low: int, high: int) -> tuple[float, ...]:
    """Two rates a decade: 1 and 3 times 10^k."""
    return tuple(m * 10.0**k for k in range(low, high + 1) for m in (1, 3))


def sgd(problem: Problem, lr: float, momentum: float = 0.9):
    return torch.optim.SGD(problem.params, lr, momentum=momentum)


def adamw(problem: Problem, lr: float):
    return torch.optim.AdamW(problem.params, lr)


def mirror(mirror_map: maps.MirrorMap, problem: Problem, lr: float, momentum: float = 0.9):
    return MirrorDescent(problem.params, lr, mirror_map, momentum=momentum)


def thresholding(threshold: float, problem: Problem, lr: float):
    """A SeparableNeural set by hand: grad h* has slope 0.1 up to the threshold and 1 beyond."""
    separable = maps.SeparableNeural(problem.params, units=1, share="tensor")
    with torch.no_grad():
        for psi in separable.groups:
            psi.p.fill_(-10)  # w s = -rho: the most that is allowed
            psi.log_s.fill_(-math.log(threshold))
    return MirrorDescent(problem.params, lr, separable, momentum=0.9)


def reset(module: nn.Module) -> None:
    if not isinstance(module, nn.Embedding) and hasattr(module, "reset_parameters"):
        module.reset_parameters()


def learned(inner_lr: float, problem: Problem, lr: float, iterations: int = 60):
    """A SeparableNeural meta-learned on runs of five steps, each on a batch and from a new init."""
    model, loss_fn, sample = problem.model
    start = [p.detach().clone() for p in problem.params]
    separable = maps.SeparableNeural(problem.params, share="tensor")
    learner = meta.MetaLearner(model, separable, lr=inner_lr, steps=5, engine="loop")
    g = torch.Generator().manual_seed(0)
    outer = torch.optim.Adam(separable.parameters(), lr=3e-2)

    def task() -> list:
        return [x.unsqueeze(0) for batch in (sample(g), sample(g)) for x in batch]

    learner.calibrate(loss_fn, *task()[:2])
    for _ in range(iterations):
        model.apply(reset)
        outer.zero_grad()
        learner.meta_loss(loss_fn, *task()).backward()
        nn.utils.clip_grad_norm_(separable.parameters(), 10)
        outer.step()
    with torch.no_grad():
        for p, s in zip(problem.params, start, strict=True):
            p.copy_(s)
            p.grad = None
    return MirrorDescent(problem.params, lr, separable, momentum=0.9)


class Projected(torch.optim.SGD):
    """SGD, and after each step the nearest point of the simplex."""

    def __init__(self, problem: Problem, lr: float):
        super().__init__(problem.params, lr)

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.copy_(problems.project_to_simplex(p))


PLAIN = {"momentum": 0.0}
SETTINGS = {
    "sparse-recovery": Setting(
        problems.sparse_recovery,
        "relative error",
        3000,
        {
            "SGD": (partial(sgd, **PLAIN), powers(-3, -1)),
            "AdamW": (adamw, powers(-5, -1)),
            "Hypentropy(1e-4)": (partial(mirror, maps.Hypentropy(1e-4), **PLAIN), powers(-3, 0)),
            "PNorm(1.1)": (partial(mirror, maps.PNorm(1.1), **PLAIN), powers(-3, 0)),
            "SeparableNeural, by hand": (partial(thresholding, 0.1), powers(-3, 0)),
        },
    ),
    "experts": Setting(
        problems.experts,
        "excess risk",
        2000,
        {
            "projected SGD": (Projected, powers(-6, -2)),
            "NegativeEntropy": (partial(mirror, maps.NegativeEntropy(), **PLAIN), powers(-3, 0)),
        },
    ),
    "logistic": Setting(
        problems.logistic,
        "held-out loss",
        500,
        {
            "SGD": (sgd, powers(-2, 0)),
            "AdamW": (adamw, powers(-4, -1)),
            "Hypentropy(0.01)": (partial(mirror, maps.Hypentropy(0.01)), powers(-1, 1)),
            "PNorm(1.5)": (partial(mirror, maps.PNorm(1.5)), powers(-2, 0)),
            "PNorm(3)": (partial(mirror, maps.PNorm(3.0)), powers(-4, -1)),
            "SeparableNeural, by hand": (partial(thresholding, 0.1), powers(-2, 0)),
            "SeparableNeural, learned": (partial(learned, 0.3), powers(-2, 0)),
        },
    ),
    "language-model": Setting(
        problems.language_model,
        "held-out loss, nats a byte",
        500,
        {
            "SGD": (sgd, powers(-2, 0)),
            "AdamW": (adamw, powers(-4, -2)),
            "Hypentropy(0.1)": (partial(mirror, maps.Hypentropy(0.1)), powers(-1, 0)),
            "PNorm(1.5)": (partial(mirror, maps.PNorm(1.5)), powers(-2, 0)),
            "PNorm(3)": (partial(mirror, maps.PNorm(3.0)), powers(-4, -1)),
            "SeparableNeural, by hand": (partial(thresholding, 0.01), powers(-2, 0)),
            "SeparableNeural, learned": (partial(learned, 0.1), powers(-2, -1)),
        },
    ),
    "resnet": Setting(
        problems.resnet,
        "held-out loss",
        400,
        {
            "SGD": (sgd, powers(-2, -1)),
            "AdamW": (adamw, powers(-3, -2)),
            "Hypentropy(0.1)": (partial(mirror, maps.Hypentropy(0.1)), powers(-1, 0)),
            "PNorm(1.5)": (partial(mirror, maps.PNorm(1.5)), powers(-2, -1)),
            "PNorm(3)": (partial(mirror, maps.PNorm(3.0)), powers(-3, -2)),
            "SeparableNeural, by hand": (partial(thresholding, 0.01), powers(-2, -1)),
            "SeparableNeural, learned": (partial(learned, 0.1), powers(-2, -1)),
        },
    ),
}


def run(problem_name: str, optimizer_name: str, lr: float, seed: int) -> dict:
    """Trains and returns the row: the metric at some steps, and the seconds of the steps alone."""
    setting = SETTINGS[problem_name]
    problem = setting.make(seed)
    optimizer = setting.optimizers[optimizer_name][0](problem, lr)
    every = setting.steps // POINTS
    curve, seconds = [(0, problem.metric(), 0.0)], 0.0
    for step in range(setting.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = problem.loss(step)
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        try:
            optimizer.step()
        except ArithmeticError:  # the step would leave the range of the dtype
            break
        seconds += time.perf_counter() - start
        if (step + 1) % every == 0:
            curve.append((step + 1, problem.metric(), seconds))
    finished = len(curve) == POINTS + 1 and abs(curve[-1][1]) < DIVERGED
    return {
        "problem": problem_name,
        "optimizer": optimizer_name,
        "lr": lr,
        "seed": seed,
        "metric": setting.metric,
        "final": curve[-1][1] if finished else None,
        "curve": [[s, m if math.isfinite(m) else None, round(t, 4)] for s, m, t in curve],
        "steps": setting.steps,
        "seconds": round(seconds, 3),
        "threads": 1,
        "revision": revision(),
        **versions("cpu"),
    }


def best_rate(problem: str, optimizer: str, rows: list[dict]) -> float:
    """The searched rate with the best final metric."""
    mine = [
        r
        for r in rows
        if (r["stage"], r["problem"], r["optimizer"]) == ("search", problem, optimizer)
    ]
    finite = [r for r in mine if r["final"] is not None and math.isfinite(r["final"])]
    if not finite:
        raise SystemExit(f"{problem}: search {optimizer!r} first")
    return min(finite, key=lambda r: r["final"])["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("search", "final"))
    parser.add_argument("--only", action="append", choices=SETTINGS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for problem in arguments.only or SETTINGS:
        for optimizer, (_, grid) in SETTINGS[problem].optimizers.items():
            if arguments.stage == "search":
                todo = [(lr, SEARCH_SEED) for lr in grid]
            else:
                lr = best_rate(problem, optimizer, read_rows(NAME))
                todo = [(lr, seed) for seed in SEEDS]
            for lr, seed in todo:
                key = {"problem": problem, "optimizer": optimizer, "lr": lr, "seed": seed}
                if any(all(r[k] == v for k, v in key.items()) for r in read_rows(NAME)):
                    continue
                row = run(problem, optimizer, lr, seed)
                add_rows(NAME, [{"stage": arguments.stage, **row}])
                print(f"{problem} {optimizer} lr {lr:g} seed {seed}: {row['final']} "
                      f"({row['seconds']} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
