"""torch.compile of a step and of a whole train step: graphs, recompilations, the same results."""

import functools
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from optim_cases import CASES, COMPILER_WARNINGS, IDS, learned, start
from torch._dynamo.testing import CompileCounterWithBackend

from mirror_opt import maps
from mirror_opt.optim import MirrorDescent

pytestmark = COMPILER_WARNINGS

OPTIONS = [
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dual_state": True},
    {"weight_decay": 0.1},
    {"rounding": "stochastic", "foreach": True},
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(name, map_options, options, steps, compiled_with=None):
    params = start(name, {}, torch.float32)
    lr = torch.tensor(0.1)
    mirror_map = learned(name, params, map_options)
    optimizer = MirrorDescent(params, lr=lr, mirror_map=mirror_map, nonfinite="skip", **options)
    step = optimizer.step
    if compiled_with is not None:
        step = torch.compile(step, backend=compiled_with, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
            if k == 2:
                p.grad[0] = torch.nan  # skipped on the device, inside the graph
        step()
        lr.mul_(0.8)  # in place, as torch's schedulers change a tensor
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    ("name", "map_options", "options"),
    [(*case, OPTIONS[i % len(OPTIONS)]) for i, case in enumerate(CASES)],
    ids=IDS,
)
def test_one_graph_serves_a_schedule(name, map_options, options):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = run(name, map_options, options, 5, counter)
    eager = run(name, map_options, options, 5)
    torch.testing.assert_close(compiled, eager)
    assert counter.frame_count == 1


def test_a_schedule_of_numbers_is_compiled_twice():
    # Once for the first rate, and once for all others, as torch does with numbers that change.
    p = torch.ones(3, requires_grad=True)
    optimizer = MirrorDescent([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(5):
        p.grad = torch.ones(3)
        step()
        schedule.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * (2 - 0.5**4)))
    assert counter.frame_count == 2


def test_a_compiled_step_skips_by_default():
    p = torch.ones(2, requires_grad=True)
    optimizer = MirrorDescent([p], lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for bad, expected in ((0.0, 0.9), (float("nan"), 0.9), (0.0, 0.8)):
        p.grad = torch.tensor([1.0, 1.0]) + bad
        step()
        torch.testing.assert_close(p.detach(), torch.full((2,), expected))


def train(make, compiled):
    """Losses of a few whole train steps over a schedule, and the graphs compiled after each."""
    torch._dynamo.reset()
    shapes = ((4, 3), (4,), (3, 4), (3,))
    generator = torch.Generator().manual_seed(0)
    params = [torch.rand(s, generator=generator).softmax(-1).requires_grad_() for s in shapes]
    x = torch.rand(16, 3, generator=generator)
    optimizer = make(params, lr=torch.tensor(0.05))
    a, b, c, d = params

    def train_step(x):
        optimizer.zero_grad()
        loss = (torch.tanh(x @ a.T + b) @ c.T + d - x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(train_step, backend=counter) if compiled else train_step
    losses, graphs = [], []
    for _ in range(5):
        losses.append(step(x).item())
        graphs.append(counter.frame_count)
        optimizer.param_groups[0]["lr"].mul_(0.8)
    return losses, graphs


def over(name, map_options):
    def make(params, **options):
        mirror_map = learned(name, params, map_options)
        return MirrorDescent(params, mirror_map=mirror_map, momentum=0.9, **options)

    return make


@pytest.mark.parametrize(("name", "map_options"), CASES, ids=IDS)
def test_a_whole_train_step_is_two_graphs_for_a_schedule(name, map_options):
    # The model's, forward and backward, and the optimizer's. torch's own optimizers break their
    # step on purpose and take more; no optimizer can be in one graph with backward, since torch
    # does not trace a step over gradients that are written in the same graph.
    make = over(name, map_options)
    compiled, graphs = train(make, True)
    torch.testing.assert_close(compiled, train(make, False)[0])
    assert graphs == [2] * 5


def test_torch_compiles_its_own_optimizers_to_more():
    ours = train(over("euclidean", {}), True)[1]
    for theirs in (functools.partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW):
        assert train(theirs, True)[1][-1] > ours[-1]


def test_the_example_runs(capsys):
    folder = Path(__file__).parent.parent / "docs" / "examples"
    main = runpy.run_path(str(folder / "compiled_training.py"))["main"]
    losses = main(steps=6, backend="aot_eager")
    assert losses[-1] < losses[0]
    assert "2 graphs" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend_gives_the_same():
    found = []
    for compiled in (False, True):
        params = [start("kronecker", {}, torch.float32, seed) for seed in range(3)]
        groups = [
            {"params": params[0], "mirror_map": learned("kronecker", params[0], {})},
            {"params": params[1], "mirror_map": maps.Hypentropy(0.1)},
            {"params": params[2], "mirror_map": learned("separable", params[2], {})},
        ]
        optimizer = MirrorDescent(groups, lr=torch.tensor(0.1), momentum=0.9, nonfinite="skip")
        every = [p for group in params for p in group]
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        generator = torch.Generator().manual_seed(0)
        for k in range(3):
            for p in every:
                p.grad = torch.randn(p.shape, generator=generator)
            if k == 1:
                every[0].grad[0] = torch.nan
            step()
        found.append([p.detach() for p in every])
    torch.testing.assert_close(*found)


def test_a_rate_of_less_precision_costs_float64_parameters_none():
    found = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float32)):
        p = torch.full((3,), 0.4, dtype=torch.float64, requires_grad=True)
        rate = torch.tensor(0.1).double() if isinstance(lr, float) else lr
        optimizer = MirrorDescent([p], lr=rate, weight_decay=0.01)
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(20):
            p.grad = torch.full_like(p, 0.1)
            step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)


def test_weights_that_change_between_compiled_steps_are_taken_where_the_dual_state_is_gone():
    for mirror_map in (maps.SeparableNeural, maps.KroneckerNeural):
        p = torch.ones(4, requires_grad=True)
        optimizer = MirrorDescent([p], torch.tensor(0.01), mirror_map([p]))
        step = torch.compile(optimizer.step, backend="aot_eager")
        for k in range(4):
            p.grad = torch.ones(4)
            if k == 2:
                with torch.no_grad():
                    p[2:] = 0.0
                del optimizer.state[p]["dual"]
            step()
        torch.testing.assert_close(p.detach(), torch.tensor([0.96, 0.96, -0.02, -0.02]))
