"""A whole train step, eager and compiled: MirrorDescent against SGD and AdamW.

    python bench/compiled_step.py

Forward, backward and step of a perceptron of three layers (about a million parameters, batch 64),
one thread, learning rate a tensor that changes every step; the optimizers in turn, medians over
rounds. Beside it the step alone. Rows in bench/results/compiled_step.json.
"""

import argparse
import statistics
import time

import torch
from results import add_rows, revision
from torch import nn
from torch.nn import functional as F

from mirror_opt import MirrorDescent, maps
from mirror_opt.runs.results import versions

WIDTH, BATCH = 640, 64


def mirror(make_map):
    def make(params, lr):
        params = list(params)
        return MirrorDescent(params, lr, make_map(params), momentum=0.9)

    return make


OPTIMIZERS = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr),
    "MirrorDescent, Euclidean": mirror(lambda params: maps.Euclidean()),
    "MirrorDescent, Hypentropy": mirror(lambda params: maps.Hypentropy(0.1)),
    "MirrorDescent, PNorm": mirror(lambda params: maps.PNorm(1.5)),
    "MirrorDescent, Diagonal": mirror(maps.Diagonal),
    "MirrorDescent, SeparableNeural": mirror(maps.SeparableNeural),
    "MirrorDescent, KroneckerNeural": mirror(maps.KroneckerNeural),
}


class Contender:
    """One optimizer on a model of its own, eager or compiled."""

    def __init__(self, make, compiled: bool):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
        self.model = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH // 2))
        self.lr = torch.tensor(1e-3)
        self.optimizer = make(self.model.parameters(), self.lr)
        self.x, self.y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH // 2)
        self.train = torch.compile(self._train) if compiled else self._train
        self.step = torch.compile(self._step) if compiled else self._step
        for _ in range(3):
            self.timed(self.train)
            self.timed(self.step)

    def _train(self) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def _step(self) -> None:
        self.optimizer.step()

    def timed(self, function) -> float:
        self.lr.mul_(0.999)
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = []
    for name, make in OPTIMIZERS.items():
        for compiled in (False, True):
            contender = Contender(make, compiled)
            for what in ("train", "step"):
                taken = [contender.timed(getattr(contender, what)) for _ in range(repeats)]
                cuts = statistics.quantiles(taken, n=5)
                row = {
                    "name": name,
                    "what": what,
                    "compiled": compiled,
                    "seconds": statistics.median(taken),
                    "p20": cuts[0],
                    "p80": cuts[3],
                    "parameters": sum(p.numel() for p in contender.model.parameters()),
                    "repeats": repeats,
                    "threads": 1,
                    "revision": revision(),
                    **versions("cpu"),
                }
                rows.append(row)
                print(f"{name:32} {what:6} compiled {compiled!s:6} {1e3 * row['seconds']:8.2f} ms")
    add_rows("compiled_step", rows)


if __name__ == "__main__":
    main()
