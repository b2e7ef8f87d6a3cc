"""Maps in floating point: at zero, at the extremes, where sums cancel, in half precision."""

import math

import pytest
import torch
from maps_cases import CASES, DGF_CASES, learned, points, relative

from mirror_opt import NewtonError, maps
from mirror_opt.maps.classical import _near_root
from mirror_opt.newton import Status


@pytest.mark.parametrize(("name", "options"), CASES)
def test_finite_at_the_extremes(name, options):
    torch.manual_seed(6)
    mirror_map = learned(name, options, dtype=torch.float32, shapes=((2, 3),))
    if mirror_map.domain != "reals":
        (x,) = points(mirror_map, ((2, 3),), dtype=torch.float32, scale=20.0)
    else:
        x = torch.tensor([[0.0, -0.0, 1e-30], [1e6, -1e6, 1.0]])
    x.requires_grad_()
    z = mirror_map([x])[0]
    assert torch.isfinite(z).all()
    assert torch.isfinite(torch.autograd.grad(z.sum(), x)[0]).all()
    z = z.detach().requires_grad_()
    y = mirror_map.inverse([z])[0]
    assert torch.isfinite(y).all()
    assert torch.isfinite(torch.autograd.grad(y.sum(), z)[0]).all()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("name", "options"), [*CASES, ("pnorm", {"p": 2.0})])
def test_slope_at_zero(name, options, direction):
    # Biases start there, and every displacement from an anchor.
    torch.manual_seed(9)
    mirror_map = learned(name, options, shapes=((1,),))
    if mirror_map.domain != "reals" and direction == "forward":
        pytest.skip("zero is not in the domain")

    def function(x):
        return getattr(mirror_map, direction)([x])[0]

    def difference(h):
        x = torch.tensor([h], dtype=torch.float64)
        return ((function(x) - function(-x)) / (2 * h)).item()

    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    coarse, fine = difference(1e-6), difference(1e-8)
    if abs(fine) <= 1.5 * abs(coarse):  # else it is infinite there, and taken as finite
        assert slope.item() == pytest.approx(fine, rel=1e-3, abs=1e-2)


def test_a_solve_beyond_its_precision_says_what_helps():
    torch.manual_seed(0)
    mirror_map = maps.KroneckerNeural([torch.zeros(6, 5)], terms=2, units=0, eps=1e-6)
    with torch.no_grad():
        for key, p in mirror_map.named_parameters():
            p.copy_((10 if "factors" in key else 6) * torch.randn_like(p))
    x = [torch.randn(6, 5)]
    with pytest.raises(NewtonError, match=r"lower rate.*inverse_is_closed") as caught:
        mirror_map(x)
    assert caught.value.status is Status.MAX_ITERATIONS
    assert mirror_map.inverse_is_closed
    assert torch.isfinite(mirror_map.inverse(x)[0]).all()


# torch's own forward mode is scripted when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_hypentropy_is_asinh_to_rounding_with_its_derivatives():
    x = torch.logspace(-40, 38, 2000, dtype=torch.float64)
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    hypentropy = maps.Hypentropy()
    for dtype, ulps in ((torch.float32, 2), (torch.float64, 4)):
        (value,) = hypentropy([x.to(dtype)])
        exact = x.to(dtype).double().asinh()
        tolerance = {"rtol": ulps * torch.finfo(dtype).eps, "atol": 2e-45, "equal_nan": True}
        torch.testing.assert_close(value.double(), exact, **tolerance)
    some = torch.tensor([0.0, -0.0, 1e-9, -1e-3, 2.0, -50.0, 1e9], dtype=torch.float64)

    def value(x):
        return hypentropy([x])[0]

    forward = torch.func.jvp(value, (some,), (torch.ones_like(some),))[1]
    torch.testing.assert_close(forward, 1 / (1 + some * some).sqrt(), rtol=1e-12, atol=0)
    some.requires_grad_()
    (slope,) = torch.autograd.grad(value(some).sum(), some, create_graph=True)
    torch.testing.assert_close(slope, 1 / (1 + some * some).sqrt(), rtol=1e-12, atol=0)
    (bend,) = torch.autograd.grad(slope.sum(), some)
    torch.testing.assert_close(bend, -some / (1 + some * some) ** 1.5, rtol=1e-6, atol=1e-15)


