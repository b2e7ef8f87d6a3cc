"""MirrorDescent in CUDA graphs: a captured step is the step, and reads its learning rate."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from mirror_opt import MirrorDescent, maps

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "cuda_graph.py"
MAPS = {
    "euclidean": lambda params: maps.Euclidean(),
    "hypentropy": lambda params: maps.Hypentropy(0.1),
    "separable": maps.SeparableNeural,
    "separable, primal": lambda params: maps.SeparableNeural(params, parametrization="primal"),
    "kronecker": maps.KroneckerNeural,
}

on_a_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def optimizer_on(device: str, name: str, policy: str) -> MirrorDescent:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(device) for s in ((40, 30), (40,))]
    params = [p.requires_grad_() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    lr = torch.tensor(0.1, device=device)
    return MirrorDescent(params, lr, MAPS[name](params), momentum=0.9, nonfinite=policy)


def load(optimizer: MirrorDescent, seed: int, rate: float, bad: bool = False) -> None:
    """New gradients and a new learning rate, in place."""
    generator = torch.Generator().manual_seed(seed)
    group = optimizer.param_groups[0]
    for p in group["params"]:
        p.grad.copy_(torch.randn(p.shape, generator=generator))
    if bad:
        group["params"][0].grad[1, 2] = math.nan
    group["lr"].fill_(rate)


def captured(optimizer: MirrorDescent):
    """A graph of a step, after one on a side stream that makes the state."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def hold_against_steps(device: str, name: str, policy: str, capture) -> None:
    graphed, eager = (optimizer_on(device, name, policy) for _ in range(2))
    for optimizer in (graphed, eager):
        load(optimizer, 0, 0.1)
    replay = capture(graphed)
    eager.step()
    for seed, rate, bad in ((1, 0.05, False), (2, 0.2, policy == "skip"), (3, 0.1, False)):
        before = [p.detach().clone() for p in eager.param_groups[0]["params"]]
        for optimizer in (graphed, eager):
            load(optimizer, seed, rate, bad)
        replay()
        eager.step()
        both = [o.param_groups[0]["params"] for o in (graphed, eager)]
        for p, q, old in zip(*both, before, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert torch.equal(p, old) == bad


@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_device)])
def test_a_captured_step_is_the_step(device, name, policy):
    def repeated(optimizer):  # a CPU has no graphs: what is tried there is the rest of the test
        optimizer.step()
        return optimizer.step

    hold_against_steps(device, name, policy, captured if device == "cuda" else repeated)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_device)])
def test_the_example_runs(device, capsys):
    losses = runpy.run_path(str(EXAMPLE))["main"](steps=20)
    assert losses[-1] < losses[0]
    assert "replays" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_example_says_what_it_needs():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        runpy.run_path(str(EXAMPLE))["main"]()
