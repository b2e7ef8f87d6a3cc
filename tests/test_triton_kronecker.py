"""The Triton kernel of the rotated separable map against float64, and within KroneckerNeural."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICES, DTYPES, assert_close, make_units

from mirror_opt import MirrorDescent, maps, use_backend
from mirror_opt.backends import plain
from mirror_opt.errors import InputError
from mirror_opt.maps.modes import fused_mode
from mirror_opt.reference import Units, psi_bracket

pytest.importorskip("triton")

from mirror_opt.kernels import kronecker

# left, n, columns (w if left, else h), channels, members, P, T, K: every size of a tile and its
# edges; channels of a tile, of its columns, of the entries of a line; shared coefficients.
CASES = (
    (True, 1, 1, 1, 1, 1, 1, 1),
    (True, 1, 7, 1, 1, 1, 3, 0),
    (True, 3, 7, 3, 2, 2, 1, 2),
    (True, 9, 1025, 9, 1, 1, 1, 1),
    (True, 31, 65, 31, 3, 3, 1, 2),
    (True, 33, 7, 1, 4, 2, 3, 2),
    (True, 33, 33, 11, 1, 1, 1, 2),  # three entries of a line share a channel
    (True, 128, 17, 128, 1, 1, 3, 1),
    (False, 1, 7, 7, 1, 1, 1, 2),
    (False, 3, 1, 1, 2, 1, 3, 0),
    (False, 9, 1025, 1, 1, 1, 1, 1),
    (False, 9, 130, 2, 4, 2, 1, 2),  # tiles end within a channel
    (False, 9, 60, 20, 2, 2, 3, 2),  # three columns of each channel
    (False, 31, 65, 65, 1, 1, 1, 9),  # more units than are kept in registers
    (False, 33, 48, 3, 2, 2, 1, 2),
    (False, 64, 40, 1, 1, 1, 1, 0),
    (False, 128, 33, 33, 2, 1, 1, 1),
)


class Case:
    """Operands on a device, and the formula in float64."""

    def __init__(self, case, device="cpu", dtype=torch.float32, seed=0):
        self.left, n, columns, channels, members, period, terms, count = case
        h, w = (n, columns) if self.left else (columns, n)
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.u = (2 * normal(members, h, w)).to(device, dtype)
        self.factor = (normal(period, terms, n, n) / n**0.5).to(device)
        self.gain = (torch.rand(period, terms, h, w, generator=generator) + 0.5).to(device)
        units = make_units(count, period * terms * channels, generator)
        self.units = Units(*(x.reshape(count, period, terms, channels).to(device) for x in units))
        self.eps = 0.1

    def run(self) -> Tensor:
        return kronecker.rotated(self.u, self.factor, self.gain, *self.units, self.eps, self.left)

    def expected(self) -> Tensor:
        wide = (x.double() for x in (self.u, self.factor, self.gain, *self.units))
        return plain.rotated(*wide, self.eps, self.left, "algebraic")

    def scale(self) -> Tensor:
        """What the terms of the sums add up to without their signs: ``(members, h, w)``."""
        factor = self.factor.double().abs()
        u = self.u.double().abs().unflatten(0, (-1, len(factor))).unsqueeze(2)
        v = factor @ u if self.left else u @ factor.mT
        spans = psi_bracket(self.units).double() if len(self.units.w) else torch.zeros(())
        y = self.gain.double() * (2 * v + spans.amax())
        y = factor.mT @ y if self.left else y @ factor
        return (y.sum(2) + self.eps * u.squeeze(2)).reshape(self.u.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_against_the_composition(case, dtype, device):
    case = Case(case, device, dtype)
    out = case.run()
    assert out.dtype == dtype
    assert_close(out, case.expected(), case.scale())


@pytest.mark.parametrize("device", DEVICES)
def test_lines_are_of_the_member_and_not_of_its_neighbours(device):
    case = Case((False, 9, 130, 2, 4, 2, 1, 2), device)
    clean = case.run()
    case.u[1, 17, 3] = torch.nan
    case.u[2, 129, 0] = torch.inf
    out = case.run()
    bad = (out != clean).nonzero()[:, :2].unique(dim=0).tolist()
    assert bad == [[1, 17], [2, 129]]
    assert torch.equal(out.isfinite().all(2), torch.isfinite(case.u).all(2))


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e6, 1e30])
@pytest.mark.parametrize("steepness", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("device", DEVICES)
def test_extreme_coefficients_and_values(scale, steepness, device):
    case = Case((True, 9, 40, 9, 1, 1, 1, 2), device)
    # A rotation of coordinates that rounds nothing, since steep units magnify what M u rounds.
    case.factor = torch.eye(9, device=device).roll(1, 0).reshape(1, 1, 9, 9).contiguous()
    case.u *= scale
    w, s, _ = case.units
    case.units = Units(w * s / steepness / s.amax(), torch.full_like(s, steepness), 0 * s)
    out = case.run()
    assert bool(out.isfinite().all())
    assert_close(out, case.expected(), case.scale())


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again(device):
    case = Case((True, 33, 33, 33, 2, 1, 3, 2), device)
    assert torch.equal(case.run(), case.run())


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_operands_are_refused(device):
    case = Case((True, 3, 6, 3, 4, 2, 1, 2), device)
    case.factor = case.factor.mT
    with pytest.raises(InputError, match=r"Invalid factor .* strides"):
        case.run()
    case = Case((True, 3, 6, 3, 4, 2, 1, 2), device)
    case.u = case.u[:3]
    with pytest.raises(InputError, match="divide 3 and 3"):
        case.run()
    case = Case((True, 3, 6, 3, 4, 2, 1, 2), device)
    case.gain = case.gain.double()
    with pytest.raises(InputError, match=r"Invalid gain of .* dtype torch\.float64"):
        case.run()
    with pytest.raises(InputError, match="129 entries: pass at most 128"):
        Case((True, 129, 1, 1, 1, 1, 1, 0), device).run()


# The map itself.

SHAPES = ((6, 1), (1, 7), (5, 4), (4, 3, 3, 3), (8, 1, 2, 2), (3, 5, 1, 1), (7,), (), (2, 0))


def learned(shapes, device, **options) -> maps.KroneckerNeural:
    """Two tensors of each shape, every parameter moved."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.zeros(shape, device=device) for shape in shapes for _ in range(2)]
    kronecker_map = maps.KroneckerNeural(params, **options)
    with torch.no_grad():
        for p in kronecker_map.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator).to(device)
    return kronecker_map


