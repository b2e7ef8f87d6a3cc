"""separable_rotated in plain PyTorch: value, gradients, transforms, torch.compile, opcheck."""

import pytest
import torch
import torch._dynamo.testing
from ops_cases import random_units
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from mirror_opt import reference, use_backend
from mirror_opt.errors import InputError
from mirror_opt.ops import separable_rotated
from mirror_opt.reference import Units

pytestmark = [
    # torch's compiler imports modules of its own that torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

# left, members, h, w, P, T, C
CASES = {
    "rows": (True, 2, 3, 2, 2, 1, 3),
    "rows of shared channels": (True, 1, 4, 2, 1, 2, 2),
    "columns": (False, 2, 2, 3, 1, 2, 2),
    "columns of shared channels": (False, 4, 4, 2, 2, 1, 2),
    "one entry": (True, 1, 1, 1, 1, 1, 1),
}


@pytest.fixture(autouse=True)
def _plain():
    with use_backend("torch"):
        yield


def operands(case, count=2) -> list[Tensor]:
    """u, factor, gain, w, s, c in float64."""
    left, members, h, w, period, terms, channels = case
    generator = torch.Generator().manual_seed(3)
    normal = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
    n = h if left else w
    gain = normal(period, terms, h, w).exp()
    units = random_units(count, period, terms, channels)
    return [normal(members, h, w), normal(period, terms, n, n), gain, *units]


def rotated(left):
    def run(u, factor, gain, *units):
        return separable_rotated(u, factor, gain, Units(*units), eps=0.1, left=left)

    return run


def formula(left):
    """Matrix by matrix, in plain differentiable operations."""

    def run(u, factor, gain, *units):
        results = []
        for m, x in enumerate(u):
            out = 0.1 * x
            p = m % len(factor)
            for t in range(factor.shape[1]):
                matrix = factor[p, t]
                v = matrix @ x if left else x @ matrix.mT
                repeats = len(x) // units[0].shape[-1]
                own = Units(*(y[:, p, t].repeat_interleave(repeats, 1)[..., None] for y in units))
                y = gain[p, t] * reference.psi(v, own)
                out = out + (matrix.mT @ y if left else y @ matrix)
            results.append(out)
        return torch.stack(results)

    return run


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients(case, count):
    args = [x.requires_grad_() for x in operands(case, count)]
    run = rotated(case[0])
    torch.testing.assert_close(run(*args), formula(case[0])(*args), rtol=1e-12, atol=1e-12)
    assert gradcheck(run, args)
    assert gradgradcheck(run, args)
    fixed = [args[0], args[1].detach(), *args[2:]]  # the factor's gradient is not computed
    assert gradcheck(run, fixed)


@pytest.mark.parametrize(
    "dims",
    [(0, *5 * [None]), (2, 1, *4 * [None]), (None, None, 0, *3 * [None]), (1, *4 * [None], 3)],
    ids=["tasks", "tasks with factors", "gains only", "tasks with centres"],
)
@pytest.mark.parametrize("name", ["columns", "columns of shared channels"])
def test_transforms_of_torch_func(dims, name):
    case = CASES[name]
    args = [
        x if d is None else torch.stack([x, 1.1 * x, 0.9 * x], d)
        for x, d in zip(operands(case), dims, strict=True)
    ]
    every = tuple(range(6))

    def transforms(f):
        def loss(*args):
            return f(*args).square().sum()

        def second(*args):
            return sum(g.square().sum() for g in grad(loss, argnums=every)(*args))

        return f, grad(loss, argnums=every), grad(second, argnums=every)

    pairs = zip(transforms(rotated(case[0])), transforms(formula(case[0])), strict=True)
    for f, expected in pairs:
        result = vmap(f, in_dims=dims)(*args)
        torch.testing.assert_close(
            result, vmap(expected, in_dims=dims)(*args), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", ["rows", "columns of shared channels"])
def test_opcheck(name):
    args = [x.requires_grad_() for x in operands(CASES[name])]
    results = torch.library.opcheck(
        torch.ops.mirror_opt.separable_rotated, (*args, 0.1, CASES[name][0], "algebraic")
    )
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_in_one_graph():
    args = [x.requires_grad_() for x in operands(CASES["rows"])]

    def function(*args):
        return rotated(True)(*args).sin().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = [torch.autograd.grad(f(*args), args) for f in (compiled, function)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_backward_keeps_its_operands_only():
    args = [x.requires_grad_() for x in operands(CASES["rows"])]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rotated(True)(*args)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in args}


def test_wrong_operands_are_refused():
    u, factor, gain, *units = operands(CASES["columns"])
    units = Units(*units)
    with pytest.raises(InputError, match=r"shapes .*pass \[\(1, 2, 2, 2\), \(1, 2, 2, 3\)"):
        separable_rotated(u, factor, gain, units, left=True)
    pair = [x.repeat(2, 1, 1, 1) for x in (factor, gain)]
    twice = Units(*(x.repeat(1, 2, 1, 1) for x in units))
    with pytest.raises(InputError, match="a P that divides 3"):
        separable_rotated(torch.cat([u, u[:1]]), *pair, twice, left=False)
    with pytest.raises(InputError, match="pass one"):
        separable_rotated(u.float(), factor, gain, units, left=False)
    with pytest.raises(InputError, match="pass at least one entry"):
        separable_rotated(u[:0], factor, gain, units, left=False)
    big, one = torch.zeros(1, 129, 1), torch.zeros(0, 1, 1, 1)
    matrix = torch.eye(129).reshape(1, 1, 129, 129)
    with pytest.raises(InputError, match="a mode of 129 entries"):
        separable_rotated(big, matrix, big[None], Units(one, one, one), left=True)
    with pytest.raises(InputError, match="pass \\(members, h, w\\)"):
        separable_rotated(u[0], factor, gain, units, left=False)
