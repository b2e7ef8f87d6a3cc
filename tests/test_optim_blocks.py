"""Steps in blocks: what they give, when they are taken, and the memory that they need."""

import pytest
import torch
from optim_cases import parameter
from optim_infos import close, every, run
from test_optim_costs import Memory

from mirror_opt import MirrorDescent, maps
from mirror_opt.optim import blocks

ENTRYWISE = {
    "euclidean": maps.Euclidean(),
    "pnorm": maps.PNorm(1.5),
    "pnorm-eps": maps.PNorm(1.1, eps=0.1),
    "hypentropy": maps.Hypentropy(0.1),
    "positive": maps.NegativeEntropy(simplex=False),
    "diagonal": None,  # for its parameters
}
SHAPES = ((4, 3), (), (17,), (0, 2), (1,), (2, 3, 2))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_most", lambda in_cache: 5)


def positive(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    params = [(d + 0.1).to(dtype) for d in draws]
    params[0] = params[0].t()  # not contiguous
    return [p.requires_grad_() for p in params]


def counted(monkeypatch):
    calls = []
    function = blocks.mirror_descent

    def count(rule, params, *others):
        calls.append(sum(p.numel() for p in params))
        return function(rule, params, *others)

    monkeypatch.setattr(blocks, "mirror_descent", count)
    return calls


def of(name, params):
    """The map, for these parameters."""
    if name != "diagonal":
        return ENTRYWISE[name]
    mirror_map = maps.Diagonal(params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mirror_map.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return mirror_map


def test_the_maps_that_say_so_take_every_entry_by_itself():
    said = {name for name, cls in maps.REGISTRY.items() if getattr(cls, "entrywise", False)}
    assert said == {"euclidean", "pnorm", "hypentropy", "diagonal"}
    assert not maps.NegativeEntropy(simplex=True).entrywise
    for name in ENTRYWISE:
        x = torch.rand(4, 3, dtype=torch.float64) + 0.1
        mirror_map = of(name, [x])
        assert mirror_map.entrywise
        order = torch.randperm(12)
        own = mirror_map.coefficients()
        mixed = None if own is None else [own[0].view(-1)[order]]
        for function in (mirror_map, mirror_map.inverse):
            (z,), (shuffled,) = function([x]), function([x.view(-1)[order]], mixed)
            torch.testing.assert_close(z.reshape(-1)[order], shuffled)


@pytest.mark.parametrize("name", ENTRYWISE)
def test_blocks_give_what_the_whole_gives(name, monkeypatch):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for case in every("pnorm", "differentiable", "fused")[1]:
            found = []
            for size in (1000, 5):
                monkeypatch.setattr(blocks, "_most", lambda in_cache, size=size: size)
                with monkeypatch.context() as patch:
                    calls = counted(patch)
                    params = positive(dtype=dtype)
                    kwargs = {"lr": 0.01, **case.kwargs, "fused": False}
                    optimizer = MirrorDescent(params, mirror_map=of(name, params), **kwargs)
                    run(optimizer, params)
                state = [s[k] for s in optimizer.state.values() for k in sorted(s)]
                found.append([*params, *state])
            assert max(calls) <= 5
            assert sum(calls) == 3 * sum(p.numel() for p in params)
            close(*found)


def test_coefficients_go_with_the_parameters_that_have_a_gradient(monkeypatch):
    found = []
    for size in (1000, 5):
        monkeypatch.setattr(blocks, "_most", lambda in_cache, size=size: size)
        params = positive()
        optimizer = MirrorDescent(params, lr=0.1, mirror_map=of("diagonal", params))
        for p in params[::2]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(params)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_block_that_fails_stops_the_whole_step(nonfinite, small_blocks):
    for mirror_map in (maps.PNorm(1.5), maps.PNorm(1.5, eps=0.1)):
        params = positive()
        optimizer = MirrorDescent(params, 0.1, mirror_map, momentum=0.9, nonfinite=nonfinite)
        run(optimizer, params, 1)
        tensors = [*params, *(s["momentum_buffer"] for s in optimizer.state.values())]
        before = [t.detach().clone() for t in tensors]
        params[2].grad[-1] = torch.nan
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="gradient of parameter 2 "):
                optimizer.step()
        else:
            optimizer.step()
        assert all(map(torch.equal, tensors, before))


def test_only_where_it_is_the_same(monkeypatch):
    monkeypatch.setattr(blocks, "_most", lambda in_cache: 5 if in_cache else 1000)

    def steps(params, **options):
        with monkeypatch.context() as patch:
            calls = counted(patch)
            optimizer = MirrorDescent(params, 0.1, **options)
            run(optimizer, params, 1)
        return len(calls)

    eight = torch.rand(2, 4).softmax(-1)
    assert steps([eight.clone().requires_grad_()], mirror_map=maps.PNorm()) == 2
    for mirror_map in (maps.NegativeEntropy(), maps.KroneckerNeural([eight])):
        assert steps([eight.clone().requires_grad_()], mirror_map=mirror_map) == 1
    assert steps([eight.clone().requires_grad_()], mirror_map=maps.PNorm(), foreach=True) == 1
    assert steps([parameter(1.0, 2.0)], mirror_map=maps.PNorm()) == 1


COUPLED = {
    "simplex": lambda params: maps.NegativeEntropy(),
    "kronecker": maps.KroneckerNeural,
    "separable": lambda params: maps.SeparableNeural(params, sigma="tanh"),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("foreach", [False, True])
def test_maps_that_couple_entries_take_some_tensors_at_a_time(name, foreach, monkeypatch):
    found = []
    for size in (1000, 9):
        monkeypatch.setattr(blocks, "_most", lambda in_cache, size=size: size)
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, 3), (3,), (4, 5), (2, 3), ())
        params = [torch.randn(shape, generator=generator).softmax(-1) for shape in shapes]
        params = [p.requires_grad_() for p in params]
        with monkeypatch.context() as patch:
            calls = counted(patch)
            optimizer = MirrorDescent(
                params, 0.1, COUPLED[name](params), momentum=0.9, foreach=foreach
            )
            for p in (params[0], *params[2:]):
                p.grad = torch.rand(p.shape, generator=generator)
            optimizer.step()
        assert calls == ([33] if size == 1000 else [6, 20, 7])
        found.append([*params, *(s["momentum_buffer"] for s in optimizer.state.values())])
    close(*found)


LEAN = [("pnorm", 1), ("hypentropy", 1), ("diagonal", 2), ("simplex", 1)]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "held"), LEAN)
def test_peak_memory_is_that_of_the_result(name, held, dtype, foreach, monkeypatch):
    # And of the coefficients, in float32.
    size = 1 << 14
    monkeypatch.setattr(blocks, "_most", lambda in_cache: size >> 6)
    params = [torch.rand(16, 16).softmax(-1).to(dtype).requires_grad_() for _ in range(64)]
    make = COUPLED.get(name, lambda params: of(name, params))
    optimizer = MirrorDescent(params, 0.1, make(params), foreach=foreach)
    run(optimizer, params, 1)
    with Memory() as memory:
        optimizer.step()
    assert memory.peak <= (held - 0.5) * 4 * size + size * params[0].itemsize
