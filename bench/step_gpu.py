"""How close does the fused step come to the limits of a GPU, and to torch's own optimizers?

    python bench/step_gpu.py               # needs a CUDA device
    python bench/step_gpu.py --dry-run     # tiny, interpreted on the CPU; checks, writes no rows

One tensor of n elements and the parameter lists of networks, side by side in one process: the
steps in Triton and, where it is built, in CUDA C++ (without a gain, and with one for each element),
the same formula with two fixed Newton steps in eager PyTorch and under torch.compile, and torch's
SGD and AdamW, foreach and fused; each launched from Python, and as a CUDA graph where that can be
captured. Times are of one step with a cold cache, from events on the device. Before it is timed,
each step of ours is held against float64.

A row has three ceilings: memory at the bandwidth of a copy measured here, special functions at 16
and fp32 operations at 128 per multiprocessor and cycle. The Triton step evaluates psi and psi'
twice, the one in CUDA C++ three derivatives once.
Rows in $OUT/step_gpu.json, or bench/results/step_gpu.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

# Before anything imports Triton.
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from results import add_rows
from steps import LR, MODELS, Problem, compiled, formula, make_problem, optimizer_step, residual
from torch import Tensor

from mirror_opt.backends import cuda
from mirror_opt.kernels import multi_tensor
from mirror_opt.runs.results import versions

NAME = "step_gpu"
# Larger problems than this have no room for the temporaries of the eager formula.
EAGER_LIMIT = 10**7
# Compiling takes longer than all else together: lists are compiled for this K only.
COMPILED_UNITS = 8


def our_step(problem: Problem, backend: str, gain: bool) -> Tensor:
    """By the backend itself; the operator's own cost is that of any operator of torch.library."""
    params, grads = problem.params, problem.grads
    units = tuple(zip(*problem.units, strict=True))
    if backend == "triton":
        gains = problem.gains if gain else None
        return multi_tensor.step_(params, grads, LR, gains, *units, primal=True)
    status = torch.zeros((), dtype=torch.int32, device=params[0].device)
    gains = problem.gains if gain else []
    cuda.step_(
        params, grads, torch.tensor(LR), gains, *units, [], [], [], [], None, None, status, 0.0,
        0.0, False, False, True, "algebraic",
    )  # fmt: skip
    return status


def check(problem: Problem, backend: str, gain: bool) -> float:
    def step() -> None:
        status = int(our_step(problem, backend, gain))
        if status:
            raise RuntimeError(f"{problem.case}: the solve ended with status {status}")

    return residual(problem, step, gain)


def ours() -> list[str]:
    """The backends of this machine; the interpreter has Triton only."""
    return ["triton"] if cuda.unavailable() else ["triton", "cuda"]


def contenders(
    problem: Problem, units: int, options: argparse.Namespace
) -> Iterator[tuple[str, Callable, bool]]:
    """Name, step, and whether a CUDA graph of it is timed too."""
    for backend in ours():
        yield backend, partial(our_step, problem, backend, False), True
        yield f"{backend}, gain", partial(our_step, problem, backend, True), True
    if problem.elements <= EAGER_LIMIT:
        yield "torch", partial(formula, problem.params, problem.grads, problem.units), False
    if options.compile and (len(problem.params) == 1 or units == COMPILED_UNITS):
        yield "torch.compile", compiled(problem), True
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for how in ("foreach", "fused"):
            capturable = {"capturable": True} if kind is torch.optim.AdamW else {}
            if options.dry_run:
                capturable = {}
            step = optimizer_step(problem, kind, **{how: True}, **capturable)
            yield f"{kind.__name__}, {how}", step, how == "fused"


