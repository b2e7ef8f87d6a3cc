"""The formulas of the reference against autograd and against their stated bounds."""

import pytest
import torch

from mirror_opt import reference
from mirror_opt.reference import SIGMAS, Units


@pytest.fixture(params=sorted(SIGMAS))
def sigma(request):
    return request.param


@pytest.fixture
def units():
    torch.manual_seed(0)
    s = torch.rand(5, 7, dtype=torch.float64) + 0.2
    return Units(0.15 * torch.randn(5, 7, dtype=torch.float64), s, torch.randn_like(s))


@pytest.fixture
def u():
    torch.manual_seed(1)
    return 3 * torch.randn(7, dtype=torch.float64)


def test_derivatives(u, units, sigma):
    u.requires_grad_()
    for x in units:
        x.requires_grad_()
    value = reference.psi(u, units, sigma)
    slope, *partial = torch.autograd.grad(value.sum(), (u, *units))
    torch.testing.assert_close(reference.psi_slope(u, units, sigma), slope)
    for ours, autograd in zip(reference.psi_units_gradient(u, units, sigma), partial, strict=True):
        torch.testing.assert_close(ours, autograd)
    (derivative,) = torch.autograd.grad(reference.psi_integral(u, units, sigma).sum(), u)
    torch.testing.assert_close(derivative, value)


def test_origin_slope_bounds_and_bracket(units, sigma):
    zero = torch.zeros(7, dtype=torch.float64)
    assert torch.equal(reference.psi(zero, units, sigma), zero)
    assert torch.equal(reference.psi_integral(zero, units, sigma), zero)
    grid = torch.linspace(-20, 20, 2001, dtype=torch.float64).unsqueeze(1)
    wide = Units(*(x.unsqueeze(1) for x in units))
    slope = reference.psi_slope(grid.expand(-1, 7), wide, sigma)
    lower, upper = reference.psi_slope_bounds(units)
    assert bool(((slope >= lower) & (slope <= upper)).all())
    value = reference.psi(grid.expand(-1, 7), wide, sigma)
    assert bool(((value - grid).abs() <= reference.psi_bracket(units)).all())


def test_no_units_is_the_identity(u, sigma):
    empty = torch.zeros(0, 1, dtype=torch.float64)
    units = Units(empty, empty, empty)
    assert torch.equal(reference.psi(u, units, sigma), u)
    assert torch.equal(reference.psi_slope(u, units, sigma), torch.ones_like(u))
    assert torch.equal(reference.psi_integral(u, units, sigma), u * u / 2)


def test_the_integral_does_not_cancel_near_the_origin(sigma):
    t = torch.tensor([1e-15, 1e-4, -3e-3, 0.5, 0.999, 1.001, 30.0, 1e6])
    exact = SIGMAS[sigma].integral(t.double())
    expected = t.double() ** 2 / 2
    torch.testing.assert_close(exact[:2], expected[:2], rtol=1e-8, atol=0)
    torch.testing.assert_close(SIGMAS[sigma].integral(t).double(), exact, rtol=1e-6, atol=0)


def test_far_out_in_float32(sigma):
    u = torch.tensor([0.0, 1e6, -1e20, 1e30], requires_grad=True)
    units = Units(*(torch.tensor([[v]]) for v in (0.5, 1e3, 2.0)))
    value = reference.psi(u, units, sigma)
    assert torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), u)[0]).all()


def test_the_integral_of_tanh_is_even_and_its_derivative():
    t = torch.tensor([-1e6, -30.0, -10.5, -9.5, -0.1, 0.0], dtype=torch.float64, requires_grad=True)
    integral = SIGMAS["tanh"].integral
    assert torch.equal(integral(t), integral(-t))
    (slope,) = torch.autograd.grad(integral(t).sum(), t)
    torch.testing.assert_close(slope, torch.tanh(t.detach()), rtol=1e-14, atol=0)
