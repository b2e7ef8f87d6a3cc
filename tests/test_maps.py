"""Every property of a mirror map, over all registered maps and all their variants.

A new map is tested by being registered.
"""

import contextlib
import inspect
import io
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mirror_opt import NewtonError, maps
from mirror_opt.errors import InputError
from mirror_opt.maps.base import dot
from mirror_opt.newton import Status

CASES = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name, cls in sorted(maps.REGISTRY.items())
    for i, options in enumerate(cls.variants)
]
DGF_CASES = [case for case in CASES if maps.REGISTRY[case.values[0]].is_dgf]
SHAPES = ((5, 4), (5,), (3, 2, 3, 3), (), (1, 7))


def points(mirror_map, shapes=SHAPES, dtype=torch.float64, scale=1.0) -> list[Tensor]:
    """Random points of the map's domain."""
    raw = [scale * torch.randn(shape, dtype=dtype) for shape in shapes]
    if mirror_map.domain == "simplex":
        return [torch.softmax(x.reshape(-1) if x.dim() == 0 else x, -1) for x in raw]
    return [x.exp() for x in raw] if mirror_map.domain == "positive" else raw


def learned(name: str, options: dict, dtype=torch.float64, shapes=SHAPES):
    """A map as training might leave it: calibrated, and every parameter moved."""
    params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    mirror_map = maps.create(name, params, **options)
    samples = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(2)]
    mirror_map.calibrate(samples)
    with torch.no_grad():
        for p in mirror_map.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mirror_map


def relative(xs, ys) -> float:
    return max(
        ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
        for x, y in zip(xs, ys, strict=True)
    )


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(name, options, dtype):
    torch.manual_seed(1)
    mirror_map = learned(name, options, dtype)
    x = points(mirror_map, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert relative(mirror_map.inverse(mirror_map(x)), x) < tolerance
    assert all(z.dtype == dtype for z in mirror_map(x))
    if mirror_map.domain != "simplex":  # there duals that differ by a constant are one point
        z = mirror_map(points(mirror_map, dtype=dtype))
        assert relative(mirror_map(mirror_map.inverse(z)), z) < 10 * tolerance


def jacobian(function, x: Tensor) -> Tensor:
    rows = torch.autograd.functional.jacobian(lambda v: function([v])[0], x)
    return rows.reshape(x.numel(), x.numel())


@pytest.mark.parametrize(("name", "options"), DGF_CASES)
@pytest.mark.parametrize("shape", [(3, 2), (4,), (2, 2, 2, 2)])
def test_jacobian_is_symmetric_positive_definite(name, options, shape):
    torch.manual_seed(2)
    mirror_map = learned(name, options, shapes=(shape,))
    (x,) = points(mirror_map, (shape,))
    j = jacobian(mirror_map.forward, x)
    torch.testing.assert_close(j, j.T, rtol=1e-6, atol=1e-8)
    eigenvalues = torch.linalg.eigvalsh((j + j.T) / 2)
    assert eigenvalues[0] > 0
    # The certificates hold at every point.
    assert eigenvalues[0] >= mirror_map.strong_convexity() * (1 - 1e-6)
    assert eigenvalues[-1] <= mirror_map.smoothness() * (1 + 1e-6)


def test_meta_curvature_is_not_symmetric():
    torch.manual_seed(3)
    mirror_map = learned("meta-curvature", {}, shapes=((3, 2),))
    j = jacobian(mirror_map.inverse, torch.randn(3, 2, dtype=torch.float64))
    assert (j - j.T).abs().max() > 1e-2
    with pytest.raises(TypeError, match="no potential"):
        mirror_map.potential([torch.zeros(3, 2, dtype=torch.float64)])


def both_parametrizations(name: str, options: dict) -> list[dict]:
    if "parametrization" not in inspect.signature(maps.REGISTRY[name]).parameters:
        return [options]
    return [{**options, "parametrization": kind} for kind in ("dual", "primal")]


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(case.values[0], options, id=f"{case.id}-{i}")
        for case in CASES
        for i, options in enumerate(both_parametrizations(*case.values))
    ],
)
def test_derivatives_to_second_order(name, options, way):
    torch.manual_seed(11)
    mirror_map = learned(name, options, shapes=((2, 3),))
    (x,) = points(mirror_map, ((2, 3),))
    if way == "inverse":
        x = mirror_map([x])[0]
    # Empty parameters (of no units) have no derivative, and gradcheck does not take them.
    named = {key: p for key, p in mirror_map.named_parameters() if p.numel()}
    inputs = [v.detach().clone().requires_grad_() for v in (x, *named.values())]

    class Way(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = mirror_map

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self.map, way)([x])[0]

    def result(x: Tensor, *values: Tensor) -> Tensor:
        swapped = {f"map.{key}": value for key, value in zip(named, values, strict=True)}
        return torch.func.functional_call(Way(), swapped, (x,))

    # The input is used elsewhere too: beside the result, whose incoming gradient then depends on
    # it, and in a term of its own, so that no incoming gradient does.
    def beside(x: Tensor, *values: Tensor) -> Tensor:
        return result(x, *values) * x

    def apart(x: Tensor, *values: Tensor) -> Tensor:
        return result(x, *values).sum() + x.square().sum()

    for function in (beside, apart):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "options"), DGF_CASES)
