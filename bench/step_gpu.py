"""How close does the fused step come to the limits of a GPU, and to torch's own optimizers?

    python bench/step_gpu.py               # needs a CUDA device
    python bench/step_gpu.py --dry-run     # tiny, interpreted on the CPU; checks, writes no rows

One tensor of n elements and the parameter lists of networks, side by side in one process: the
steps in Triton and, where it is built, in CUDA C++ (without a gain, and with one for each element),
the same formula with two fixed Newton steps in eager PyTorch and under torch.compile, and torch's
SGD and AdamW, foreach and fused; each launched from Python, and as a CUDA graph where that can be
captured. A graph's time is the device's for one step with a cold cache, by events; a step that is
launched from Python has its share of a loop of steps, by the clock of the host. Before it is timed,
each step of ours is held against float64.

A row has three ceilings: memory at the bandwidth of a copy measured here, special functions at 16
and fp32 operations at 128 per multiprocessor and cycle. The Triton step evaluates psi and psi'
twice, the one in CUDA C++ three derivatives once.
Rows in $OUT/step_gpu.json, or bench/results/step_gpu.json.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from on_gpu import Attempts, Timer, clock_under, parsed, provenance

# isort: split
import torch
from results import add_rows
from steps import LR, MODELS, Problem, compiled, formula, make_problem, optimizer_step, residual
from torch import Tensor

from mirror_opt.backends import BACKENDS, cuda
from mirror_opt.backends.step import Step

NAME = "step_gpu"
# Larger problems than this have no room for the temporaries of the eager formula.
EAGER_LIMIT = 10**7
# Compiling takes longer than all else together: it is for this K only.
COMPILED_UNITS = 8


def our_step(problem: Problem, backend: str, gain: bool) -> Tensor:
    """By the backend itself; the operator's own cost is that of any operator of torch.library."""
    params, gains = problem.params, problem.gains if gain else []
    status = torch.zeros((), dtype=torch.int32, device=params[0].device)
    BACKENDS[backend].step_(Step(
        params, problem.grads, torch.tensor(LR), gains, *zip(*problem.units, strict=True), [], [],
        [], [], None, None, status, 0.0, 0.0, False, False, True, "algebraic",
    ))  # fmt: skip
    return status


def ours() -> list[str]:
    """The backends of this machine; the interpreter has Triton only."""
    return ["triton"] if cuda.unavailable() else ["triton", "cuda"]


def contenders(
    problem: Problem, units: int, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], tuple[Callable, float | None]]]]:
    """Names, and what makes the step; of ours it finds the residual too."""
    params, grads = problem.params, problem.grads
    if options.contenders in ("all", "compiled") and units == COMPILED_UNITS:
        yield "torch.compile", lambda: (compiled(problem), None)
    if options.contenders == "compiled":
        return
    for backend in ours():
        for gain in (False, True):
            step = partial(our_step, problem, backend, gain)
            yield backend + ", gain" * gain, partial(checked, problem, step, gain)
    if problem.elements <= EAGER_LIMIT:
        yield "torch", lambda: (partial(formula, params, grads, problem.units), None)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for how in ("foreach", "fused"):
            capturable = kind is torch.optim.AdamW and not options.dry_run
            given = {how: True} | ({"capturable": True} if capturable else {})
            step = optimizer_step(problem, kind, **given)
            yield f"{kind.__name__}, {how}", lambda step=step: (step, None)


def checked(
    problem: Problem, step: Callable[[], Tensor], gain: bool
) -> tuple[Callable[[], Tensor], float]:
    """The step, and its residual, which is as small as it has to be."""

    def once() -> None:
        status = int(step())
        if status:
            raise RuntimeError(f"{problem.case}: the solve ended with status {status}")

    return step, residual(problem, once, gain)


