"""The problems and the peers of the benchmarks of the step, step_cpu.py and step_gpu.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_opt import reference
from mirror_opt.fewshot import Conv4
from mirror_opt.reference import Units

LR = 1e-2
NEWTON_STEPS = 2
TOLERANCE = 2e-6
# Compiling a list as a whole takes minutes: one of more tensors than this is compiled a tensor at a
# time, once for each shape.
COMPILED_TENSORS = 64

Shapes = list[tuple[int, ...]]


def conv4(filters: int) -> Shapes:
    return [tuple(p.shape) for p in Conv4((1, 28, 28), 5, filters=filters).parameters()]


def resnet12() -> Shapes:
    shapes: Shapes = []
    inputs = 3
    for width in (64, 96, 128, 256):
        convolutions = [(width, inputs, 3, 3), (width, width, 3, 3), (width, width, 3, 3)]
        for shape in (*convolutions, (width, inputs, 1, 1)):
            shapes += [shape, (width,), (width,)]  # and its batch norm
        inputs = width
    return [*shapes, (5, inputs), (5,)]


def gpt2_small() -> Shapes:
    width, norm = 768, [(768,), (768,)]
    block: Shapes = [
        *norm,
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(50257, width), (1024, width), *12 * block, *norm]


MODELS = {
    "conv4": partial(conv4, 64),
    "conv4-32": partial(conv4, 32),
    "resnet12": resnet12,
    "gpt2-small": gpt2_small,
}


class Problem(NamedTuple):
    """A list of parameters with gradients, and coefficients for each channel ``(K, C)``."""

    case: str
    params: list[Tensor]
    grads: list[Tensor]
    gains: list[Tensor]
    units: list[Units]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    def rows(self, i: int, x: Tensor) -> Tensor:
        """``x`` as ``(C, n)``, as the parameter i is seen."""
        return x.reshape(self.units[i].w.shape[1], -1)


def make_problem(case: str, shapes: Shapes, per_channel: bool, units: int, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}

    def coefficients(shape: tuple[int, ...]) -> Units:
        columns = shape[0] if per_channel else 1
        s = 0.5 + torch.rand(units, columns, **options)
        w = (torch.rand(units, columns, **options) - 0.5) / units / s
        return Units(w, s, torch.randn(units, columns, **options))

    params = [torch.randn(shape, **options) for shape in shapes]
    grads = [torch.randn(shape, **options) for shape in shapes]
    gains = [1 + torch.rand(shape, **options) for shape in shapes]
    return Problem(case, params, grads, gains, [coefficients(shape) for shape in shapes])


def residual(problem: Problem, step: Callable[[], Any], gain: bool, sample: int = 100_000) -> float:
    """The largest residual of a step in float64, over |t| + W; of a few entries of each row."""
    before = [p.clone() for p in problem.params]
    step()
    worst = 0.0
    for i, (param, old, units) in enumerate(
        zip(problem.params, before, problem.units, strict=True)
    ):
        stride = max(1, param.numel() // sample)
        wide = Units(*(x.double().unsqueeze(2) for x in units))

        def rows(x: Tensor, i: int = i, stride: int = stride) -> Tensor:
            return problem.rows(i, x)[:, ::stride].double()

        g = rows(problem.grads[i]) / (rows(problem.gains[i]) if gain else 1)
        t = reference.psi(rows(old), wide) - LR * g
        miss = (reference.psi(rows(param), wide) - t).abs()
        worst = max(worst, float((miss / (t.abs() + reference.psi_bracket(wide))).max()))
    for param, old in zip(problem.params, before, strict=True):
        param.copy_(old)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{problem.case}: the residual is {worst:.1e}, above {TOLERANCE:.0e}")
    return worst


def formula(params: list[Tensor], grads: list[Tensor], units: list[Units]) -> None:
    """The step with a fixed number of Newton steps, as one writes it in PyTorch."""
    for param, grad, (w, s, c) in zip(params, grads, units, strict=True):
        x, g = (y.view(w.shape[1], -1) for y in (param, grad))

        def evaluate(u: Tensor, w: Tensor = w, s: Tensor = s, c: Tensor = c):
            total, slope = u, torch.ones_like(u)
            for w_k, s_k, c_k in zip(w.unsqueeze(2), s.unsqueeze(2), c.unsqueeze(2), strict=True):
                t, t0 = s_k * (u - c_k), -s_k * c_k
                r = torch.rsqrt(1 + t * t)
                total = total + w_k * (t * r - t0 * torch.rsqrt(1 + t0 * t0))
                slope = slope + w_k * s_k * r * r * r
            return total, slope

        value, slope = evaluate(x)
        target = value - LR * g
        y = x - LR * g / slope
        for _ in range(NEWTON_STEPS):
            value, slope = evaluate(y)
            y = y - (value - target) / slope
        x.copy_(y)


def optimizer_step(problem: Problem, kind: type, **options: Any) -> Callable[[], Any]:
    params = [torch.nn.Parameter(p) for p in problem.params]  # shares memory
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = grad
    return kind(params, lr=LR, **options).step


def compiled(problem: Problem) -> Callable[[], None]:
    torch._dynamo.reset()
    lists = problem.params, problem.grads, problem.units
    if len(problem.params) <= COMPILED_TENSORS:
        return partial(torch.compile(formula, dynamic=False), *lists)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than measure eager steps
    run = torch.compile(formula, dynamic=False)
    single = [([p], [g], [u]) for p, g, u in zip(*lists, strict=True)]

    def step() -> None:
        for args in single:
            run(*args)

    return step
