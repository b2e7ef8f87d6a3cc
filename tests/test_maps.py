"""Every property of a mirror map, over all registered maps and all their variants.

A new map is tested by being registered.
"""

import contextlib
import inspect
import io
import itertools
import math

import pytest
import torch
from maps_cases import CASES, DGF_CASES, OWNERS, SHAPES, jacobian, learned, points, relative
from torch import Tensor
from torch.autograd import forward_ad

from mirror_opt import maps, use_backend
from mirror_opt.maps.base import dot


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


def test_kronecker_holds_a_sum_that_no_product_represents():
    torch.manual_seed(9)
    mirror_map = learned("kronecker", {"units": 0, "terms": 2}, shapes=((3, 3),))
    j = jacobian(mirror_map.inverse, torch.zeros(3, 3, dtype=torch.float64))
    # The rearrangement of a Kronecker product has rank one (Van Loan and Pitsianis 1993).
    rearranged = j.reshape(3, 3, 3, 3).permute(0, 2, 1, 3).reshape(9, 9)
    assert torch.linalg.svdvals(rearranged)[1] > 1e-3


@pytest.mark.parametrize("shapes", [((0, 3), (0,)), ((0, 3), (2, 3))], ids=str)
@pytest.mark.parametrize("name", OWNERS)
def test_maps_of_empty_tensors_have_bounds(name, shapes):
    mirror_map = maps.create(name, [torch.zeros(shape) for shape in shapes])
    if mirror_map.is_dgf:
        assert 0 < mirror_map.strong_convexity() <= mirror_map.smoothness() < math.inf


# torch's own forward mode is scripted when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_forward_mode(name, options, direction):
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
            z = function([forward_ad.make_dual(x, v)])[0]
            tangent = forward_ad.unpack_dual(z).tangent
        assert relative([tangent], [expected.detach()]) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c.values[0] in OWNERS])
def test_forward_mode_to_second_order(name, options, direction, backend):
    """In the point and in the map's parameters, each mode through the other."""
    torch.manual_seed(13)
    mirror_map = learned(name, options, shapes=((3, 2),))
    named = {k: p.detach() for k, p in mirror_map.named_parameters()}
    along = {k: torch.randn_like(p) for k, p in named.items()}
    x, v = (torch.randn(3, 2, dtype=torch.float64) for _ in range(2))

    def value(t):
        moved = {k: p + t * along[k] for k, p in named.items()}
        with torch.nn.utils.stateless._reparametrize_module(mirror_map, moved):
            return (getattr(mirror_map, direction)([x + t * v])[0] * x.cos()).sum()

    def forward_mode(function):
        return lambda t: torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]

    at, reverse_mode = torch.zeros((), dtype=torch.float64), torch.func.grad
    with use_backend(backend):
        slope, bend = reverse_mode(value)(at), reverse_mode(reverse_mode(value))(at)
        torch.testing.assert_close(forward_mode(value)(at), slope, rtol=1e-7, atol=1e-9)
        for outer, inner in itertools.product((reverse_mode, forward_mode), repeat=2):
            try:
                found = outer(inner(value))(at)
            except NotImplementedError:
                assert outer is inner is forward_mode
                assert name == "kronecker"
                assert not mirror_map.elementwise  # a coupled solve
            else:
                torch.testing.assert_close(found, bend, rtol=1e-6, atol=1e-8)



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
    # Over a tensor with a rotation the bounds of the factors are multiplied, and those of terms,
    # which are reached in different directions, added.
    slack = 6 * options.get("terms", 1)
    assert low / slack <= mirror_map.strong_convexity().item() <= low * (1 + 1e-9)
    assert high * (1 - 1e-9) <= mirror_map.smoothness().item() <= slack * high
