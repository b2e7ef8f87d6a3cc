"""The elementwise operators under autograd, torch.func, torch.compile and torch.library.opcheck."""

import pytest
import torch
import torch._dynamo.testing
from ops_cases import (
    each_implementation,  # noqa: F401
    operands,
    random_units,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from mirror_opt import reference
from mirror_opt.ops import separable_forward, separable_inverse, separable_step
from mirror_opt.reference import SIGMAS, Units

pytestmark = [
    pytest.mark.usefixtures("each_implementation"),
    # torch's compiler imports modules of its own that torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

SHAPES = {
    "channels": ((2, 3), (2, 3), (2, 1)),
    "vector": ((5,), (5,), (5,)),
    "scalar": ((), (), ()),
    "shared": ((2, 2, 3), (1, 2, 3), (1, 2, 1)),
    "scattered": ((2, 2, 3), (2, 1, 3), (1, 2, 1)),
    "empty": ((2, 0), (2, 0), (2, 1)),
}


def forward(u, gain, w, s, c):
    return separable_forward(u, gain, Units(w, s, c))


def inverse(t, gain, w, s, c):
    return separable_inverse(t, gain, Units(w, s, c))


def step(x, g, lr, gain, w, s, c, primal=True):
    return separable_step(x, g, lr, gain, Units(w, s, c), primal=primal)


def unrolled_inverse(t, gain, w, s, c):
    """S^-1 by Newton's method in plain differentiable operations."""
    y, units = t / gain, Units(w, s, c)
    for _ in range(40):
        y = y - (reference.psi(y, units) - t / gain) / reference.psi_slope(y, units)
    return y


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_first_and_second_order(shapes):
    args = [x.requires_grad_() for x in operands(*shapes, count=2)]
    for function in (forward, inverse):
        assert gradcheck(function, args)
        assert gradgradcheck(function, args)


@pytest.mark.parametrize("primal", [True, False])
def test_gradients_of_a_step(primal):
    x, *coefficients = operands((2, 3), (2, 3), (2, 1), count=2)
    g, lr = torch.randn_like(x), torch.tensor(0.3, dtype=torch.float64)
    args = [a.requires_grad_() for a in (x, g, lr, *coefficients)]
    assert gradcheck(lambda *a: step(*a, primal=primal), args)
    assert gradgradcheck(lambda *a: step(*a, primal=primal), args)


def cases():
    """Operators, their formulas in plain PyTorch, and arguments of which some are tasks'."""
    u, gain, w, s, c = operands((2, 3), (2, 3), (2, 1), count=2)
    us = torch.stack([u * (1 + 0.1 * i) for i in range(4)])
    ws = torch.stack([w * (1 - 0.1 * i) for i in range(4)], 1)
    gains = torch.stack([gain + 0.1 * i for i in range(4)], 2)
    dims = {
        "tasks": (0, None, None, None, None),
        "tasks and coefficients": (0, None, 1, None, None),
        "all but the units": (0, 2, None, None, None),
        "gains only": (None, 2, None, None, None),
        "one coefficient only": (None, None, 1, None, None),
    }
    batched = (us, gains, ws, None, None)
    plain = (u, gain, w, s, c)
    for name, d in dims.items():
        args = [x if i is None else b for i, x, b in zip(d, plain, batched, strict=True)]
        yield name, d, args


@pytest.mark.parametrize("operator", [forward, inverse])
def test_transforms_of_torch_func(operator):
    def plain_forward(u, gain, w, s, c):
        return gain * reference.psi(u, Units(w, s, c))

    formula = plain_forward if operator is forward else unrolled_inverse
    every = tuple(range(5))

    def transforms(f):
        def loss(*args):
            return f(*args).square().sum()

        def second(*args):
            return sum(g.square().sum() for g in grad(loss, argnums=every)(*args))

        return loss, grad(loss, argnums=every), grad(second, argnums=every)

    for name, dims, args in cases():
        for f, expected in zip(transforms(operator), transforms(formula), strict=True):
            result = vmap(f, in_dims=dims)(*args)
            torch.testing.assert_close(
                result, vmap(expected, in_dims=dims)(*args), rtol=1e-9, atol=1e-9, msg=name
            )
            # One task alone.
            one = [x if d is None else x.select(d, 1) for d, x in zip(dims, args, strict=True)]
            torch.testing.assert_close(f(*one), expected(*one), rtol=1e-9, atol=1e-9)
    # The gradient over vmap, whose coefficients are shared.
    _, dims, args = next(cases())
    outer = [
        grad(lambda w, f=f: vmap(f, in_dims=dims)(args[0], args[1], w, *args[3:]).sum())(args[2])
        for f in (transforms(operator)[0], transforms(formula)[0])
    ]
    torch.testing.assert_close(*outer, rtol=1e-9, atol=1e-9)


def test_vmap_of_steps():
    x, *coefficients = operands((4, 2, 3), (2, 3), (2, 1), count=2)
    g, rates = torch.randn_like(x), torch.linspace(0.1, 0.4, 4, dtype=torch.float64)
    units = (None,) * 4
    result = vmap(step, in_dims=(0, 0, 0, *units))(x, g, rates, *coefficients)
    shared = vmap(step, in_dims=(0, None, None, *units))(x, g[0], rates[0], *coefficients)
    for i in range(4):
        torch.testing.assert_close(result[i], step(x[i], g[i], rates[i], *coefficients))
        torch.testing.assert_close(shared[i], step(x[i], g[0], rates[0], *coefficients))


@pytest.mark.parametrize("sigma", sorted(set(SIGMAS) - {"algebraic"}))
def test_other_sigmas_are_served_by_plain_pytorch(sigma, each_implementation):  # noqa: F811
    if each_implementation != "torch":
        pytest.skip("the choice of a backend is tested in test_backends")
    args = [x.requires_grad_() for x in operands((2, 3), (2, 3), (2, 1), count=2)]
    assert gradcheck(lambda u, g, *units: separable_forward(u, g, Units(*units), sigma), args)
    assert gradgradcheck(lambda t, g, *units: separable_inverse(t, g, Units(*units), sigma), args)


@pytest.mark.parametrize("name", ["forward", "inverse", "step", "backward", "inverse_backward"])
def test_opcheck(name):
    u, *coefficients = (x.requires_grad_() for x in operands((2, 3), (2, 3), (2, 1), count=2))
    coefficients = (*coefficients, "algebraic")
    g = torch.randn_like(u).requires_grad_()
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.mirror_opt
    operator, args = {
        "forward": (ops.separable_forward, (u, *coefficients)),
        "inverse": (ops.separable_inverse, (u, *coefficients)),
        "step": (ops.separable_step, (u, g, lr, *coefficients)),
        "backward": (ops.separable_backward, (g, u, *coefficients, False)),
        "inverse_backward": (ops.separable_backward, (g, u, *coefficients, True)),
    }[name]
    results = torch.library.opcheck(operator, args)
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_in_one_graph_and_once_for_all_rates():
    u, gain, *units = operands((3, 8), (3, 8), (3, 1))

    def function(u, lr, *units):
        y = separable_forward(u, gain, Units(*units))
        x = separable_inverse(1.1 * y, gain, Units(*units))
        return separable_step(x, u, lr, gain, Units(*units)).sin().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    inputs = [x.requires_grad_() for x in (u, *units)]
    counts = []
    for rate in (0.1, 0.2, 0.3):
        lr = torch.tensor(rate, dtype=torch.float64)
        results = [
            torch.autograd.grad(f(inputs[0], lr, *inputs[1:]), inputs) for f in (compiled, function)
        ]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


def test_backward_needs_the_result_only():
    units = random_units(3, 1)
    t = torch.linspace(-2, 2, 1000, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = separable_inverse(t, torch.ones_like(t), units)
    large = {x.data_ptr() for x in saved if x.numel() == 1000}
    assert len(large) == 2  # y and the gain, whatever the number of Newton steps
    assert y.data_ptr() in large
