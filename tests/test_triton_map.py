"""The Triton kernels of the separable map against the formulas in float64."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICES, DTYPES, assert_close, make_units, rounding

from mirror_opt import reference
from mirror_opt.backends import plain
from mirror_opt.errors import InputError
from mirror_opt.newton import Status
from mirror_opt.reference import Units

pytest.importorskip("triton")

from mirror_opt.kernels import device as device_functions
from mirror_opt.kernels import separable

# rows, n, columns, gain_rows, K: every tile shape and its edges, rows that share what they may.
SHAPES = (
    (1, 0, 1, 1, 2),
    (1, 1, 1, 1, 0),
    (35, 1, 35, 35, 2),
    (6, 3, 2, 6, 2),
    (3, 7, 3, 1, 1),
    (4, 33, 1, 4, 2),
    (2, 1023, 2, 2, 1),
    (1, 1025, 1, 1, 2),
    (2, 2049, 1, 1, 1),  # more than one program for a row
    (2, 65, 1, 2, 9),  # more units than are kept in registers
)
pytestmark = pytest.mark.parametrize("device", DEVICES)


class Case:
    """Operands on a device, and in float64 as the plain formulas take them."""

    def __init__(self, shape, device, dtype=torch.float32, seed=0):
        rows, n, columns, gain_rows, count = shape
        generator = torch.Generator().manual_seed(seed)
        self.x = (torch.randn(rows, n, generator=generator) * 2).to(device, dtype)
        self.g = torch.randn(rows, n, generator=generator).to(device, dtype)
        self.gain = (torch.rand(gain_rows, n, generator=generator) + 0.5).to(device)
        self.units = Units(*(x.to(device) for x in make_units(count, columns, generator)))
        self.use_units(self.units)

    def use_units(self, units: Units) -> None:
        rows, columns = len(self.x), units.w.shape[1]
        self.units = units
        self.wide = Units(*(x.double().repeat(1, rows // columns).unsqueeze(2) for x in units))
        self.wide_gain = self.gain.double().repeat(rows // len(self.gain), 1)
        self.span = self.wide_gain * reference.psi_bracket(self.wide)

    def psi(self, x: Tensor) -> Tensor:
        return plain.forward(x.double(), self.wide_gain, *self.wide, "algebraic")

    def assert_solves(self, y: Tensor, target: Tensor) -> None:
        """S(y) = target up to rounding of y, and of the arithmetic."""
        slope = self.wide_gain * reference.psi_slope(y.double(), self.wide)
        allowed = 2e-6 * (target.abs() + self.span) + 1.1 * slope * rounding(y)
        assert bool(((self.psi(y) - target).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_inverse_and_step(shape, dtype, device):
    case = Case(shape, device, dtype)
    out = separable.forward(case.x, case.gain, *case.units)
    assert out.dtype == dtype
    assert_close(out, case.psi(case.x), case.span)

    y, status = separable.inverse(case.x, case.gain, *case.units)
    assert (y.dtype, int(status)) == (dtype, Status.CONVERGED)
    case.assert_solves(y, case.x.double())

    lr = torch.tensor(0.3, device=device)
    y, status = separable.step(case.x, case.g, lr, case.gain, *case.units)
    assert (y.dtype, int(status)) == (dtype, Status.CONVERGED)
    case.assert_solves(y, case.psi(case.x) - lr.double() * case.g.double())


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, inverted, device):
    case = Case(shape, device)
    result = separable.backward(case.g, case.x, case.gain, *case.units, inverted)
    grad_u, grad_gain, *sums = plain.backward(
        case.g.double(), case.x.double(), case.wide_gain, *case.wide, "algebraic", inverted
    )
    assert_close(result[0], grad_u, grad_u.abs().mean())
    assert_close(result[1], grad_gain, grad_gain.abs().mean())
    for got, wanted, theta in zip(result[2:], sums, case.units, strict=True):
        wanted = wanted.unflatten(1, (-1, theta.shape[1])).sum((1, 3))
        # Terms of either sign: the sum is no more accurate than its largest partial sums.
        assert_close(got, wanted, case.x.numel() ** 0.5 * case.wide.w.abs().sum() + 1)


EXTREMES = {
    "flat": Units([[0.0], [0.0]], [[1.0], [2.0]], [[0.0], [1.0]]),
    "steep": Units([[1.0], [-1e-7]], [[1e6], [1e6]], [[0.0], [0.5]]),
    "far": Units([[1.0], [0.5]], [[1.0], [0.9]], [[1e6], [-1e6]]),
    "far and steep": Units([[2.0], [3.0]], [[1e4], [1e-4]], [[1e5], [-1e5]]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_coefficients_and_values(name, device):
    case = Case((1, 12, 1, 1, 0), device)
    values = [0.0, 1e-42, -1e-38, 1e-30, -1e-6, 1.0, -1.0, 0.5, 1e3, -1e5, 1e6, -1e6]
    case.x = torch.tensor([values], device=device)
    case.gain = torch.ones(1, 1, device=device).expand(1, 12).contiguous()
    case.use_units(Units(*(torch.tensor(x, device=device) for x in EXTREMES[name])))
    out = separable.forward(case.x, case.gain, *case.units)
    # Rounding s (u - c) shifts u by as much as rounding u and c does.
    slope = reference.psi_slope(case.x.double(), case.wide)
    shift = 2**-24 * (case.x.double().abs() + case.units.c.abs().max())
    assert_close(out, case.psi(case.x), case.span + 1e6 * slope * shift)
    assert float(out[0, 0]) == 0
    for scale in (0.0, 1e-30, 1.0, 1e30):
        g = scale * torch.linspace(-1, 1, 12, device=device).unsqueeze(0)
        lr = torch.tensor(0.1, device=device)
        y, status = separable.step(case.x, g, lr, case.gain, *case.units)
        assert int(status) == Status.CONVERGED
        target = case.psi(case.x) - 0.1 * g.double()
        low, high = (case.psi(y.double() + k * 4 * shift - k * 4e-7 * y.abs()) for k in (-1, 1))
        slack = 2e-6 * (target.abs() + case.span)
        assert bool(((target >= low - slack) & (target <= high + slack)).all())


def test_nonfinite_values_are_nan_and_reported(device):
    case = Case((2, 300, 2, 2, 2), device)
    lr = torch.tensor(0.1, device=device)
    clean, _ = separable.step(case.x, case.g, lr, case.gain, *case.units)
    bad = {(0, 0): torch.nan, (0, 299): torch.inf, (1, 17): -torch.inf}
    for at, value in bad.items():
        case.g[at] = value
    y, status = separable.step(case.x, case.g, lr, case.gain, *case.units)
    assert int(status) == Status.NONFINITE
    assert {tuple(at) for at in y.isnan().nonzero().tolist()} == set(bad)
    assert bool((y == clean)[~y.isnan()].all())
    y, status = separable.inverse(case.g, case.gain, *case.units)
    assert int(status) == Status.NONFINITE
    assert {tuple(at) for at in y.isnan().nonzero().tolist()} == set(bad)


def test_same_bits_again(device):
    case = Case((4, 300, 2, 4, 2), device)
    for run in (
        lambda: separable.backward(case.g, case.x, case.gain, *case.units, False),
        lambda: separable.inverse(case.x, case.gain, *case.units),
    ):
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


def test_wrong_operands_are_refused(device):
    case = Case((4, 6, 2, 4, 2), device)
    with pytest.raises(InputError, match="Invalid s of shape"):
        separable.forward(case.x, case.gain, case.units.w, case.units.s[:1], case.units.c)
    with pytest.raises(InputError, match=r"Invalid gain .* strides"):
        separable.forward(case.x, case.gain.t().contiguous().t(), *case.units)
    with pytest.raises(InputError, match="divides 4"):
        separable.forward(case.x, case.gain[:3], *case.units)
    with pytest.raises(InputError, match="Invalid g of shape"):
        separable.step(case.x, case.g[:2], torch.tensor(0.1), case.gain, *case.units)
    strided, lr = case.x.t().contiguous().t(), torch.tensor(0.1, device=device)
    with pytest.raises(InputError, match=r"Invalid x .* strides"):
        separable.step(strided, case.g, lr, case.gain, *case.units)
    with pytest.raises(InputError, match=r"Invalid at .* strides"):
        separable.backward(case.g, strided, case.gain, *case.units, False)
    with pytest.raises(InputError, match=r"Invalid x .* torch.float64"):
        separable.inverse(case.x.double(), case.gain, *case.units)
    with pytest.raises(InputError, match="Invalid w on meta: pass tensors on"):
        separable.forward(case.x, case.gain, case.units.w.to("meta"), *case.units[1:])


def test_a_result_that_its_dtype_does_not_hold_is_nan_and_the_status_tells(device):
    x = torch.full((1, 4), 6e4, dtype=torch.float16, device=device)
    g = torch.tensor([[-6e4, 1.0, -6e4, 1.0]], dtype=torch.float16, device=device)
    one, none = torch.ones(1, 4, device=device), torch.ones(0, 1, device=device)
    y, status = separable.step(x, g, torch.ones((), device=device), one, none, none, none)
    assert y.isnan().tolist() == [[True, False, True, False]]
    assert status.item() == Status.NONFINITE


@pytest.fixture
def evaluations(device, monkeypatch):
    """Counts the evaluations of psi by the interpreter: of its value, and with its slope."""
    if device == "cuda":
        pytest.skip("compiled code does not count")
    counts = {"psi": 0, "psi_and_slope": 0}

    def counted(name):
        original = getattr(device_functions, name)

        def run(*args):
            counts[name] += 1
            return original(*args)

        return run

    for name in counts:
        run = counted(name)
        monkeypatch.setattr(device_functions, name, run)
        monkeypatch.setattr(separable, name, run)
    return counts


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(1e-4, (0, 1)), (1e-2, (1, 1))],
    ids=["the first order is exact enough", "one more value"],
)
def test_a_tile_stops_when_it_has_converged(lr, expected, device, evaluations):
    case = Case((1, 256, 1, 1, 2), device)
    separable.step(case.x, case.g, torch.tensor(lr), case.gain, *case.units)
    assert tuple(evaluations.values()) == expected


def test_an_iteration_limit_is_reported(device, monkeypatch):
    if device == "cuda":
        pytest.skip("compiled code has its limit built in")
    case = Case((1, 4, 1, 1, 2), device)
    case.x[0] = torch.tensor([0.0, 0.0, 0.0, 3.0])
    case.use_units(Units(*(torch.tensor(x) for x in EXTREMES["steep"])))
    limit = device_functions._MAX_ITERATIONS
    monkeypatch.setattr(device_functions, "_MAX_ITERATIONS", type(limit)(2))
    y, status = separable.inverse(case.x + 0.25, case.gain, *case.units)
    assert int(status) == Status.MAX_ITERATIONS
    assert bool(y.isnan().any())


def test_gradients_at_zero_are_zero_exactly(device):
    # An outer Adam makes steps of full size of what is noise.
    case = Case((2, 64, 2, 2, 3), device)
    x = torch.zeros_like(case.x)
    _, gain, *units = separable.backward(case.g, x, case.gain, *case.units, False)
    assert not gain.any()
    assert not units[0].any()  # psi(0) = 0 for every w, s and c
    assert not units[1].any()
    assert not units[2].any()


def test_indices_beyond_32_bits_are_refused(device):
    x = torch.empty(2**31, 0, device=device)
    gain, unit = torch.empty(1, 0, device=device), torch.empty(1, 1, device=device)
    with pytest.raises(InputError, match=r"2147483648 rows .* use_backend\('torch'\)"):
        separable.forward(x, gain, unit, unit, unit)