def test_hypentropy_far_beyond_its_scale():
    hypentropy = maps.Hypentropy(1e-4)
    x = [torch.tensor([1e16, -1e-4, 0.0])]
    exact = hypentropy.potential([x[0].double()])
    torch.testing.assert_close(hypentropy.potential(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e19, 1e25])
@pytest.mark.parametrize("terms", [1, 2])
def test_a_coupled_solve_over_all_of_float32(terms, scale):
    torch.manual_seed(0)
    mirror_map = learned("kronecker", {"terms": terms}, torch.float32, shapes=((4, 3),))
    x = [scale * torch.randn(4, 3)]
    torch.testing.assert_close(mirror_map.inverse(mirror_map(x))[0], x[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_coupled_solve_over_all_of_float64(terms):
    torch.manual_seed(0)
    mirror_map = learned("kronecker", {"terms": terms}, shapes=((4, 3),))
    for scale in (1e-300, 1e-170, 1e-150, 1e150, 1e300):
        x = [scale * torch.randn(4, 3, dtype=torch.float64)]
        torch.testing.assert_close(mirror_map.inverse(mirror_map(x))[0], x[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("units", [0, 4])
def test_a_coupled_solve_whose_sums_cancel(units):
    # The slopes of F lie 1e4 and more apart, so that what is added up is far larger than F.
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(6, 4, dtype=torch.float64)
        mirror_map = maps.KroneckerNeural([x], units=units, eps=0.1)
        with torch.no_grad():
            for p in mirror_map.parameters():
                p.add_(1.5 * torch.randn_like(p))
        condition = (mirror_map.smoothness() / mirror_map.strong_convexity()).item()
        assert condition > 1e3
        (again,) = mirror_map.inverse(mirror_map([x]))
        assert relative([again], [x]) < 1e-15 * condition


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), DGF_CASES)
def test_divergences_of_half_precision_points_are_not_negative(name, options, dtype):
    torch.manual_seed(11)
    mirror_map = learned(name, options, dtype=torch.float32, shapes=((4, 5),))
    for _ in range(20):
        (x,) = points(mirror_map, ((4, 5),), dtype=torch.float32)
        x = x.to(dtype)
        y = (x * (1 + 0.01 * torch.rand(4, 5))).to(dtype)
        distance = mirror_map.bregman([x], [y])
        assert distance.dtype == torch.float32
        assert distance > -1e-5


def test_entropies_at_the_edge_of_their_domain():
    simplex, positive, hypentropy = (
        maps.NegativeEntropy(), maps.NegativeEntropy(simplex=False), maps.Hypentropy()
    )  # fmt: skip
    z = torch.tensor([[0.0, -104.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(simplex.conjugate([z]), z)
    assert torch.equal(gradient, torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    y = torch.tensor([[0.5, 0.5]])
    divergence = simplex.bregman([x], [y])
    assert divergence.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(divergence, x)[0].isfinite().all()
    far = torch.tensor([706.0, -800.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(positive.conjugate([far]), far)
    assert torch.equal(gradient, far.detach().exp())
    assert hypentropy.conjugate([far[:1]]).item() == pytest.approx(math.cosh(706.0), rel=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.1, 1e3])
@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_where_the_solve_of_a_quadratic_starts(p, eps):
    t = torch.logspace(-20, 20, 200, dtype=torch.float64)
    root = _near_root(t, p, eps, torch.full_like(t, math.inf))
    torch.testing.assert_close(root ** (p - 1) + eps * root, t, rtol=1e-14, atol=0)
