"""What the tests of the operators share: implementations, operands, closeness to float64."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import cuda_on_host
import pytest
import torch
from torch import Tensor

from mirror_opt import backends, reference
from mirror_opt.backends import cpp, plain
from mirror_opt.reference import Units


def _implementations() -> list[str]:
    """Plain PyTorch, and the CPU library once for each instruction set of this machine."""
    if cpp.unavailable():
        return ["torch"]
    select = torch.ops.mirror_opt_cpu.instruction_set
    best = select("")
    names = [f"cpp-{name}" for name in ("portable", "avx2", "avx512") if select(name) == name]
    select(best)
    return ["torch", *names]


IMPLEMENTATIONS = _implementations()
DTYPES = (torch.float32, torch.float64)

# Those of the multi-tensor step; test_triton_step has the Triton kernel on the interpreter.
STEP_IMPLEMENTATIONS = [
    *IMPLEMENTATIONS,
    "cuda-host",
    *(
        pytest.param(
            f"{name}-gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        )
        for name in ("cuda", "triton")
    ),
]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    backend, _, place = name.partition("-")
    if place == "gpu" and (reason := backends.BACKENDS[backend].unavailable()):
        pytest.skip(reason)
    instruction_set = place if backend == "cpp" else ""
    if instruction_set:
        best = torch.ops.mirror_opt_cpu.instruction_set("")
        torch.ops.mirror_opt_cpu.instruction_set(instruction_set)
    with (
        cuda_on_host.installed() if place == "host" else nullcontext(),
        torch.device("cuda" if place == "gpu" else "cpu"),
        backends.use_backend(backend),
    ):
        yield
    if instruction_set:
        torch.ops.mirror_opt_cpu.instruction_set(best)


@pytest.fixture(params=IMPLEMENTATIONS)
def each_implementation(request):
    with implementation(request.param):
        yield request.param


@pytest.fixture(params=STEP_IMPLEMENTATIONS)
def each_step_implementation(request):
    """Tensors are made on its device, unless they say otherwise."""
    with implementation(request.param):
        yield request.param


def random_units(count: int, *shape: int, seed: int = 0) -> Units:
    """float64 ``(count, *shape)``, w of either sign and slopes within 1 -+ 0.9."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal() -> Tensor:
        x = torch.randn(count, *shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(torch.get_default_device())

    s = normal().exp()
    w = 0.9 * torch.tanh(normal()) / max(count, 1) / s
    return Units(w, s, normal())


def operands(u, gain, units, count=3, seed=0) -> list[Tensor]:
    """u, gain, w, s, c of these shapes, float64."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        2 * torch.randn(u, generator=generator, dtype=torch.float64),
        torch.rand(gain, generator=generator, dtype=torch.float64) + 0.5,
        *random_units(count, *units, seed=seed),
    ]


def reference_value(u, gain, w, s, c) -> Tensor:
    dims = max(u.dim(), gain.dim(), w.dim() - 1)
    units = (x.reshape(len(x), *[1] * (dims - x.dim() + 1), *x.shape[1:]) for x in (w, s, c))
    units = Units(*units)
    u = u.expand(torch.broadcast_shapes(u.shape, gain.shape, w.shape[1:]))
    return gain * reference.psi(u, units)


def assert_close(result: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """Within 2e-6 (float32) or 1e-13 (float64) of the value and its scale."""
    assert result.shape == expected.shape
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[result.dtype]
    error = (result.double() - expected).abs()
    allowed = tolerance * (expected.abs() + scale)
    assert bool((error <= allowed).all()), float((error / allowed).max())


def conditioning(y: Tensor, gain: Tensor, *units: Tensor) -> Tensor:
    """By how much rounding in psi(y), relative to |psi(y)| + W, moves its solution y."""
    aligned = [x.reshape(len(x), *[1] * (y.dim() - x.dim() + 1), *x.shape[1:]) for x in units]
    units = Units(*aligned)
    span = reference.psi_bracket(units) if len(units.w) else 0.0
    return (reference.psi(y, units).abs() + span) / reference.psi_slope(y, units)


def formula(*args) -> tuple[Tensor, ...]:
    """Gradients by the formulas in plain PyTorch."""
    return plain.backward(*args[:6], "algebraic", args[6])
