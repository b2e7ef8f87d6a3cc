"""A whole train step, eager and compiled: MirrorDescent against SGD and AdamW.

    python bench/compiled_step.py

Forward, backward and step of a perceptron of three layers (about a million parameters, batch 64),
one thread, learning rate a tensor that changes every step. Beside it the step alone. All optimizers
in turn, eager and compiled, medians over rounds; ratios are to SGD. Rows in
bench/results/compiled_step.json.
"""

import argparse
from collections.abc import Callable

import torch
from in_turn import in_turn
from results import add_rows
from torch import nn
from torch.nn import functional as F

from mirror_opt import MirrorDescent, maps

WIDTH, BATCH = 640, 64


def mirror(make_map, **options):
    def make(params, lr):
        params = list(params)
        return MirrorDescent(params, lr, make_map(params), momentum=0.9, **options)

    return make


def on_simplex(make):
    def make_there(params, lr):
        params = list(params)
        with torch.no_grad():
            for p in params:
                p.copy_(p.softmax(-1))
        return make(params, lr)

    return make_there


OPTIMIZERS = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr),
    "MirrorDescent, Euclidean": mirror(lambda params: maps.Euclidean()),
    "MirrorDescent, Hypentropy": mirror(lambda params: maps.Hypentropy(0.1)),
    "MirrorDescent, NegativeEntropy": on_simplex(mirror(lambda params: maps.NegativeEntropy())),
    "MirrorDescent, PNorm": mirror(lambda params: maps.PNorm(1.5)),
    "MirrorDescent, Diagonal": mirror(maps.Diagonal),
    "MirrorDescent, SeparableNeural": mirror(maps.SeparableNeural),
    "MirrorDescent, SeparableNeural, fused": mirror(maps.SeparableNeural, fused=True),
    "MirrorDescent, KroneckerNeural": mirror(maps.KroneckerNeural),
}


def network() -> nn.Module:
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH // 2))


def ways(make, compiled: bool) -> dict[str, Callable[[], None]]:
    """A train step and a step alone of an optimizer, on a model of its own."""
    torch.manual_seed(0)
    model = network()
    lr = torch.tensor(1e-3)
    optimizer = make(model.parameters(), lr)
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH // 2)

    def train() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    def scheduled(function: Callable[[], None]) -> Callable[[], None]:
        if compiled:  # apart from the same function of the other optimizers
            function = torch.compile(function, isolate_recompiles=True)

        def run() -> None:
            lr.mul_(0.999)
            function()

        return run

    return {"train": scheduled(train), "step": scheduled(lambda: optimizer.step())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    contenders = {
        (name, what, compiled): run
        for name, make in OPTIMIZERS.items()
        for compiled in (False, True)
        for what, run in ways(make, compiled).items()
    }
    parameters = sum(p.numel() for p in network().parameters())
    rows = []
    for key, row in in_turn(contenders, repeats, lambda key: ("SGD", *key[1:])).items():
        name, what, compiled = key
        kind = {"name": name, "what": what, "compiled": compiled, "parameters": parameters}
        rows.append({**kind, **row})
        print(f"{name:32} {what:6} compiled {compiled!s:6} {1e3 * row['seconds']:8.2f} ms, "
              f"{row['ratio']:.2f} of SGD; first {row['first']:.1f} s")  # fmt: skip
    add_rows("compiled_step", rows)


if __name__ == "__main__":
    main()
