"""What does the kernel of the rotated separable map save in KroneckerNeural on a GPU?

    python bench/kronecker_gpu.py               # needs a CUDA device
    python bench/kronecker_gpu.py --dry-run     # tiny, interpreted on the CPU; checks, no rows

The closed direction of the map over the parameter lists of networks, coefficients at hand, with the
fused operator and with the mode products and the elementwise operator for themselves, side by side
in one process: without gradients, as in a step of an optimizer, and with them, as in meta-learning;
each launched from Python, by the clock of the host, and without gradients as a CUDA graph too, by
events on the device. Both run on the same backend and are held against each other before they are
timed.
Rows in $OUT/kronecker_gpu.json, or bench/results/kronecker_gpu.json.
"""

import argparse
from collections.abc import Callable, Iterator

from on_gpu import Attempts, Timer, parsed, provenance

# isort: split
import torch
from results import add_rows
from steps import MODELS
from torch import Tensor

from mirror_opt import maps, use_backend
from mirror_opt.maps import kronecker

NAME = "kronecker_gpu"
TOLERANCE = 1e-4


def learned(shapes: list[tuple[int, ...]], terms: int, device: str) -> maps.KroneckerNeural:
    """A map off its identity start."""
    torch.manual_seed(0)
    params = [torch.zeros(shape, device=device) for shape in shapes]
    found = maps.KroneckerNeural(params, terms=terms)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.02 * torch.randn_like(p)
    return found


def separate(function: Callable) -> Callable:
    """The function without the fused operator."""

    def run():
        fused_mode = kronecker.fused_mode
        kronecker.fused_mode = lambda sizes: None
        try:
            return function()
        finally:
            kronecker.fused_mode = fused_mode

    return run


def contenders(
    kronecker_map: maps.KroneckerNeural, zs: list[Tensor]
) -> Iterator[tuple[str, Callable, Callable]]:
    """What is timed, fused and separate."""
    coefficients = kronecker_map.coefficients()

    @torch.no_grad()
    def closed():
        return kronecker_map.inverse(zs, coefficients)

    leaves = [z.clone().requires_grad_() for z in zs]

    def gradients():
        loss = sum(x.sum() for x in kronecker_map.inverse(leaves, coefficients))
        # All but the coefficients' own graph, which is the same for both.
        parts = [x for c in coefficients for x in (*c.factors, c.separable.gain)]
        return torch.autograd.grad(loss, [*leaves, *parts], retain_graph=True)

    for name, function in (("map", closed), ("map and gradients", gradients)):
        yield name, function, separate(function)


def check(case: str, fused: Callable, alone: Callable) -> float:
    """The largest difference over the largest entry."""
    worst = 0.0
    for got, wanted in zip(fused(), alone(), strict=True):
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)))
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{case}: the difference is {worst:.1e}, above {TOLERANCE:.0e}")
    return worst


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--terms", type=integers, default=[1, 3], help="R, separated by commas")
    return parsed(parser, ["conv4", "conv4-32", "resnet12"])


def main() -> None:
    options = parse()
    device = "cpu" if options.dry_run else "cuda:0"
    use_backend("triton")
    timer = Timer(device, options.repeats)
    about = {} if options.dry_run else provenance(device)
    attempt = Attempts()
    for case in options.models:
        shapes = MODELS[case]()
        if options.dry_run:  # the kinds of shapes of a network, not their sizes
            shapes = [tuple(min(d, 3) for d in shape) for shape in shapes[:4]]
        for terms in options.terms:
            kronecker_map = learned(shapes, terms, device)
            zs = [torch.randn(shape, device=device) for shape in shapes]
            for name, *both in contenders(kronecker_map, zs):
                with attempt(f"{case} R={terms} {name}"):
                    difference = check(case, *both)
                    for row in timed(name, both, timer):
                        row = {
                            "case": case,
                            "elements": sum(z.numel() for z in zs),
                            "tensors": len(zs),
                            "terms": terms,
                            "what": name,
                            **row,
                            "difference": difference,
                        }
                        print(described(row), flush=True)
                        if not options.dry_run:
                            add_rows(NAME, [row | about])
    attempt.end()


def timed(name: str, both: list[Callable], timer: Timer) -> Iterator[dict]:
    """Who ran, in which way, and how long it took."""
    for contender, run in zip(("fused", "separate"), both, strict=True):
        yield {"contender": contender, "way": "eager", **timer.host(run, lambda: None)}
        if timer.cuda and name == "map":
            replay = timer.graph(run)
            yield {"contender": contender, "way": "graph", **timer.device(replay, lambda: None)}


def described(row: dict) -> str:
    line = f"{row['case']:>9} R={row['terms']} {row['what']:17} {row['contender']:8} {row['way']:5}"
    line += f" difference {row['difference']:.0e}"
    return line + (f" {row['seconds'] * 1e6:12.1f} us" if "seconds" in row else " ran")


if __name__ == "__main__":
    main()