class Timer:
    """Seconds of single steps: by events on the device, with the cache flushed before each."""

    def __init__(self, device: str, repeats: int):
        self.cuda, self.repeats = device != "cpu", repeats
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def __call__(self, step: Callable[[], Any], restore: Callable[[], Any]) -> list[float]:
        for _ in range(3):  # compiles, makes tables and states
            step()
        restore()
        if not self.cuda:
            start = time.perf_counter()
            step()
            return [time.perf_counter() - start] * 2
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(self.repeats)]
        for start, end in marks:
            restore()
            self.flush.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def graph(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of the step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


class Ceilings:
    """Seconds below which a step cannot come."""

    def __init__(self, device: str, timer: Timer):
        properties = torch.cuda.get_device_properties(device)
        source, target = torch.randn(2, 2**28, device=device)
        seconds = statistics.median(timer(lambda: target.copy_(source), lambda: None))
        self.bandwidth = 8 * 2**28 / seconds
        # The clock under load: that much work is still queued when nvidia-smi looks.
        for _ in range(round(2 / seconds)):
            target.copy_(source)
        self.clock = float(nvidia_smi("clocks.sm")) * 1e6
        torch.cuda.synchronize()
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


def nvidia_smi(field: str) -> str:
    """What nvidia-smi says of the first device."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def provenance(device: str) -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    git = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return {
        # A copy of the tree without its history says so.
        "revision": git or "unknown",
        "driver": nvidia_smi("driver_version"),
        "triton": triton.__version__,
        **versions(device),
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


def parsed(parser: argparse.ArgumentParser, models: Sequence[str] = ()) -> argparse.Namespace:
    """The options, with those that the benchmarks on a GPU share; ``--models`` where there are."""
    names = lambda text: [x for x in text.split(",") if x]  # noqa: E731
    if models:
        parser.add_argument("--models", type=names, default=models, help=", ".join(MODELS))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, no rows")
    options = parser.parse_args()
    unknown = set(options.models if models else ()) - set(MODELS)
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}: pass some of {', '.join(MODELS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device: pass --dry-run to try the script without one")
    return options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(float(x)) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--sizes", type=integers, help="n, separated by commas")
    parser.add_argument("--units", type=integers, help="K, separated by commas")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parsed(parser, list(MODELS))
    options.sizes = options.sizes or ([300] if options.dry_run else [10**k for k in range(4, 9)])
    options.units = options.units or ([2] if options.dry_run else [4, 8, 16])
    options.compile &= not options.dry_run
    return options


def main() -> None:
    options = parse()
    device = "cpu" if options.dry_run else "cuda:0"
    timer = Timer(device, options.repeats)
    about = {} if options.dry_run else provenance(device)
    ceilings = None if options.dry_run else Ceilings(device, timer)
    for problem, units in problems(options, device):
        errors = {
            backend + ", gain" * gain: check(problem, backend, gain)
            for backend in ours()
            for gain in (False, True)
        }
        kept = [p.clone() for p in problem.params]
        restore = partial(torch._foreach_copy_, problem.params, kept)
        rows = []
        for name, step, graphed in contenders(problem, units, options):
            ways = {"eager": step}
            if graphed and timer.cuda:
                ways["graph"] = timer.graph(step)
            for way, run in ways.items():
                seconds = timer(run, restore)
                cuts = statistics.quantiles(seconds, n=5)
                row = {
                    "case": problem.case,
                    "elements": problem.elements,
                    "tensors": len(problem.params),
                    "units": units,
                    "contender": name,
                    "way": way,
                    "seconds": statistics.median(seconds),
                    "p20": cuts[0],
                    "p80": cuts[3],
                    "repeats": len(seconds),
                }
                if name in errors:
                    row["residual"] = errors[name]
                    if ceilings:
                        row |= ceilings.row(problem.elements, units, name)
                rows.append(row | about)
                print(described(row, options.dry_run), flush=True)
        if not options.dry_run:
            add_rows(NAME, rows)
        del problem, kept, restore, rows


def described(row: dict[str, Any], dry_run: bool) -> str:
    line = f"{row['case']:>12} K={row['units']:<2} {row['contender']:15} {row['way']:5}"
    if "residual" in row:
        line += f" residual {row['residual']:.0e}"
    if dry_run:  # the time of an interpreter says nothing
        return line + " ran"
    line += f" {row['seconds'] * 1e6:12.1f} us"
    ceilings = [seconds for name, seconds in row.items() if name.startswith("ceiling_")]
    if ceilings:
        line += f", {max(ceilings) / row['seconds']:.0%} of the slowest ceiling"
    return line


if __name__ == "__main__":
    main()
