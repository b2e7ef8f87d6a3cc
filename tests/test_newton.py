"""The solvers, and the implicit derivatives of the inverse of psi."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror_opt import NewtonError, maps, reference
from mirror_opt.newton import Status, solve_monotone
from mirror_opt.newton_cg import implicit_convex, solve_convex
from mirror_opt.ops import separable_inverse
from mirror_opt.reference import SIGMAS, Units


def solve_psi(t, units, sigma="algebraic", **options):
    bracket = reference.psi_bracket(units)
    return solve_monotone(
        lambda y: (reference.psi(y, units, sigma), reference.psi_slope(y, units, sigma)),
        t,
        t - 1.05 * bracket,
        t + 1.05 * bracket,
        start=t,
        scale=t.abs() + bracket,
        **options,
    )


def random_units(k: int, *shape: int, dtype=torch.float64, rho=0.9) -> Units:
    s = torch.rand(k, *shape, dtype=dtype) + 0.5
    w = rho / k * torch.tanh(torch.randn(k, *shape, dtype=dtype)) / s
    return Units(w, s, torch.randn(k, *shape, dtype=dtype))


coefficient = st.floats(-3, 3).map(lambda e: 10.0**e)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    w=coefficient,
    s=coefficient,
    c=st.floats(-100, 100),
    exponent=st.floats(-12, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    sigma=st.sampled_from(sorted(SIGMAS)),
)
def test_converges_for_extreme_coefficients(w, s, c, exponent, dtype, sigma):
    units = Units(*(torch.tensor([[v]], dtype=dtype) for v in (w, s, c)))
    t = 10.0**exponent * torch.linspace(-1, 1, 41, dtype=dtype)
    solution = solve_psi(t, units, sigma)
    assert solution.status is Status.CONVERGED
    y = solution.value
    # The answer is as good as its dtype allows: psi passes t between its neighbours.
    spacing = 16 * torch.finfo(dtype).eps * (y.abs() + abs(c) + 1 / s)
    wide = Units(*(u.double() for u in units))
    slack = 32 * torch.finfo(dtype).eps * (t.abs().double() + 2 * w)
    below = reference.psi((y - spacing).double(), wide, sigma) - slack
    above = reference.psi((y + spacing).double(), wide, sigma) + slack
    assert bool(((below <= t.double()) & (t.double() <= above)).all())


def test_status_is_data_and_elements_are_independent():
    units = random_units(4, 1)
    t = torch.linspace(-5, 5, 101, dtype=torch.float64)
    full = solve_psi(t, units)
    assert (full.status, full.value.shape) == (Status.CONVERGED, t.shape)
    assert full.residual < 1e-14
    short = solve_psi(t, units, max_iterations=1, tolerance=1e-15)
    assert short.status is Status.MAX_ITERATIONS
    with pytest.raises(NewtonError, match="lower rate") as caught:
        short.unwrap()
    assert caught.value.status is Status.MAX_ITERATIONS
    done = short.value.isfinite()
    assert 0 < done.sum() < len(t)  # zero is where it starts
    with_nan = solve_psi(torch.cat([t, t.new_tensor([math.nan])]), units, max_iterations=1)
    assert with_nan.status is Status.NONFINITE
    residual = reference.psi(with_nan.value, units) - torch.cat([t, t[:1]])
    assert not (residual.abs() > 1e-12).any()  # what was not solved is NaN
    # An element's answer does not depend on its company.
    alone = torch.cat([solve_psi(t[i : i + 1], units).value for i in range(0, 101, 25)])
    assert torch.equal(alone, full.value[::25])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_target(bad):
    t = torch.tensor([0.0, bad, 1.0], dtype=torch.float64)
    solution = solve_psi(t, random_units(2, 1))
    assert solution.status is Status.NONFINITE
    assert torch.isfinite(solution.value[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 0), ()])
@pytest.mark.parametrize("sigma", sorted(SIGMAS))
def test_gradients_to_second_order(shape, sigma):
    torch.manual_seed(0)
    units = [u.requires_grad_() for u in random_units(3, *shape)]
    t = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(t, w, s, c):
        return separable_inverse(t, torch.ones_like(t), Units(w, s, c), sigma)

    assert torch.autograd.gradcheck(f, (t, *units))
    assert torch.autograd.gradgradcheck(f, (t, *units))


def test_implicit_equals_unrolled():
    torch.manual_seed(1)
    units = [u.requires_grad_() for u in random_units(4, 1)]
    t = torch.linspace(-3, 3, 20, dtype=torch.float64).requires_grad_()

    def unrolled(t, w, s, c):
        y, u = t, Units(w, s, c)
        for _ in range(30):
            y = y - (reference.psi(y, u) - t) / reference.psi_slope(y, u)
        return y

    inputs = (t, *units)
    y = separable_inverse(t, torch.ones_like(t), Units(*units))
    torch.testing.assert_close(y, unrolled(*inputs), rtol=1e-12, atol=1e-12)
    weights = torch.randn(20, dtype=torch.float64)
    first = torch.autograd.grad((y * weights).sum(), inputs, create_graph=True)
    other = torch.autograd.grad((unrolled(*inputs) * weights).sum(), inputs, create_graph=True)
    torch.testing.assert_close(first, other, rtol=1e-9, atol=1e-11)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    other = torch.autograd.grad(sum(g.square().sum() for g in other), inputs)
    torch.testing.assert_close(second, other, rtol=1e-8, atol=1e-9)


def test_vmap_of_gradients():
    torch.manual_seed(2)
    units = random_units(3, 1, 4)
    t = torch.randn(6, 5, 4, dtype=torch.float64)
    w = torch.stack([units.w * (1 + 0.1 * i) for i in range(6)])

    def loss(t, w):
        return separable_inverse(t, torch.ones_like(t), Units(w, units.s, units.c)).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    batched = torch.func.vmap(gradient)(t, w)
    single = [gradient(t[i], w[i]) for i in range(6)]
    for i in (0, 1):
        torch.testing.assert_close(batched[i], torch.stack([g[i] for g in single]))
    # Batched in one argument only, and along another dimension than the first.
    shared = torch.func.vmap(gradient, in_dims=(1, None))(t.movedim(0, 1), w[0])
    torch.testing.assert_close(shared[0][2], gradient(t[2], w[0])[0])


def test_solve_convex():
    torch.manual_seed(3)
    a = torch.randn(8, 8, dtype=torch.float64)
    a = a @ a.T + torch.eye(8, dtype=torch.float64)

    def f(y):
        return a @ y + y**3

    solution = solve_convex(
        f,
        lambda y: lambda v: a @ v + 3 * y**2 * v,
        lambda y: (y @ a @ y) / 2 + (y**4).sum() / 4,
        10 * torch.randn(8, dtype=torch.float64),
    )
    assert solution.status is Status.CONVERGED
    assert solution.iterations < 20
    single = solve_convex(
        lambda y: 2 * y, lambda y: lambda v: 2 * v, lambda y: (y * y).sum(), torch.full((3,), 1e25)
    )
    assert single.status is Status.CONVERGED
    torch.testing.assert_close(single.value, torch.full((3,), 5e24))
    nan = torch.full((8,), math.nan, dtype=torch.float64)
    assert solve_convex(f, lambda y: f, lambda y: y.sum(), nan).status is Status.NONFINITE


def quartic(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The y with A y + b y^3 = t, A = a a^T + I."""

    def product(v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return a @ (a.mT @ v) + v

    return implicit_convex(
        lambda y, a, b: product(y, a) + b * y**3,
        lambda y, a, b: lambda v: product(v, a) + 3 * b * y**2 * v,
        lambda y, a, b: (y * product(y, a)).sum() / 2 + (b * y**4).sum() / 4,
        t,
        a,
        b,
    )


def quartic_inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(4)
    inputs = (torch.randn(4), torch.randn(4, 4), 0.5 + torch.rand(4))
    return tuple(x.double().requires_grad_() for x in inputs)


def test_implicit_convex_to_third_order():
    inputs = quartic_inputs()
    assert torch.autograd.gradcheck(quartic, inputs)
    assert torch.autograd.gradgradcheck(quartic, inputs)

    # With t and b used elsewhere too, on a path that no incoming gradient tells of.
    def elsewhere(t, a, b):
        return quartic(t, a, b).sum() + (t * b).square().sum()

    assert torch.autograd.gradgradcheck(elsewhere, inputs)

    def slope(t, a, b):
        return torch.autograd.grad(elsewhere(t, a, b), (t, a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(slope, inputs, fast_mode=True)
    # torch.func takes the same derivatives.
    t, a, b = (x.detach() for x in inputs)
    hessian = torch.autograd.functional.hessian(lambda t: elsewhere(t, a, b), t)
    rows = torch.stack([torch.func.grad(lambda t, i=i: slope_of(t, a, b)[i])(t) for i in range(4)])
    torch.testing.assert_close(rows + 2 * torch.diag(b * b), hessian)


def slope_of(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda t: quartic(t, a, b).sum())(t)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_passes_on_as_nan(bad):
    inputs = quartic_inputs()
    y = quartic(*inputs)
    incoming = torch.zeros_like(y)
    incoming[1] = bad
    for gradient in torch.autograd.grad(y, inputs, incoming):
        assert gradient.isnan().any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-40),
        (torch.float32, 1e30),
        (torch.float64, 1e-170),
        (torch.float64, 1e155),
    ],
    ids=str,
)
def test_incoming_gradients_of_any_size(dtype, size):
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in quartic_inputs())
    y = quartic(*inputs)
    unit = torch.autograd.grad(y, inputs[0], torch.ones_like(y), retain_graph=True)[0]
    found = torch.autograd.grad(y, inputs[0], torch.full_like(y, size))[0]
    torch.testing.assert_close(found.double() / size, unit.double(), rtol=1e-4, atol=1e-5)


