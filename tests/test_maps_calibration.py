"""The scale of learned maps, from displacements."""

import pytest
import torch

from mirror_opt import maps
from mirror_opt.errors import InputError


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


@pytest.mark.parametrize("name", ["separable", "kronecker"])
def test_calibration_takes_displacements_of_the_tensors(name):
    mirror_map = maps.create(name, [torch.zeros(3, 2), torch.zeros(2)])
    for wrong in ([torch.ones(2, 3), None], [torch.tensor(1.0), None]):
        with pytest.raises(InputError, match=r"displacement of tensor 0 has shape .* \(3, 2\)"):
            mirror_map.calibrate([wrong])
    with pytest.raises(InputError, match="built for 2 tensors and got 1"):
        mirror_map.calibrate([[torch.ones(3, 2)]])


def test_the_unit_is_the_rms_of_each_channel():
    torch.manual_seed(0)
    scale = torch.tensor([[1.0], [1e-2], [0.0]])
    samples = [torch.randn(3, 5, dtype=torch.float64) * scale for _ in range(4)]
    square = torch.stack(samples).square().mean((0, 2))
    overall = square.mean().sqrt()
    expected = square.sqrt().clamp(min=1e-3 * overall)  # a silent channel is no scale
    separable = maps.SeparableNeural([samples[0], samples[0]])
    separable.calibrate([[x, 7 * x] for x in samples])
    (group,) = separable.groups
    torch.testing.assert_close(group.unit.flatten(1), torch.stack([expected, 7 * expected]))
    shared = maps.SeparableNeural([samples[0]], share="tensor")
    shared.calibrate([[x] for x in samples])
    torch.testing.assert_close(shared.groups[0].unit.flatten(), overall[None])


@pytest.mark.parametrize("make", [maps.SeparableNeural, lambda p: maps.KroneckerNeural(p, eps=0.0)])
def test_a_profile_is_psi_in_units_of_the_map(make):
    torch.manual_seed(0)
    tensors = [torch.randn(n, dtype=torch.float64) for n in (6, 2, 6)]
    mirror_map = make(tensors)
    moves = [k * x for k, x in zip((1, 2, 5), tensors, strict=True)]
    mirror_map.calibrate([moves])  # of vectors each entry is a channel
    with torch.no_grad():
        for key, p in mirror_map.named_parameters():
            if key.endswith((".p", ".c", ".log_s")):
                p.add_(torch.randn_like(p))
    profiles = mirror_map.profiles()
    ends = ((0, 1, 3, 5), (0, 1), (0, 1, 3, 5))
    shown = [(i, channel) for i, channels in enumerate(ends) for channel in channels]
    assert [(curve.tensor, curve.channel) for curve in profiles] == shown
    for curve in profiles:
        unit = moves[curve.tensor][curve.channel].abs()
        assert (curve.x[0], curve.x[-1], len(curve.x)) == (-4, 4, 201)
        for v, y in zip(curve.x[::50], curve.y[::50], strict=True):
            points = [torch.zeros_like(x) for x in tensors]
            points[curve.tensor][curve.channel] = v * unit
            found = mirror_map.inverse(points)[curve.tensor][curve.channel] / unit
            torch.testing.assert_close(found, y)
