"""A whole train step on a GPU, eager, compiled and as a CUDA graph, of several optimizers.

    python bench/train_step_gpu.py               # needs a CUDA device
    python bench/train_step_gpu.py --dry-run     # tiny, on the CPU, without graphs; no rows

Forward, backward and step of a perceptron of three layers: torch's SGD and AdamW, fused, and
MirrorDescent over several maps, side by side in one process. The learning rate is a tensor on the
device. Before a way is timed, its parameters after a few steps with changing rates are held against
those of the eager one. Times are shares of a loop of steps, by the clock of the host.
Rows in $OUT/train_step_gpu.json, or bench/results/train_step_gpu.json.
"""

import argparse
from collections.abc import Callable

from on_gpu import Attempts, Timer, parsed, provenance

# isort: split
import torch
from compiled_step import BATCH, WIDTH
from compiled_step import OPTIMIZERS as ON_CPU
from results import add_rows
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "train_step_gpu"
STEPS, TOLERANCE = 5, 1e-3


def sgd(params, lr: Tensor):
    # Fused: the other ways read a rate that is a tensor back.
    return torch.optim.SGD(params, lr, momentum=0.9, fused=True)


def adamw(params, lr: Tensor):
    return torch.optim.AdamW(params, lr, fused=True, capturable=lr.is_cuda)


OPTIMIZERS = {**ON_CPU, "SGD": sgd, "AdamW": adamw}


class Contender:
    """One optimizer on a model of its own; ``train`` is its step, after a few of them."""

    def __init__(self, make: Callable, way: str, timer: Timer, width: int, device: str):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        self.model = nn.Sequential(*layers, nn.Linear(width, width // 2)).to(device)
        self.lr = torch.tensor(1e-3, device=device)
        self.optimizer = make(self.model.parameters(), self.lr)
        self.x = torch.randn(BATCH, width).to(device)
        self.y = torch.randn(BATCH, width // 2).to(device)
        self.train: Callable = self._train
        if way == "compiled":
            self.train = torch.compile(self._train, backend="inductor" if timer.cuda else "eager")
        done = 0
        if way == "graph":
            self._train()  # creates the state
            self.train = timer.graph(self._train)  # after a step of its own
            done = 2
        for k in range(done, STEPS):
            if k >= 2:  # when there is a graph, to see that it follows
                self.lr.mul_(0.9)
            self.train()

    def _train(self) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def difference(self, other: "Contender") -> float:
        """The largest difference of the parameters over the largest entry."""
        pairs = list(zip(self.model.parameters(), other.model.parameters(), strict=True))
        return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ("eager", "graph", "compiled")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=every)
    options = parsed(parser)
    device = "cpu" if options.dry_run else "cuda:0"
    timer = Timer(device, options.repeats)
    about = {} if options.dry_run else provenance(device)
    if unknown := set(options.ways) - set(every):
        parser.error(f"unknown ways {', '.join(unknown)}: pass some of {', '.join(every)}")
    ways = [way for way in options.ways if timer.cuda or way != "graph"]
    width = 8 if options.dry_run else WIDTH
    attempt = Attempts()
    for name, make in OPTIMIZERS.items():
        eager = Contender(make, "eager", timer, width, device)
        for way in ways:
            with attempt(f"{name}, {way}"):
                contender = Contender(make, way, timer, width, device)
                difference = contender.difference(eager)
                if not difference <= TOLERANCE:
                    raise RuntimeError(f"{name}, {way}: the difference is {difference:.1e}")
                row = {
                    "name": name,
                    "way": way,
                    **timer.host(contender.train, lambda: None),
                    "parameters": sum(p.numel() for p in contender.model.parameters()),
                    "difference": difference,
                }
                took = f"{1e6 * row['seconds']:10.1f} us" if "seconds" in row else "ran"
                print(f"{name:31} {way:8} difference {difference:.0e} {took}", flush=True)
                if not options.dry_run:
                    add_rows(NAME, [row | about])
    attempt.end()


if __name__ == "__main__":
    main()
