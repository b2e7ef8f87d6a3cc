"""What the meta-learner's loop costs over a hand-written torch.func loop, and its peers.

    python bench/meta_overhead.py

MAML's meta-gradient, Conv4 with 64 filters, 5-way 1-shot with 15 queries, 4 tasks, 5 inner steps,
second order, one thread, all in one process and in turn, medians. Peers (higher, torchopt) take
part where they are installed. Rows in bench/results/meta_overhead.json.
"""

import argparse
from functools import partial

import torch
from in_turn import in_turn
from results import add_rows
from torch.nn import functional as F

from mirror_opt.fewshot import Conv4
from mirror_opt.meta import MetaLearner

TASKS, STEPS, LR = 4, 5, 0.01


def by_hand(model, batch):
    """MAML with nothing of the package in it."""
    names, init = zip(*model.named_parameters(), strict=True)

    def loss(params, x, y):
        named = dict(zip(names, params, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        params = init
        for _ in range(STEPS):
            grads = torch.func.grad(loss)(params, sx, sy)
            params = tuple(p - LR * g for p, g in zip(params, grads, strict=True))
        losses.append(loss(params, qx, qy))
    torch.stack(losses).mean().backward()


def with_higher(model, batch):
    import higher

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for sx, sy, qx, qy in zip(*batch, strict=True):
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (inner, opt):
            for _ in range(STEPS):
                opt.step(F.cross_entropy(inner(sx), sy))
            (F.cross_entropy(inner(qx), qy) / TASKS).backward()


def with_torchopt(model, batch):
    import torchopt

    optimizer = torchopt.MetaSGD(model, lr=LR)
    start = [torchopt.extract_state_dict(x, by="reference") for x in (model, optimizer)]
    for sx, sy, qx, qy in zip(*batch, strict=True):
        for _ in range(STEPS):
            optimizer.step(F.cross_entropy(model(sx), sy))
        (F.cross_entropy(model(qx), qy) / TASKS).backward()
        for target, state in zip((model, optimizer), start, strict=True):
            torchopt.recover_state_dict(target, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 5, filters=64)
    learner = MetaLearner(model, lr=LR, steps=STEPS, engine="loop")
    labels = torch.arange(5)
    batch = (
        torch.randn(TASKS, 5, 1, 28, 28),
        labels.expand(TASKS, 5),
        torch.randn(TASKS, 75, 1, 28, 28),
        labels.repeat_interleave(15).expand(TASKS, 75),
    )
    contenders = {
        "torch.func by hand": lambda: by_hand(model, batch),
        "mirror_opt": lambda: learner.meta_loss(F.cross_entropy, *batch).backward(),
    }
    for name, function in (("higher", with_higher), ("torchopt", with_torchopt)):
        try:
            __import__(name)
        except ImportError:
            print(f"{name} is not installed: left out")
            continue
        contenders[name] = lambda function=function: function(model, batch)

    def fresh(run):
        model.zero_grad()
        run()

    ways = {name: partial(fresh, run) for name, run in contenders.items()}
    rows = in_turn(ways, repeats, base=lambda name: "torch.func by hand")
    for name, row in rows.items():
        print(f"{name:20} {row['seconds']:.3f} s   {row['ratio']:.3f} times by hand")
    add_rows("meta_overhead", [{"name": name, **row} for name, row in rows.items()])


if __name__ == "__main__":
    main()
