"""The equations: SGD as a special case, every map, dual state, anchor, weight decay, dtypes."""

from itertools import pairwise

import pytest
import torch
from optim_cases import CASES, IDS, descend, learned, quadratic, same, start

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"maximize": True},
    {"momentum": 0.5, "nesterov": True, "maximize": True},
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("as_lr", [float, torch.tensor, lambda lr: torch.tensor([lr])])
def test_euclidean_is_sgd_to_the_bit(options, dtype, foreach, as_lr):
    lr = as_lr(0.1)
    if dtype == torch.bfloat16:  # SGD's kernels round these to bfloat16 too: be exact there
        lr = as_lr(0.125)
        options = {**options, "momentum": 0.875} if "momentum" in options else options
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (), (2, 0), (7,)]
    ours = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = MirrorDescent(ours, lr=lr, foreach=foreach, **options)
    sgd = torch.optim.SGD(theirs, lr=lr, foreach=foreach, **options)
    for _ in range(30):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("dual_state", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options", [*SGD_OPTIONS, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3}], ids=str
)
def test_follows_the_equations(options, foreach, dual_state):
    mirror_map, lr = maps.Hypentropy(0.1), 0.05
    momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    p = torch.tensor([0.5, -2.0, 0.01], dtype=torch.float64, requires_grad=True)
    phi, buffer = p.detach().clone(), torch.zeros(3, dtype=torch.float64)
    optimizer = MirrorDescent(
        [p], lr=lr, mirror_map=mirror_map, foreach=foreach, dual_state=dual_state, **options
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        gradient = torch.randn(3, generator=generator, dtype=torch.float64)
        p.grad = gradient.clone()
        optimizer.step()
        gradient = -gradient if options.get("maximize") else gradient
        buffer = momentum * buffer + gradient
        direction = gradient + momentum * buffer if options.get("nesterov") else buffer
        z = torch.asinh((1 - lr * decay) * phi / 0.1)
        phi = 0.1 * torch.sinh(z - lr * direction)
    torch.testing.assert_close(p.detach(), phi, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dual_state", [None, False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_every_map_descends_within_its_domain(name, options, dual_state):
    params = start(name, options, torch.float32)
    mirror_map = learned(name, params, options)
    optimizer = MirrorDescent(params, lr=0.05, mirror_map=mirror_map, dual_state=dual_state)
    losses = descend(optimizer, params, 15)
    assert all(after <= before + 1e-7 for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    mirror_map.check(params)
    assert not any(p.grad_fn for p in params)
    assert all(p.grad is None for p in mirror_map.parameters())


@pytest.mark.parametrize("weight_decay", [0, 0.5])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_dual_state_is_stateless_to_rounding(name, options, weight_decay):
    ends = []
    for dual_state in (False, True):
        params = start(name, options)
        optimizer = MirrorDescent(
            params,
            lr=0.05,
            mirror_map=learned(name, params, options),
            momentum=0.5,
            weight_decay=weight_decay,
            dual_state=dual_state,
        )
        descend(optimizer, params, 6)
        assert ("dual" in optimizer.state[params[0]]) == dual_state
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_foreach_is_forloop(name, options):
    ends = []
    for foreach in (False, True):
        params = start(name, options)
        mirror_map = learned(name, params, options)
        optimizer = MirrorDescent(
            params, lr=0.05, mirror_map=mirror_map, momentum=0.9, weight_decay=0.1, foreach=foreach
        )
        descend(optimizer, params, 3)
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_dual_state_is_kept_by_default_where_the_mirror_map_needs_a_solve():
    for name, options in CASES:
        params = start(name, options)
        mirror_map = maps.create(name, params, **options)
        optimizer = MirrorDescent(params, mirror_map=mirror_map)
        descend(optimizer, params, 1)
        assert ("dual" in optimizer.state[params[0]]) == (not mirror_map.forward_is_closed)


def test_dual_state_collects_steps_below_the_resolution_of_the_parameter():
    ends = {}
    for dual_state in (False, True):
        p = torch.ones(1, requires_grad=True)
        optimizer = MirrorDescent([p], lr=1e-8, dual_state=dual_state)
        for _ in range(1000):
            p.grad = torch.ones(1)
            optimizer.step()
        ends[dual_state] = p.item()
    assert ends[False] == 1
    assert ends[True] == pytest.approx(1 - 1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["euclidean", "hypentropy", "separable", "kronecker"])
@pytest.mark.parametrize("weight_decay", [0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_trains_on_its_dual_state_where_it_stalls_without(name, weight_decay, dtype):
    # From 1 towards 0.9 or, by the decay, 0: each step is far below half the spacing of the dtype.
    def run(dtype, dual_state):
        p = torch.ones(2, 2, dtype=dtype, requires_grad=True)
        optimizer = MirrorDescent(
            [p],
            lr=2e-4,
            mirror_map=maps.create(name, [p]),
            weight_decay=weight_decay,
            dual_state=dual_state,
        )
        for _ in range(200):
            p.grad = torch.full_like(p, 0.5 * (not weight_decay))
            optimizer.step()
        assert p.dtype == dtype
        return p.detach().float()

    exact = run(torch.float64, True)
    spacing = torch.finfo(dtype).eps
    assert (exact <= 1 - 2 * spacing).all()
    assert (run(dtype, False) == 1).all()
    assert ((run(dtype, True) - exact).abs() <= spacing).all()


@pytest.mark.parametrize("anchor", ["auto", "init", "zero"])
def test_anchored_map_acts_on_the_displacement(anchor):
    params = start("separable", {})
    mirror_map = learned("separable", params, {"parametrization": "primal"})
    phi_0 = [p.detach().clone() for p in params]
    phi = [p.detach().clone() for p in params]
    base = [torch.zeros_like(p) if anchor == "zero" else p for p in phi_0]
    optimizer = MirrorDescent(params, lr=0.1, mirror_map=mirror_map, anchor=anchor)
    descend(optimizer, params, 4)
    with torch.no_grad():
        for _ in range(4):
            z = mirror_map([x - b for x, b in zip(phi, base, strict=True)])
            delta = mirror_map.inverse(
                [z_i - 0.1 * (x - 1 / 3) for z_i, x in zip(z, phi, strict=True)]
            )
            phi = [b + d for b, d in zip(base, delta, strict=True)]
    torch.testing.assert_close([p.detach() for p in params], phi, rtol=1e-12, atol=1e-14)
    kept = [optimizer.state[p].get("anchor") for p in params]
    assert kept == [None, None] if anchor == "zero" else same(kept, phi_0)


def test_unanchored_map_can_be_anchored():
    p = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    phi_0 = p.detach().clone()
    optimizer = MirrorDescent([p], lr=0.5, mirror_map=maps.Hypentropy(0.1), anchor="init")
    p.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(p.detach() - phi_0, 0.1 * torch.sinh(-0.5 * p.grad))


def test_dropping_the_dual_state_restarts_it_from_the_parameter():
    params = start("hypentropy", {})
    optimizer = MirrorDescent(params, lr=0.1, mirror_map=maps.Hypentropy(), dual_state=True)
    descend(optimizer, params, 2)
    with torch.no_grad():
        params[0].fill_(0.7)
    del optimizer.state[params[0]]["dual"]
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full_like(params[0], 0.7))


def test_groups_step_as_optimizers_of_their_own():
    def pair():
        return start("euclidean", {})

    first = {"lr": 0.1, "mirror_map": maps.Hypentropy(0.1), "momentum": 0.9}
    second = {"lr": 0.02, "mirror_map": maps.PNorm(3.0), "dual_state": True, "maximize": True}
    together, apart = pair(), pair()
    optimizer = MirrorDescent(
        [{"params": together[:1], **first}, {"params": together[1:], **second}]
    )
    optimizers = [MirrorDescent(apart[:1], **first), MirrorDescent(apart[1:], **second)]
    for _ in range(5):
        for params in (together, apart):
            quadratic(params).backward()
        for o in (optimizer, *optimizers):
            o.step()
            o.zero_grad()
    assert same(together, apart)


@pytest.mark.parametrize("dual_state", [False, True])
def test_parameters_without_gradient_keep_still_and_the_others_keep_their_place(dual_state):
    params = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    frozen = torch.ones(2, dtype=torch.float64)
    mirror_map = maps.Diagonal([*params, frozen])
    with torch.no_grad():
        for i, log_d in enumerate(mirror_map.log_d):
            log_d.fill_(i)
    optimizer = MirrorDescent(
        [*params, frozen], lr=0.1, mirror_map=mirror_map, dual_state=dual_state, momentum=0.5
    )
    rates = torch.arange(3, dtype=torch.float64).exp()
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    params[1].grad = torch.ones_like(params[1])
    params[2].grad = None
    optimizer.step()
    moved = torch.stack([1 - p.detach() for p in params])
    expected = torch.tensor([0, 0.1, 0.1], dtype=torch.float64) * rates
    torch.testing.assert_close(moved, expected[:, None].expand(3, 2))
    assert (frozen == 1).all()
    assert params[0] not in optimizer.state


def test_strange_shapes_and_layouts():
    generator = torch.Generator().manual_seed(0)
    matrix, other = torch.rand(2, 8, 6, generator=generator, dtype=torch.float64)
    params = [
        matrix.t().requires_grad_(),
        other[::2, 1:4].requires_grad_(),
        torch.rand((), generator=generator, dtype=torch.float64).requires_grad_(),
        torch.rand(0, 3, dtype=torch.float64).requires_grad_(),
    ]
    assert not any(p.is_contiguous() for p in params[:2])
    plain = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
    plain = [p.requires_grad_() for p in plain]
    ends = []
    for xs in (params, plain):
        mirror_map = learned("kronecker", xs, {})
        optimizer = MirrorDescent(xs, lr=0.1, mirror_map=mirror_map, momentum=0.9)
        losses = descend(optimizer, xs, 4)
        assert losses[-1] < losses[0]
        ends.append([x.detach() for x in xs])
    torch.testing.assert_close(*ends)


def test_mixed_dtypes_step_as_each_would_alone():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for foreach in (False, True):
        together = [torch.full((3,), 0.7, dtype=d, requires_grad=True) for d in dtypes]
        apart = [p.detach().clone().requires_grad_() for p in together]
        options = {"lr": 0.1, "mirror_map": maps.Hypentropy(), "momentum": 0.9, "foreach": foreach}
        optimizer = MirrorDescent(together, **options)
        descend(optimizer, together, 3)
        for p in apart:
            descend(MirrorDescent([p], **options), [p], 3)
        assert same(together, apart)


def test_weight_decay_is_that_of_adamw():
    p = torch.tensor([3.0, -2.0], requires_grad=True)
    q = p.detach().clone().requires_grad_()
    p.grad, q.grad = torch.zeros(2), torch.zeros(2)
    MirrorDescent([p], lr=0.1, weight_decay=0.5).step()
    torch.optim.AdamW([q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, q)


def test_anchor_needs_a_domain_that_displacements_do_not_leave():
    p = torch.full((3,), 1 / 3, requires_grad=True)
    with pytest.raises(InputError, match=r"displacements.*simplex"):
        MirrorDescent([p], mirror_map=maps.NegativeEntropy(), anchor="init")