def test_a_linear_solve_that_fails_in_backward_is_an_error():
    t = torch.ones(3, dtype=torch.float64, requires_grad=True)
    matrix = torch.eye(3, dtype=torch.float64)
    y = implicit_convex(lambda y: y, lambda y: lambda v: matrix @ v, lambda y: (y * y).sum() / 2, t)
    # Not symmetric: what conjugate gradients do not solve.
    matrix += torch.tensor([[0, 5, 0], [-5, 0, 5], [0, -5, 0]])
    with pytest.raises(NewtonError, match="MAX_ITERATIONS"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-12])
@pytest.mark.parametrize("options", [{}, {"terms": 2}], ids=str)
def test_a_coupled_solve_of_a_small_target_converges(dtype, size, options):
    # Near zero the units cancel, and what is left of their rounding no y can undo.
    for seed in range(20):
        torch.manual_seed(seed)
        target = [size * torch.randn(4, 3, dtype=dtype), size * torch.randn(5, dtype=dtype)]
        mirror_map = maps.KroneckerNeural(target, **options)
        with torch.no_grad():
            for p in mirror_map.parameters():
                p.add_(0.1 * torch.randn_like(p))
            back = mirror_map.inverse(mirror_map(target))
        for x, y in zip(back, target, strict=True):
            largest, eps = float(y.abs().max()), torch.finfo(dtype).eps
            assert (x - y).abs().max() <= max(1000 * eps, min(0.5, 100 * eps / largest)) * largest