class Ceilings:
    """Seconds below which a step cannot come."""

    def __init__(self, device: str, timer: Timer):
        properties = torch.cuda.get_device_properties(device)
        source, target = torch.randn(2, 2**28, device=device)
        copy = partial(target.copy_, source)
        self.bandwidth = 8 * 2**28 / timer.device(copy, lambda: None)["seconds"]
        self.clock = clock_under(copy)
        self.cycles = properties.multi_processor_count * self.clock

    def row(self, elements: int, units: int, contender: str) -> dict[str, float]:
        # At each point a reciprocal square root and so many operations a unit, and a division for
        # each step from one point to the next.
        points, operations = (2, 14 * units + 3) if "triton" in contender else (1, 12 * units + 25)
        return {
            "ceiling_memory": (16 if "gain" in contender else 12) * elements / self.bandwidth,
            "ceiling_special": (points * units + points) * elements / (16 * self.cycles),
            "ceiling_fp32": operations * elements / (128 * self.cycles),
            "copy_bytes_per_second": self.bandwidth,
            "clock": self.clock,
        }


def problems(options: argparse.Namespace, device: str) -> Iterator[tuple[Problem, int]]:
    for units in options.units:
        for n in options.sizes:
            yield make_problem(f"n={n}", [(n,)], False, units, device), units
        for model in options.models:
            shapes = MODELS[model]()
            if options.dry_run:  # the kinds of shapes of a network, not their sizes
                shapes = [tuple(min(d, 3) for d in shape) for shape in shapes[:12]]
            yield make_problem(model, shapes, True, units, device), units


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(float(x)) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--sizes", type=integers, help="n, separated by commas")
    parser.add_argument("--units", type=integers, help="K, separated by commas")
    parser.add_argument(
        "--contenders", choices=("all", "compiled", "uncompiled"), default="all",
        help=f"whether torch.compile is among them (for K={COMPILED_UNITS}; it takes minutes)",
    )  # fmt: skip
    options = parsed(parser, list(MODELS))
    options.sizes = options.sizes or ([300] if options.dry_run else [10**k for k in range(4, 9)])
    options.units = options.units or ([2] if options.dry_run else [8, 4, 16])
    return options


def main() -> None:
    options = parse()
    device = "cpu" if options.dry_run else "cuda:0"
    timer = Timer(device, options.repeats)
    about = {} if options.dry_run else provenance(device)
    ceilings = None if options.dry_run else Ceilings(device, timer)
    attempt = Attempts()
    for problem, units in problems(options, device):
        kept = [p.clone() for p in problem.params]
        restore = partial(torch._foreach_copy_, problem.params, kept)
        for name, make in contenders(problem, units, options):
            with attempt(f"{problem.case} K={units} {name}"):
                step, error = make()
                ways = [("eager", timer.host, step)]
                if timer.cuda:
                    ways.append(("graph", timer.device, timer.graph(step)))
                for way, time, run in ways:
                    row = {
                        "case": problem.case,
                        "elements": problem.elements,
                        "tensors": len(problem.params),
                        "units": units,
                        "contender": name,
                        "way": way,
                        **time(run, restore),
                    }
                    if error is not None:
                        row["residual"] = error
                        if way == "graph":
                            row |= ceilings.row(problem.elements, units, name)
                    print(described(row), flush=True)
                    if not options.dry_run:
                        add_rows(NAME, [row | about])
            restore()
        del problem, kept, restore
    attempt.end()


def described(row: dict[str, Any]) -> str:
    line = f"{row['case']:>12} K={row['units']:<2} {row['contender']:15} {row['way']:5}"
    if "residual" in row:
        line += f" residual {row['residual']:.0e}"
    if "seconds" not in row:
        return line + " ran"
    line += f" {row['seconds'] * 1e6:12.1f} us"
    ceilings = [seconds for name, seconds in row.items() if name.startswith("ceiling_")]
    if ceilings:
        line += f", {max(ceilings) / row['seconds']:.0%} of the slowest ceiling"
    return line


if __name__ == "__main__":
    main()