def points(shapes, device, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in shapes
        for _ in range(2)
    ]


class Passes(TorchDispatchMode):
    """Counts what is computed from tensors, but not views nor copies of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.count += name in ("bmm", "add", "sum", "separable_forward", "separable_rotated")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"terms": 3}, {"eps": 0.0}, {"units": 0, "terms": 2}])
@pytest.mark.parametrize("device", DEVICES)
def test_the_map_with_the_kernel_is_the_map_without(options, device):
    kronecker_map, zs = learned(SHAPES, device, **options), points(SHAPES, device)
    with use_backend("triton"), torch.no_grad():
        fused = kronecker_map.inverse(zs)
    with use_backend("torch"), torch.no_grad():
        expected = kronecker_map.double().inverse([z.double() for z in zs])
    for got, wanted in zip(fused, expected, strict=True):
        assert (got.dtype, got.shape) == (torch.float32, wanted.shape)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "separate", "fused"),
    [((6, 1), 6, 1), ((1, 7), 6, 1), ((5, 4), 6, 4), ((4, 1, 3, 3), 8, 4), ((4, 3, 3, 3), 8, 6)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_passes_over_a_tensor(shape, separate, fused, device):
    for terms in (1, 3):
        kronecker_map, zs = learned([shape], device, terms=terms), points([shape], device)
        coefficients = kronecker_map.coefficients()
        counts = []
        for backend in ("torch", "triton"):
            with use_backend(backend), torch.no_grad(), Passes() as passes:
                kronecker_map.inverse(zs, coefficients)
            counts.append(passes.count)
        # psi in plain PyTorch is more than one operation, and the sum is one for all terms.
        assert counts[1] == fused + (terms > 1 and fused > 1)
        assert counts[0] >= separate + (terms > 1)


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ((5, 4), 1), ((4, 5), 0), ((4, 4), 1), ((64, 64, 9), 2), ((64, 3, 9), 2), ((8, 1, 9), 0),
        ((64, 3, 1), 1), ((1, 1), None), ((768, 3072), None), ((129, 2, 200), None),
        ((128, 500), 0),
    ],
)  # fmt: skip
def test_the_mode_that_is_fused(sizes, mode):
    assert fused_mode(sizes) == mode


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_the_map(terms, device):
    shapes = ((6, 1), (4, 3, 2, 1))

    def gradients(kronecker_map, zs):
        zs = [z.requires_grad_() for z in zs]
        leaves = [*zs, *kronecker_map.parameters()]
        loss = sum(x.square().sum() for x in kronecker_map.inverse(zs))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    kronecker_map = learned(shapes, device, terms=terms)
    with use_backend("triton"):
        fused = gradients(kronecker_map, points(shapes, device))
    with use_backend("torch"):
        expected = gradients(kronecker_map.double(), points(shapes, device, torch.float64))
    for got, wanted in zip(fused, expected, strict=True):
        tolerance = 1e-4 * max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_of_torch_func(device):
    shapes = ((5, 4), (1, 3))
    kronecker_map = learned(shapes, device)
    tasks = [torch.stack([z, -2 * z, 0.5 * z]) for z in points(shapes, device)]

    def run(tasks):
        # Coefficients of all tasks, and gradients of each.
        coefficients = kronecker_map.coefficients()

        def loss(zs):
            return sum(x.square().sum() for x in kronecker_map.inverse(zs, coefficients))

        return torch.func.vmap(torch.func.grad(loss))(tasks)

    with use_backend("triton"):
        fused = run(tasks)
    with use_backend("torch"):
        expected = run(tasks)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_mirror_descent_takes_the_kernel(monkeypatch, device):
    calls = []
    original = kronecker.rotated
    monkeypatch.setattr(kronecker, "rotated", lambda *a: calls.append(a) or original(*a))
    shapes = ((4, 3), (3,))
    results = []
    for backend in ("triton", "torch"):
        params = [p.requires_grad_() for p in points(shapes, device)]
        optimizer = MirrorDescent(params, lr=0.1, mirror_map=learned(shapes, device))
        for p in params:
            p.grad = torch.ones_like(p)
        with use_backend(backend):
            optimizer.step()
        results.append([p.detach() for p in params])
    assert len(calls) == 1  # of both matrices
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_where_the_kernel_does_not_serve_nothing_changes(monkeypatch, device):
    monkeypatch.setattr(kronecker, "rotated", None)
    kronecker_map, zs = learned(((5, 4),), device, sigma="tanh"), points(((5, 4),), device)
    expected = kronecker_map.inverse(zs)
    with use_backend("triton"), pytest.raises(InputError, match="sigma='algebraic' only"):
        kronecker_map.inverse(zs)
    with use_backend("torch"):
        assert all(map(torch.equal, kronecker_map.inverse(zs), expected))
