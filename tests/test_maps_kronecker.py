"""KroneckerNeural's factors: of a fixed norm, or free."""

import pytest
import torch
from maps_cases import SHAPES, learned, points, relative

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.maps.kronecker import _FACTOR_PACE, _GAIN_PACE, _Factors
from mirror_opt.newton import NewtonError

SIZED = [{}, {"terms": 3}, {"eps": 0.0}, {"eps": 0.0, "parametrization": "primal"}]


def factors(mirror_map) -> list[torch.Tensor]:
    return [m for group in mirror_map.coefficients() for m in group.factors]


@pytest.mark.parametrize("options", SIZED, ids=str)
def test_normalised_factors_keep_the_norm_of_the_identity(options):
    torch.manual_seed(0)
    mirror_map = learned("kronecker", {**options, "normalized": True})
    for m in factors(mirror_map):
        n = m.shape[-1]
        assert torch.allclose(torch.linalg.matrix_norm(m), m.new_tensor(n**0.5))


def test_normalised_factors_are_free_ones_but_for_their_size():
    torch.manual_seed(0)
    mirror_map = learned("kronecker", {"terms": 2, "normalized": True})
    free = learned("kronecker", {"terms": 2})
    state = {name: torch.zeros_like(x) for name, x in free.state_dict().items()}
    state |= mirror_map.state_dict()
    for name, p in mirror_map.named_parameters():
        if "factors" in name:
            eye = torch.eye(p.shape[-1], dtype=p.dtype)
            m = eye + _FACTOR_PACE * p
            state[name] = m * (len(eye) / m.square().sum((-2, -1), keepdim=True)).sqrt() - eye
        elif name.endswith(".gain"):
            state[name] = _GAIN_PACE * p
    free.load_state_dict(state)
    zeta = points(mirror_map)
    assert relative(mirror_map.inverse(zeta), free.inverse(zeta)) < 1e-12


@pytest.mark.parametrize("options", SIZED, ids=str)
def test_modes_of_one_entry_have_nothing_to_learn(options):
    # Their gradients would be nothing but rounding, which Adam makes steps of.
    mirror_map = maps.KroneckerNeural(
        [torch.zeros(1, 5), torch.zeros(4, 1)], normalized=True, **options
    )
    learns = [[f.a is not None for f in group.factors] for group in mirror_map.groups]
    assert learns == [[False, True], [True, False]]
    for p in mirror_map.parameters():
        torch.nn.init.normal_(p, std=0.1)
    zeta = [torch.randn(1, 5), torch.randn(4, 1)]
    (sum(x.square().sum() for x in mirror_map.inverse(zeta))).backward()
    assert all(p.grad.norm() > 1e-3 for p in mirror_map.parameters())


def test_the_larger_a_is_the_less_a_step_turns_the_factor():
    torch.manual_seed(0)
    step = torch.randn(1, 1, 6, 6)
    turned = []
    for size in (0.0, 1.0, 10.0):
        own = _Factors(torch.zeros(6, 6), 1, 6, invertible=False, normalized=True, seeds=[0])
        with torch.no_grad():
            own.a.copy_(size * torch.eye(6).flip(0))
            before = own()
            own.a.add_(step, alpha=1e-3)
            turned.append((own() - before).norm().item())
    assert turned[0] > turned[1] > turned[2] > 0


def test_without_any_direction_the_identity_of_eps_is_left():
    mirror_map = maps.KroneckerNeural([torch.zeros(3, 2)], eps=0.1, normalized=True)
    with torch.no_grad():
        for own in mirror_map.groups[0].factors:
            own.a.copy_(-torch.eye(own.a.shape[-1]) / _FACTOR_PACE)
            assert not own().any()
    zeta = torch.randn(3, 2)
    (delta,) = mirror_map.inverse([zeta])
    assert torch.allclose(delta, 0.1 * zeta)
    delta.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mirror_map.parameters())


@pytest.mark.parametrize("parametrization", ["primal", "dual"])
def test_an_inverse_that_is_too_ill_conditioned_is_no_answer(parametrization):
    torch.manual_seed(0)
    options = {"eps": 0.0, "parametrization": parametrization}
    mirror_map = maps.KroneckerNeural([torch.zeros(2, 64, 64)], **options)
    for p in mirror_map.parameters():
        torch.nn.init.normal_(p, std=0.02)
    solve = mirror_map.inverse if parametrization == "primal" else mirror_map.forward
    points = torch.randn(3, 2, 64, 64)
    solve([points[0]])
    together = torch.func.vmap(lambda x: solve([x])[0])
    assert together(points).isfinite().all()
    for p in mirror_map.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with pytest.raises(NewtonError, match="too far apart"):
        solve([points[0]])
    assert together(points).isnan().all()


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_normalized_is_true_or_false(value):
    with pytest.raises(InputError, match="pass True or False"):
        maps.KroneckerNeural([torch.zeros(s) for s in SHAPES], normalized=value)
