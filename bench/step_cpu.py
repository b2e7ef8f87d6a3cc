"""How fast is the fused step on a CPU, beside plain PyTorch, its compiler, and its own optimizers?

    python bench/step_cpu.py
    python bench/step_cpu.py --sizes 1e4 --units 8 --models conv4-32 --rounds 3 --dry-run

One tensor of n elements and the parameter lists of networks, in one process and in turn, round by
round, each from the same parameters; medians. The step is the stateless one: the closed formula,
then Newton's method.

    cpp               the operator on the C++ library
    MirrorDescent     optim.MirrorDescent on the same library, with its look at what could fail
    torch             the operator in plain PyTorch, whose solve stops when it has converged
    formula           the step with two fixed Newton steps, as one writes it in PyTorch
    torch.compile     the same formula, compiled
    SGD, AdamW        torch's own, foreach and fused

Before it is timed, each of the first five is held against float64. Plain PyTorch runs few rounds,
and none on the largest problem: it takes long.
Rows in bench/results/step_cpu.json.
"""

import argparse
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from results import add_rows, revision
from steps import LR, MODELS, Problem, compiled, formula, make_problem, optimizer_step, residual

from mirror_opt import MirrorDescent, backends, maps
from mirror_opt.ops import separable_step_
from mirror_opt.runs.results import versions

NAME = "step_cpu"
SIZES = ["1e4", "1e5", "1e6", "4e6", "1e7"]
LISTS = ["conv4-32", "resnet12", "gpt2-small"]
SLOW = {"torch": 3, "formula": 5}  # rounds, and none of them of more elements than
EAGER_LIMIT = 5 * 10**7
# Seconds: what is faster runs several times in a round. Less than a slice of the scheduler, so that
# on a shared core most samples are of the step alone.
SAMPLE = 1e-3


@torch.no_grad()
def operator(problem: Problem, backend: str) -> None:
    with backends.use_backend(backend):
        status = separable_step_(problem.params, problem.grads, LR, [], problem.units, primal=True)
    if int(status):
        raise RuntimeError(f"{problem.case}: the solve ended with status {int(status)}")


def mirror_descent(problem: Problem, units: int) -> Callable[[], Any]:
    """The optimizer, with a map that has the coefficients of the problem."""
    params = [torch.nn.Parameter(p) for p in problem.params]  # shares memory
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = grad
    share = "tensor" if len(params) == 1 else "channel"
    mirror_map = maps.SeparableNeural(params, units=units, parametrization="primal", share=share)
    with torch.no_grad():
        for indices, psi in zip(mirror_map.indices, mirror_map.groups, strict=True):
            alike = zip(*(problem.units[i] for i in indices), strict=True)
            w, s, c = (torch.stack(xs, 1) for xs in alike)
            psi.log_s.copy_(s.log().view_as(psi.log_s))
            psi.c.copy_(c.view_as(psi.c))
            psi.p.copy_((w * s * units / psi.rho).atanh().view_as(psi.p))
    return MirrorDescent(params, LR, mirror_map, anchor="zero", dual_state=False, fused=True).step


def contenders(problem: Problem, units: int) -> dict[str, Callable[[], Any]]:
    lists = problem.params, problem.grads, problem.units
    steps = {
        "cpp": partial(operator, problem, "cpp"),
        "MirrorDescent": mirror_descent(problem, units),
    }
    if problem.elements <= EAGER_LIMIT:
        steps["torch"] = partial(operator, problem, "torch")
        steps["formula"] = partial(formula, *lists)
    steps["torch.compile"] = compiled(problem)
    for kind, how in itertools.product((torch.optim.SGD, torch.optim.AdamW), ("foreach", "fused")):
        steps[f"{kind.__name__}, {how}"] = optimizer_step(problem, kind, **{how: True})
    return steps


def measure(problem: Problem, units: int, rounds: int) -> Iterator[dict[str, Any]]:
    steps = contenders(problem, units)
    kept = [p.clone() for p in problem.params]
    restore = partial(torch._foreach_copy_, problem.params, kept)
    residuals, calls = {}, {}
    for name, step in steps.items():
        if "SGD" not in name and "AdamW" not in name:
            residuals[name] = residual(problem, step, gain=False)  # warms up, and compiles
        step()
        start = time.perf_counter()
        step()
        calls[name] = max(1, math.ceil(SAMPLE / (time.perf_counter() - start)))
        restore()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i, (name, step) in itertools.product(range(rounds), steps.items()):
        if i >= SLOW.get(name, rounds):
            continue
        restore()
        start = time.perf_counter()
        for _ in range(calls[name]):
            step()
        seconds[name].append((time.perf_counter() - start) / calls[name])
    for name, taken in seconds.items():
        cuts = statistics.quantiles(taken, n=5)
        row = {"case": problem.case, "elements": problem.elements, "tensors": len(problem.params),
               "units": units, "contender": name, "seconds": statistics.median(taken),
               "p20": cuts[0], "p80": cuts[3], "repeats": len(taken)}  # fmt: skip
        yield row | ({"residual": residuals[name]} if name in residuals else {})


def processor() -> str:
    """Its name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def problems(options: argparse.Namespace) -> Iterator[tuple[Problem, int]]:
    for units in options.units:
        for size in options.sizes:
            shape = (int(float(size)),)
            yield make_problem(f"n={size}", [shape], False, units, "cpu"), units
        for model in options.models:
            yield make_problem(model, MODELS[model](), True, units, "cpu"), units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: [x for x in text.split(",") if x]  # noqa: E731
    parser.add_argument("--sizes", type=names, default=SIZES, help="n, separated by commas")
    parser.add_argument("--units", type=names, default=["4", "8", "16"], help="K")
    parser.add_argument("--models", type=names, default=LISTS, help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry-run", action="store_true", help="writes no rows")
    options = parser.parse_args()
    options.units = [int(x) for x in options.units]
    torch.set_num_threads(options.threads)
    with backends.use_backend("cpp"):  # or why it cannot be used
        library = backends.BACKENDS["cpp"].describe()
    about = {"threads": options.threads, "processor": processor(), "library": library,
             "revision": revision(), **versions("cpu")}  # fmt: skip
    for problem, units in problems(options):
        rows = []
        for row in measure(problem, units, options.rounds):
            rows.append(row | about)
            miss = f"   residual {row['residual']:.1e}" if "residual" in row else ""
            print(f"{row['case']:>10} K={units:<2} {row['contender']:15} "
                  f"{row['seconds'] * 1e6:12.1f} us{miss}", flush=True)  # fmt: skip
        if not options.dry_run:
            add_rows(NAME, rows)
        del problem, row, rows


if __name__ == "__main__":
    main()
