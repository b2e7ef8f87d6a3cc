"""The elementwise operators against the float64 reference: values, on every implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    DTYPES,
    assert_close,
    conditioning,
    each_implementation,  # noqa: F401
    formula,
    implementation,
    operands,
    random_units,
    reference_value,
)

from mirror_opt import reference
from mirror_opt.newton import NewtonError, Status
from mirror_opt.ops import separable_forward, separable_inverse, separable_step
from mirror_opt.reference import Units

pytestmark = pytest.mark.usefixtures("each_implementation")

# Shapes of u, gain and units: one row of each odd length, rows of channels, coefficients for each
# element, 0-dim, batches that share coefficients, and broadcasting of every kind.
SHAPES = {
    **{f"n={n}": ((n,), (n,), (1,)) for n in (0, 1, 7, 16, 33, 1023, 1025)},
    "scalar": ((), (), ()),
    "channels": ((5, 3, 3), (5, 3, 3), (5, 1, 1)),
    "long channels": ((2, 1023), (2, 1023), (2, 1)),
    "vector": ((37,), (37,), (37,)),
    "terms": ((2, 3, 4, 9), (2, 3, 4, 9), (2, 3, 1, 1)),
    "tasks": ((4, 3, 5), (1, 3, 5), (1, 3, 1)),
    "tasks of vectors": ((4, 37), (1, 37), (1, 37)),
    "tasks of their own": ((4, 3, 5), (4, 3, 5), (4, 3, 1)),
    "no channels": ((0, 4), (0, 4), (0, 1)),
    "one gain": ((3, 4), (1, 1), (3, 1)),
    "gain of a row": ((3, 4), (4,), (3, 1)),
    "units along the last": ((3, 4), (3, 4), (1, 4)),
    "units in the middle": ((2, 3, 4), (2, 1, 4), (1, 3, 1)),
    "small u": ((1,), (3, 4), (3, 1)),
}


def cast(args, dtype):
    return [x.to(dtype) for x in args]


def split(args):
    u, gain, *units = args
    return u, gain, Units(*units)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_value_inverse_and_step(shapes, dtype):
    args = operands(*shapes)
    u, gain, units = split(cast(args, dtype))
    exact = [x.double() for x in (u, gain, *units)]
    value = reference_value(*exact)
    assert_close(separable_forward(u, gain, units), value)
    full = exact[0].expand(value.shape)
    back = separable_inverse(value.to(dtype), gain, units)
    assert_close(back, full, scale=conditioning(full, *exact[1:]))
    g = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for primal in (True, False):
        y = separable_step(u, g.to(dtype), 0.3, gain, units, primal=primal)
        # The residual of the float64 equations, at the result.
        if primal:
            expected = value - 0.3 * g
            y = reference_value(y.double(), *exact[1:]).to(dtype)
            scale = conditioning(full, *exact[1:]) * 2
        else:
            with implementation("torch"):
                z = separable_inverse(full, exact[1], Units(*exact[2:]))
            expected = reference_value(z - 0.3 * g, *exact[1:])
            scale = 2 * conditioning(z, *exact[1:])
        assert_close(y, expected, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverted", [False, True])
def test_gradients(dtype, inverted):
    for name, shapes in SHAPES.items():
        args = operands(*shapes)
        u, gain, *_ = args
        dims = u.dim()
        if name == "small u" or gain.dim() != dims:
            continue  # the operator itself takes aligned operands
        grad = torch.randn(u.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        inputs = cast((grad, *args), dtype)
        results = torch.ops.mirror_opt.separable_backward(*inputs, "algebraic", inverted)
        exact = cast(inputs, torch.float64)
        sums = formula(*(x.abs() if i == 0 else x for i, x in enumerate(exact)), inverted)
        for result, expected, size in zip(results, formula(*exact, inverted), sums, strict=True):
            # Sums over a channel cancel: what is rounded is the sum of their sizes.
            assert_close(result, expected, scale=1.0 + 3 * size.abs() + 3 * grad.abs().sum())


@pytest.mark.parametrize("count", [0, 1, 8, 17, 64])
def test_numbers_of_units(count):
    u, gain, *units = operands((3, 50), (3, 50), (3, 1), count=count)
    value = separable_forward(u, gain, Units(*units))
    assert_close(value, reference_value(u, gain, *units))
    assert_close(
        separable_inverse(value, gain, Units(*units)), u, scale=conditioning(u, gain, *units)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_memory(dtype):
    u, gain, units = split(cast(operands((4, 6, 5, 3), (4, 6, 5, 3), (4, 1, 1, 1)), dtype))
    expected = separable_forward(u, gain, units)
    layouts = {
        "channels last": u.to(memory_format=torch.channels_last),
        "transposed": u.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "every second": torch.stack([u, u], -1)[..., 0],
    }
    for x in layouts.values():
        assert not x.is_contiguous()
        assert torch.equal(separable_forward(x, gain, units), expected)
        assert torch.equal(separable_forward(u, x.abs() + 1, units),
                           separable_forward(u, u.abs() + 1, units))
        assert torch.equal(separable_step(x, x, 0.1, gain, units),
                           separable_step(u, u, 0.1, gain, units))
    row = u[:1].expand(4, -1, -1, -1)
    assert torch.equal(separable_forward(row, gain, units)[3],
                       separable_forward(row.contiguous(), gain, units)[3])


EXTREMES = {
    "linear": (0.0, 1.0, 0.0),
    "steep": (0.9e-8, 1e8, 0.3),
    "steep beyond the square's range": (0.5e-25, 1e25, -1.0),
    "falling steeply": (-0.9e-4, 1e4, 0.5),
    "flat": (0.9e6, 1e-6, 0.0),
    "far": (0.5, 1.0, 1e6),
    "far and steep": (0.9e-3, 1e3, -1e6),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_coefficients(extreme, dtype):
    near = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-3, 1e6, -1e6, 1e-40, 0.0])])
    u = torch.cat([near, extreme[2] + near]).to(dtype)
    units = Units(*(torch.tensor([[x]], dtype=dtype) for x in extreme))
    gain = torch.full_like(u, 2.0)
    exact = Units(*(x.double() for x in units))
    value = separable_forward(u, gain, units)
    expected = 2 * reference.psi(u.double(), exact)
    # Rounding u by a unit in its last place moves psi this much more.
    scale = 2 * reference.psi_bracket(exact) + u.double().abs() + abs(extreme[2])
    assert_close(value, expected, scale=scale)
    back = separable_inverse(value, gain, units)
    residual = 2 * reference.psi(back.double(), exact)
    steepest = reference.psi_slope_bounds(exact)[1]
    assert_close(residual.to(dtype), value.double(), scale=steepest * scale)


@pytest.mark.parametrize(("w", "s"), [(1e10, 1e10), (1e5, 1e15), (1.0, 1e20), (1e12, 1e8)])
def test_slopes_whose_square_leaves_the_range(w, s):
    units = Units(*(torch.tensor([[x]]) for x in (w, s, 0.0)))
    t = w * torch.tensor([0.1, 0.5, -0.7, 0.9])
    y = separable_inverse(t, torch.ones(4), units)
    residual = reference.psi(y.double(), Units(*(x.double() for x in units))) - t.double()
    assert residual.abs().max() <= 1e-5 * w


def test_a_gain_for_a_whole_tensor():
    for gain, units in (((1,), (1,)), ((3, 1), (3, 1)), ((1, 1), (3, 1))):
        shape = (40,) if len(gain) == 1 else (3, 40)
        u, e, *coefficients = operands(shape, gain, units)
        expected = reference_value(u, e, *coefficients)
        assert_close(separable_forward(u, e, Units(*coefficients)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_origin_is_kept_to_the_bit(dtype):
    units = Units(*(x.to(dtype) for x in random_units(5, 9, 1)))
    gain = torch.full((9, 33), 3.0, dtype=dtype)
    zero = torch.zeros(9, 33, dtype=dtype)
    assert (separable_forward(zero, gain, units) == 0).all()
    assert (separable_inverse(zero, gain, units) == 0).all()
    # Neither do the coefficients get a gradient there, which an optimizer that divides by its size
    # would turn into a step.
    args = (gain, zero, gain, *units, "algebraic", False)
    assert all((g == 0).all() for g in torch.ops.mirror_opt.separable_backward(*args)[2:])


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e3, 1e6, 1e30])
def test_magnitudes(scale):
    u = scale * torch.tensor([1.0, -1.0, 0.3, -2.0])
    w, s, c = random_units(3, 1)
    units = Units((w * scale).float(), (s / scale).float(), (c * scale).float())
    if not all(x.isfinite().all() for x in units):
        units = Units(0 * units.w, torch.ones_like(units.s), 0 * units.c)
    gain = torch.ones(4)
    value = separable_forward(u, gain, units)
    expected = reference.psi(u.double(), Units(*(x.double() for x in units)))
    tiny = torch.finfo(torch.float32).smallest_normal  # half precision below it
    assert_close(value, expected, scale=scale + tiny)
    assert_close(separable_inverse(value, gain, units), u.double(), scale=30 * scale + tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    units = Units(*(x.to(dtype) for x in random_units(3, 1)))
    gain = torch.full((20,), 2.0, dtype=dtype)
    x = torch.linspace(-1, 1, 20, dtype=dtype)
    x[3], x[8], x[19] = math.nan, math.inf, -math.inf
    value = separable_forward(x, gain, units)
    assert value[3].isnan()
    assert (value[8], value[19]) == (math.inf, -math.inf)
    bad = ~x.isfinite()
    assert value[~bad].isfinite().all()
    y, status = torch.ops.mirror_opt.separable_inverse(x, gain, *units, "algebraic")
    assert status == Status.NONFINITE
    assert torch.equal(y.isnan(), bad)
    good = separable_inverse(x[~bad], gain[~bad], units)
    assert torch.equal(y[~bad], good)
    with pytest.raises(NewtonError, match="NONFINITE"):
        separable_inverse(x, gain, units)
    with pytest.raises(NewtonError, match="NONFINITE"):
        separable_step(gain, x, 0.1, gain, units)
    assert separable_step(gain, 0 * gain, 0.1, gain, units).isfinite().all()


def test_mixed_dtypes_are_promoted():
    u, gain, *units = operands((3, 4), (3, 4), (3, 1))
    value = separable_forward(u.float(), gain, Units(*units))
    assert value.dtype == torch.float64
    assert_close(value, reference_value(u.float().double(), gain, *units))
    low = separable_forward(u.half(), gain.float(), Units(*(x.float() for x in units)))
    assert low.dtype == torch.float32


def test_two_runs_and_any_number_of_threads_give_the_same_bits():
    u, gain, *units = cast(operands((2, 3, 8191), (1, 3, 8191), (1, 3, 1)), torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        y = torch.ops.mirror_opt.separable_inverse(u, gain, *units, "algebraic")[0]
        grads = torch.ops.mirror_opt.separable_backward(u, u, gain, *units, "algebraic", False)
        results.append([separable_forward(u, gain, Units(*units)), y, *grads])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 40), st.integers(1, 6), st.integers(0, 9), st.floats(1e-2, 30),
    st.booleans(), st.integers(0, 99),
)
def test_increasing_and_inverted(n, columns, count, spread, single, seed):
    dtype = torch.float32 if single else torch.float64
    units = Units(*(x.to(dtype) for x in random_units(count, columns, 1, seed=seed)))
    u = (spread * torch.randn(columns, n, dtype=dtype)).sort(1).values
    gain = torch.full_like(u, 0.7)
    value = separable_forward(u, gain, units)
    span = reference.psi_bracket(units).max().item() if count else 0.0
    eps = torch.finfo(dtype).eps
    slack = 32 * eps * (u.abs() + span)
    assert (value.diff(dim=1) >= -(slack[:, 1:] + slack[:, :-1])).all()
    back = separable_inverse(value, gain, units)
    lowest = reference.psi_slope_bounds(units)[0].min().clamp(min=0.1).item() if count else 1.0
    assert ((back - u).abs() <= slack / lowest).all()