def test_bregman_divergence(name, options):
    torch.manual_seed(4)
    mirror_map = learned(name, options)
    mu, ell = mirror_map.strong_convexity().item(), mirror_map.smoothness().item()
    for scale in (1e-2, 1.0, 10.0):
        x = points(mirror_map, scale=scale)
        y = points(mirror_map, scale=scale)
        distance = mirror_map.bregman(x, y).item()
        step = [a - b for a, b in zip(x, y, strict=True)]
        square = dot(step, step).item()
        slack = 1e-9 * (1 + abs(mirror_map.potential(x).item()))
        assert distance >= mu / 2 * square - slack
        assert distance <= (ell / 2 * square if math.isfinite(ell) else math.inf) + slack
        assert mirror_map.bregman(x, x).item() == pytest.approx(0, abs=slack)


@pytest.mark.parametrize(("name", "options"), DGF_CASES)
def test_gradient_of_the_potential(name, options):
    torch.manual_seed(5)
    mirror_map = learned(name, options)
    if mirror_map.forward_is_closed:
        x = [v.requires_grad_() for v in points(mirror_map)]
        gradient = torch.autograd.grad(mirror_map.potential(x), x)
        assert relative(mirror_map(x), gradient) < 1e-9
    x = points(mirror_map)
    z = [v.detach().requires_grad_() for v in mirror_map(x)]
    if mirror_map.inverse_is_closed and mirror_map.domain == "reals":
        gradient = torch.autograd.grad(mirror_map.conjugate(z), z)
        assert relative(mirror_map.inverse(z), gradient) < 1e-9
    # Fenchel's equality ties the two together.
    total = mirror_map.potential(x) + mirror_map.conjugate(z)
    assert total.item() == pytest.approx(dot(x, z).item(), rel=1e-9, abs=1e-9)


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


@pytest.mark.parametrize(("name", "options"), CASES)
def test_starts_near_the_identity_and_serves_vmap(name, options):
    params = [torch.zeros(3, 2, dtype=torch.float64)]
    mirror_map = maps.create(name, params, **options)
    z = torch.randn(5, 3, 2, dtype=torch.float64)
    if mirror_map.owns_tensors:
        assert relative(mirror_map.inverse([z[0]]), [z[0]]) < 1e-12
    direction = mirror_map.inverse if mirror_map.inverse_is_closed else mirror_map.forward
    if mirror_map.domain != "reals":
        z = torch.softmax(z, -1)
    batched = torch.func.vmap(lambda v: direction([v])[0])(z)
    single = torch.stack([direction([v])[0] for v in z])
    torch.testing.assert_close(batched, single)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_dict_round_trip(name, options):
    torch.manual_seed(7)
    saved = learned(name, options)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = maps.create(name, [torch.zeros(s, dtype=torch.float64) for s in SHAPES], **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = points(saved)
    for a, b in zip(saved.inverse(saved(x)), loaded.inverse(loaded(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_none_passes_through(name, options):
    mirror_map = learned(name, options)
    x = points(mirror_map)
    whole = mirror_map(x)
    x[1] = None
    z = mirror_map(x)
    assert z[1] is None
    assert torch.equal(z[0], whole[0])
    assert mirror_map.inverse(z)[1] is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        c
        for c in CASES
        if not maps.create(c.values[0], [torch.zeros(2, 2)], **c.values[1]).inverse_is_closed
    ],
)
def test_solved_inverse_reports_nonfinite_input(name, options):
    mirror_map = learned(name, options, shapes=((2, 3),))
    with pytest.raises(NewtonError) as caught:
        mirror_map.inverse([torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 3.0]]).double()])
    assert caught.value.status is Status.NONFINITE


