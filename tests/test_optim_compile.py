"""torch.compile of a step: one graph, and one compilation over a learning-rate schedule."""

import pytest
import torch
from optim_cases import learned, start
from torch._dynamo.testing import CompileCounterWithBackend

from mirror_opt.optim import MirrorDescent

# torch's compiler imports modules of its own that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CASES = [
    ("euclidean", {"momentum": 0.9, "nesterov": True}),
    ("hypentropy", {"weight_decay": 0.1}),
    ("pnorm", {"momentum": 0.9, "dual_state": True}),
    ("negative-entropy", {"weight_decay": 0.1, "dual_state": True}),
    ("diagonal", {}),
    ("separable", {"momentum": 0.9}),
    ("kronecker", {}),
    ("meta-curvature", {}),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(name, options, steps, compiled_with=None):
    params = start(name, {}, torch.float32)
    lr = torch.tensor(0.1)
    mirror_map = learned(name, params, {})
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


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_one_compilation_serves_a_schedule(name, options, foreach):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = run(name, {**options, "foreach": foreach}, 5, counter)
    eager = run(name, {**options, "foreach": foreach}, 5)
    torch.testing.assert_close(compiled, eager)
    assert counter.frame_count == 1


def test_a_compiled_step_skips_by_default():
    p = torch.ones(2, requires_grad=True)
    optimizer = MirrorDescent([p], lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for bad, expected in ((0.0, 0.9), (float("nan"), 0.9), (0.0, 0.8)):
        p.grad = torch.tensor([1.0, 1.0]) + bad
        step()
        torch.testing.assert_close(p.detach(), torch.full((2,), expected))
