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