@pytest.mark.parametrize("name", ["separable", "kronecker"])
def test_calibration_sets_the_scale(name):
    torch.manual_seed(8)
    params = [torch.zeros(4, 6, dtype=torch.float64)]
    mirror_map = maps.create(name, params)
    tiny = 1e-4 * torch.randn(4, 6, dtype=torch.float64)
    mirror_map.calibrate([[tiny], [2 * tiny]])
    with torch.no_grad():
        for key, p in mirror_map.named_parameters():
            if key.endswith(".p"):
                p.fill_(1.0)
    # At the calibrated scale the curve bends; far inside it is a straight line.
    bend = [(mirror_map.inverse([k * tiny])[0] / (k * tiny)).std().item() for k in (1.0, 1e-6)]
    assert bend[0] > 1e-2
    assert mirror_map.profiles()
    before = [p.clone() for p in mirror_map.state_dict().values()]
    mirror_map.calibrate([[torch.zeros_like(tiny)]])  # no signal: nothing to scale by
    for a, b in zip(before, mirror_map.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["separable", "kronecker"])
def test_calibration_on_half_precision_and_on_another_dtype(name):
    torch.manual_seed(8)
    tiny = (1e-5 * torch.randn(4, 6)).half()
    found = []
    for sample in (tiny, tiny.float()):  # whose squares half precision does not hold
        mirror_map = maps.create(name, [sample])
        mirror_map.calibrate([[sample]])
        found.append(list(mirror_map.state_dict().values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(InputError, match="convert the map"):
        mirror_map.calibrate([[tiny.double()]])


def test_kronecker_holds_a_sum_that_no_product_represents():
    torch.manual_seed(9)
    mirror_map = learned("kronecker", {"units": 0, "terms": 2}, shapes=((3, 3),))
    j = jacobian(mirror_map.inverse, torch.zeros(3, 3, dtype=torch.float64))
    # The rearrangement of a Kronecker product has rank one (Van Loan and Pitsianis 1993).
    rearranged = j.reshape(3, 3, 3, 3).permute(0, 2, 1, 3).reshape(9, 9)
    assert torch.linalg.svdvals(rearranged)[1] > 1e-3


def test_half_precision_parameters_get_float32_maps():
    for name, cls in maps.REGISTRY.items():
        if cls.owns_tensors:
            x = torch.linspace(-1, 1, 6, dtype=torch.bfloat16).reshape(3, 2)
            mirror_map = maps.create(name, [x])
            assert {p.dtype for p in mirror_map.parameters()} == {torch.float32}
            for way in (mirror_map.forward, mirror_map.inverse):
                torch.testing.assert_close(way([x])[0], way([x.float()])[0])


OWNERS = [name for name, cls in sorted(maps.REGISTRY.items()) if cls.owns_tensors]
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("call", ["check", "forward", "inverse"])
@pytest.mark.parametrize("name", OWNERS)
def test_tensors_whose_dtype_does_not_fit(name, call):
    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.full(shape, 0.5, dtype=dtype) for shape in ((3, 2), (2,))]

    served = {torch.float32: (torch.float32, *HALVES), torch.float64: (torch.float64,)}
    for built in (torch.float32, torch.float64, *HALVES):
        mirror_map = maps.create(name, tensors(built))
        wide = torch.promote_types(built, torch.float32)
        for dtype in (torch.float32, torch.float64, *HALVES):
            if dtype in served[wide]:
                getattr(mirror_map, call)(tensors(dtype))
                continue
            needed = torch.promote_types(dtype, torch.float32)
            with pytest.raises(InputError, match=rf"tensor 0 in {needed}.*\.to\({needed}\)"):
                getattr(mirror_map, call)(tensors(dtype))
            getattr(mirror_map.to(needed), call)(tensors(dtype))
            mirror_map.to(wide)
        # The second alone, so that the check looks at each.
        mixed = [
            tensors(built)[0],
            tensors(torch.float64 if wide == torch.float32 else HALVES[0])[1],
        ]
        with pytest.raises(InputError, match="tensor 1"):
            getattr(mirror_map, call)(mixed)
        with pytest.raises(InputError, match=r"own parameters are torch\.bfloat16"):
            getattr(mirror_map.bfloat16(), call)(tensors(torch.bfloat16))


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


def test_bounds_where_a_tensor_is_empty():
    for name in ("separable", "kronecker"):
        mirror_map = maps.create(name, [torch.zeros(0, 3), torch.zeros(2, 3)])
        assert mirror_map.strong_convexity() > 0
        assert torch.isfinite(mirror_map.smoothness())


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maps.create("nonsense", []), "choose one of"),
        (lambda: maps.create("pnorm", [], power=3), "power"),
        (lambda: maps.PNorm(1.0), "above 1"),
        (lambda: maps.PNorm("a"), "Invalid p='a'"),
        (lambda: maps.PNorm(1.5, eps=None), "Invalid eps=None"),
        (lambda: maps.Hypentropy("x"), "Invalid beta='x'"),
        (lambda: maps.NegativeEntropy("no"), "Invalid simplex='no': pass True or False"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], rho="a"), "Invalid rho='a'"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], eps=None), "Invalid eps=None"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], units=True), "Invalid units=True"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], sigma=["a"]), "Invalid sigma="),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], seed=1.5), "Invalid seed=1.5"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], seed=2**70), "Invalid seed="),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], terms=2, eps=0), "eps=0 with terms=2"),
        (lambda: maps.PNorm(2.0, eps=-1), "at least 0"),
        (lambda: maps.Hypentropy(0.0), "above 0"),
        (lambda: maps.KroneckerNeural([]), "no parameters"),
        (lambda: maps.KroneckerNeural([torch.zeros(2, dtype=torch.long)]), "int64"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], terms=0), "terms=0"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], eps=1.0), r"eps=1\.0"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], units=-1), "units=-1"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], rho=1.0), r"rho=1\.0"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], sigma="relu"), "algebraic"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], share="row"), "share='row'"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], parametrization="both"), "primal"),
        (lambda: maps.Diagonal([torch.zeros(2)]).check([torch.zeros(3)]), "shapes"),
        (lambda: maps.Diagonal([torch.zeros(2)])([torch.zeros(2)] * 2), "got 2"),
        (lambda: maps.NegativeEntropy().check([torch.ones(2)]), "sum to 1"),
        (lambda: maps.NegativeEntropy(simplex=False).check([-torch.ones(2)]), "positive"),
    ],
)
def test_bad_input_says_what_to_pass(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", [name for name, cls in maps.REGISTRY.items() if cls.owns_tensors])
def test_maps_of_empty_tensors_have_bounds(name):
    mirror_map = maps.create(name, [torch.zeros(0, 3), torch.zeros(0)])
    if mirror_map.is_dgf:
        assert 0 < mirror_map.strong_convexity() <= mirror_map.smoothness() < math.inf


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_forward_mode_is_right_or_refused(name, options, direction):
    torch.manual_seed(10)
    mirror_map = learned(name, options, shapes=((2, 3),))
    (x,) = points(mirror_map, ((2, 3),))
    function = getattr(mirror_map, direction)
    if direction == "inverse":
        x = mirror_map([x])[0].detach()
    v = torch.randn_like(x)
    h = 1e-6
    expected = (function([x + h * v])[0] - function([x - h * v])[0]) / (2 * h)
    for guard in (contextlib.nullcontext, torch.no_grad):
        with guard(), forward_ad.dual_level():
            try:
                z = function([forward_ad.make_dual(x, v)])[0]
            except NotImplementedError:
                continue
            tangent = forward_ad.unpack_dual(z).tangent
        assert relative([tangent], [expected.detach()]) < 1e-5


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


@pytest.mark.parametrize("terms", [1, 2])
def test_a_coupled_solve_over_all_of_float64(terms):
    torch.manual_seed(0)
    mirror_map = learned("kronecker", {"terms": terms}, shapes=((4, 3),))
    for scale in (1e-300, 1e-170, 1e-150, 1e150, 1e300):
        x = [scale * torch.randn(4, 3, dtype=torch.float64)]
        torch.testing.assert_close(mirror_map.inverse(mirror_map(x))[0], x[0], rtol=1e-10, atol=0)


def test_pnorm_on_the_meta_device():
    x = torch.randn(3, device="meta")
    assert maps.PNorm(3.0, eps=0.5).inverse([x])[0].shape == (3,)


@pytest.mark.parametrize("name", ["separable", "kronecker"])
def test_calibration_takes_displacements_of_the_tensors(name):
    mirror_map = maps.create(name, [torch.zeros(3, 2), torch.zeros(2)])
    for wrong in ([torch.ones(2, 3), None], [torch.tensor(1.0), None]):
        with pytest.raises(InputError, match=r"displacement of tensor 0 has shape .* \(3, 2\)"):
            mirror_map.calibrate([wrong])
    with pytest.raises(InputError, match="built for 2 tensors and got 1"):
        mirror_map.calibrate([[torch.ones(3, 2)]])


@pytest.mark.parametrize(
    ("mirror_map", "mu", "ell"),
    [
        (maps.Euclidean(), 1, 1),
        (maps.PNorm(2.0), 1, 1),
        (maps.PNorm(2.0, eps=0.5), 1.5, 1.5),
        (maps.PNorm(3.0, eps=0.5), 0.5, math.inf),
        (maps.PNorm(1.5), 0, math.inf),
        (maps.Hypentropy(0.1), 0, 10),
        (maps.NegativeEntropy(), 1, math.inf),
        (maps.NegativeEntropy(simplex=False), 0, math.inf),
    ],
    ids=str,
)
def test_constants_of_closed_maps(mirror_map, mu, ell):
    assert mirror_map.strong_convexity().item() == pytest.approx(mu)
    assert mirror_map.smoothness().item() == pytest.approx(ell)


@pytest.mark.parametrize(
    ("name", "options"), [c for c in DGF_CASES if maps.REGISTRY[c.values[0]].owns_tensors]
)
def test_bounds_of_learned_maps_are_near_what_there_is(name, options):
    torch.manual_seed(12)
    shape = (3, 2)
    mirror_map = learned(name, options, shapes=(shape,))
    low, high = math.inf, 0.0
    for scale in (0.0, 0.1, 1.0, 10.0):
        for _ in range(5):
            x = scale * torch.randn(shape, dtype=torch.float64)
            if mirror_map.forward_is_closed:
                jacobian = torch.autograd.functional.jacobian(lambda x: mirror_map([x])[0], x)
            else:
                jacobian = torch.autograd.functional.jacobian(
                    lambda z: mirror_map.inverse([z])[0], x
                )
            values = torch.linalg.eigvalsh(jacobian.reshape(6, 6))
            if not mirror_map.forward_is_closed:
                values = 1 / values
            low, high = min(low, values.min().item()), max(high, values.max().item())
    # Over a tensor with a rotation the bounds of the factors are multiplied.
    assert low / 6 <= mirror_map.strong_convexity().item() <= low * (1 + 1e-9)
    assert high * (1 - 1e-9) <= mirror_map.smoothness().item() <= 6 * high