def test_its_error_is_copied_and_pickled():
    error = NewtonError(Status.NONFINITE)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is NewtonError
        assert again.status is Status.NONFINITE
        assert str(again) == str(error)


def visited(a: float, target: float) -> list[float]:
    """The points at which y + a y^9 = target was looked at, to the solution."""
    seen = []

    def f(y):
        seen.append(y.item())
        return y + a * y**9

    solution = solve_convex(
        f,
        lambda y: lambda v: (1 + 9 * a * y**8) * v,
        lambda y: (y**2 / 2 + a / 10 * y**10).sum(),
        torch.tensor([target], dtype=torch.float64),
    )
    assert solution.status is Status.CONVERGED
    return seen


def test_a_step_that_lowers_the_function_is_taken_though_the_residual_grows():
    # From 0 the full step to 0.85 lowers y^2 / 2 + y^10 - 0.85 y, and nearly trebles |f(y) - t|.
    second = 0.85 - 10 * 0.85**9 / (1 + 90 * 0.85**8)
    assert visited(10.0, 0.85)[:3] == [0.0, 0.85, pytest.approx(second, rel=1e-9)]


def test_a_step_is_shortened_as_often_as_it_has_to_be():
    assert visited(1e3, 1e3)[1:4] == [1000.0, 500.0, 250.0]
