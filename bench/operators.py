"""Microbenchmarks of the operators, by pytest-benchmark.

    python -m pytest bench/operators.py -o addopts=
    python -m pytest bench/operators.py -o addopts= -k inverse --benchmark-compare

One thread; each backend of this machine, and gradients through the dispatcher.
"""

import pytest
import torch

from mirror_opt import backends
from mirror_opt.ops import separable_forward, separable_inverse, separable_step
from mirror_opt.reference import Units

AVAILABLE = [row.name for row in backends.status() if row.reason is None]
DEVICES = {"cpp": "cpu", "torch": "cpu"}
SIZES = (10_000, 1_000_000)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=AVAILABLE)
def device(request):
    with backends.use_backend(request.param):
        yield DEVICES.get(request.param, "cuda")


@pytest.fixture(params=SIZES)
def operands(request, device):
    """u, gain and eight units for 100 rows."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    u, gain = (torch.randn(100, request.param // 100, **options) for _ in range(2))
    s, w, c = (torch.rand(8, 100, 1, **options) + shift for shift in (0.5, -0.5, -0.5))
    return u, gain.abs() + 0.5, Units(w / 8 / s, s, c)


def run(benchmark, function, u):
    def call():
        function()
        if u.is_cuda:
            torch.cuda.synchronize()

    benchmark.extra_info["elements"] = u.numel()
    benchmark(call)


def test_forward(benchmark, operands):
    u, gain, units = operands
    run(benchmark, lambda: separable_forward(u, gain, units), u)


def test_inverse(benchmark, operands):
    u, gain, units = operands
    run(benchmark, lambda: separable_inverse(u, gain, units), u)


def test_step(benchmark, operands):
    u, gain, units = operands
    g = torch.ones_like(u)
    run(benchmark, lambda: separable_step(u, g, 0.01, gain, units), u)


def test_backward(benchmark, operands):
    u, gain, units = operands
    inputs = [x.clone().requires_grad_() for x in (u, gain, *units)]
    y = separable_forward(inputs[0], inputs[1], Units(*inputs[2:]))
    run(benchmark, lambda: torch.autograd.grad(y.sum(), inputs, retain_graph=True), u)
