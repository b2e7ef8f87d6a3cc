"""Is every learned h a valid distance-generating function, before and after training?

    python bench/validity.py

Every registered map with parameters, in all its variants, is trained on sinusoid tasks as method
``mirror``; maps without parameters are checked once. For every tensor of the network, at
displacements that adaptation really makes: the round trip in float32, and in float64 the asymmetry
and the extreme eigenvalues of the Jacobian of the closed direction against the certified bounds,
and D_h(x, y) against mu/2 |x - y|^2 and ell/2 |x - y|^2. Rows in bench/results/validity.json.
"""

import argparse
import copy
import itertools
import json
import tempfile

import torch
from fewshot import STUDIES
from results import add_rows, matches, read_rows, revision

from mirror_opt import maps
from mirror_opt.maps.base import dot
from mirror_opt.runs.config import RunConfig, build
from mirror_opt.runs.evaluate import load_run
from mirror_opt.runs.results import versions
from mirror_opt.runs.train import train

NAME = "validity"
# A map whose solve couples all entries of a tensor trains through Newton-CG, some hundred times
# slower.
ITERATIONS, COUPLED_ITERATIONS = 500, 30


def displacements(learner, task, tasks: int) -> list[list[torch.Tensor]]:
    """phi_K - phi_0 of some tasks for anchored maps, phi_K for the others; or simplex points."""
    if learner is None:
        return [[torch.softmax(torch.randn(40, 40), -1)] for _ in range(tasks)]
    batch = task.sample("val", 0, tasks)
    found = []
    for x, y in zip(batch.support_x, batch.support_y, strict=True):
        with torch.no_grad():
            adapted = learner.adapt(task.loss_fn, x, y).params.values()
        init = learner.inner_loop().init
        anchored = learner.mirror_map.anchored
        found.append(
            [(p - i if anchored else p).detach() for p, i in zip(adapted, init, strict=True)]
        )
    return found


@torch.no_grad()
def round_trip(mirror_map, points: list[list[torch.Tensor]]) -> float:
    """The largest error of grad h*(grad h(x)) over tensors, relative to the tensor's largest."""
    worst = 0.0
    for x in points:
        back = mirror_map.inverse(mirror_map(x))
        for a, b in zip(back, x, strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst


def curvature(mirror_map, points: list[list[torch.Tensor]]) -> dict[str, float]:
    """Asymmetry and extreme eigenvalues of the Jacobian of grad h, over all tensors, in float64."""
    closed = mirror_map.forward_is_closed
    direction = mirror_map.forward if closed else mirror_map.inverse
    asymmetry, low, high = 0.0, float("inf"), 0.0
    for x in points:
        at = x if closed else [z.detach() for z in mirror_map(x)]
        for i in range(len(at)):

            def one(v: torch.Tensor, i: int = i, at: list = at) -> torch.Tensor:
                return direction([v if j == i else None for j in range(len(at))])[i]

            n = at[i].numel()
            with torch.no_grad():
                jacobian = torch.func.jacrev(one)(at[i]).reshape(n, n)
            scale = float(jacobian.abs().max())
            asymmetry = max(asymmetry, float((jacobian - jacobian.T).abs().max()) / scale)
            eigenvalues = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
            low, high = min(low, float(eigenvalues[0])), max(high, float(eigenvalues[-1]))
    if not closed:  # the Jacobian of the inverse has the inverse eigenvalues
        low, high = 1 / high, 1 / low
    return {"asymmetry": asymmetry, "eigenvalue_min": low, "eigenvalue_max": high}


@torch.no_grad()
def distances(mirror_map, points: list[list[torch.Tensor]]) -> dict[str, float]:
    """The extremes of 2 D_h(x, y) / |x - y|^2 over pairs of points, in float64."""
    ratios = []
    for x, y in itertools.pairwise(points):
        step = [a - b for a, b in zip(x, y, strict=True)]
        ratios.append(float(2 * mirror_map.bregman(x, y) / dot(step, step)))
    return {"distance_min": min(ratios), "distance_max": max(ratios)}


def check(name: str, options: dict, trained: bool) -> dict:
    """One row."""
    setting = {
        **STUDIES["sinusoid"].setting,
        "threads": 1,
        "map": name,
        "map_options": options,
        "test_tasks": 2,
        "init_lr": 3e-3,
        "map_lr": 3e-3,
    }
    cls = maps.REGISTRY[name]
    on_network = cls.domain == "reals"
    if on_network:
        probe = maps.create(name, [torch.zeros(2, 2)] if cls.owns_tensors else [], **options)
        setting["iterations"] = ITERATIONS if probe.inverse_is_batchable else COUPLED_ITERATIONS
    task = learner = None
    if on_network:
        config = RunConfig.create(**setting)
        if trained:
            with tempfile.TemporaryDirectory() as out:
                train(config, out)
                config, task, learner, _ = load_run(out)
        else:
            task, learner = build(config)
            first = task.sample("train", 0, config.tasks_per_batch)
            learner.calibrate(task.loss_fn, first.support_x, first.support_y)
        mirror_map = learner.mirror_map
    else:
        mirror_map = maps.create(name, [], **options)
    torch.manual_seed(0)
    points = displacements(learner, task, tasks=4)
    exact = copy.deepcopy(mirror_map).double()
    wide = [[x.double() for x in point] for point in points]
    row = {
        "map": name,
        "options": options,
        "trained": trained,
        "iterations": setting["iterations"] if trained else 0,
        "round_trip_float32": round_trip(mirror_map, points),
        **curvature(exact, wide[:1]),
        **distances(exact, wide),
        "mu": exact.strong_convexity().item(),
        "ell": exact.smoothness().item(),
        "revision": revision(),
        **versions("cpu"),
    }
    # JSON has no infinity: no bound is None.
    return {k: None if v == float("inf") else v for k, v in row.items()}


def valid(row: dict) -> bool:
    """Whether a row shows what a valid distance-generating function must."""
    slack = 1e-6
    ell = float("inf") if row["ell"] is None else row["ell"]
    largest = float("inf") if row["eigenvalue_max"] is None else row["eigenvalue_max"]
    return (
        row["round_trip_float32"] < 1e-5
        and row["asymmetry"] < 1e-6
        and row["eigenvalue_min"] > 0
        and row["eigenvalue_min"] >= row["mu"] * (1 - slack)
        and largest <= ell * (1 + slack)
        and row["distance_min"] >= row["mu"] * (1 - slack)
        and row["distance_max"] <= ell * (1 + slack)
    )


def missing() -> list[dict]:
    """Every check that there is no row of yet."""
    rows = read_rows(NAME)
    wanted = [
        {"map": name, "options": options, "trained": trained}
        for name, cls in maps.REGISTRY.items()
        if cls.is_dgf
        for options in cls.variants
        for trained in ((False, True) if cls.owns_tensors else (False,))
    ]
    return [case for case in wanted if not any(matches(row, case) for row in rows)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for case in missing():
        row = check(case["map"], case["options"], case["trained"])
        add_rows(NAME, [row])
        print("valid" if valid(row) else "NOT VALID", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
