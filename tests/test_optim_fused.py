"""MirrorDescent's fused steps: those of the unfused path, and when they are taken."""

import itertools
import math

import pytest
import torch
from optim_cases import (
    COMPILER_WARNINGS,
    as_on_an_accelerator,
    descend,
    learned,
    same,
    snapshot,
    start,
)

from mirror_opt import backends, maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent, fused, plan, transaction

pytestmark = [
    pytest.mark.skipif(backends.cpp.unavailable() is not None, reason="no CPU library is built"),
    *COMPILER_WARNINGS,
]

VARIANTS = [v for v in maps.SeparableNeural.variants if v.get("sigma", "algebraic") == "algebraic"]


@pytest.fixture
def taken(monkeypatch):
    """The coefficients of the fused steps that were taken, in one call or after a look."""
    steps = []
    take, attempt = fused.SeparableStep._take, fused.attempt

    def record(self, found_inf, grad_scale):
        steps.append(self.coefficients)
        return take(self, found_inf, grad_scale)

    def record_attempt(lists, grad_scale):
        status = attempt(lists, grad_scale)
        if status is not None:
            steps.append(fused._cache[lists.group["mirror_map"]])
        return status

    monkeypatch.setattr(fused.SeparableStep, "_take", record)
    monkeypatch.setattr(transaction, "attempt", record_attempt)
    return steps


def pair(dtype=torch.float32, variant=None, **options):
    """Two equal optimizers on equal parameters: fused, and not."""
    for choice in (True, False):
        params = start("separable", {}, dtype)
        mirror_map = learned("separable", params, variant or {})
        yield params, MirrorDescent(params, 0.1, mirror_map, fused=choice, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fused_steps_are_those_of_the_unfused_path(variant, dtype, taken):
    choices = itertools.product((None, False, True), ("auto", "zero"), (0, 0.1), (False, True))
    for dual_state, anchor, weight_decay, maximize in choices:
        optimizers = []
        for params, optimizer in pair(
            dtype, variant, dual_state=dual_state, anchor=anchor, momentum=0.9, nesterov=True,
            weight_decay=weight_decay, maximize=maximize,
        ):  # fmt: skip
            descend(optimizer, params, 3)
            optimizers.append(optimizer)
        fused_state, state = (snapshot(o) for o in optimizers)
        for x, y in zip(fused_state, state, strict=True):
            assert x.dtype == y.dtype
            eps = torch.finfo(x.dtype).eps
            wide = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
            assert ((x - y).abs() <= 2 * eps * y.abs() + 300 * wide).all()
    assert len(taken) == 3 * 24


def test_fused_by_default_unless_foreach_is_given_or_the_sigma_is_another(taken):
    for options in ({}, {"fused": None}, {"foreach": True}, {"foreach": False}, {"fused": False}):
        params = start("separable", {}, torch.float32)
        descend(MirrorDescent(params, 0.1, maps.SeparableNeural(params), **options), params, 1)
    assert len(taken) == 2
    params = start("separable", {}, torch.float32)
    descend(MirrorDescent(params, 0.1, maps.SeparableNeural(params, sigma="tanh")), params, 1)
    with backends.use_backend("torch"):
        descend(MirrorDescent(params, 0.1, maps.SeparableNeural(params)), params, 1)
    assert len(taken) == 2


def test_a_fused_step_that_there_is_not_is_refused():
    def refused(message, params, mirror_map=None, **options):
        optimizer = MirrorDescent(params, 0.1, mirror_map, fused=True, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        before = snapshot(optimizer)[: len(params)]
        with pytest.raises(InputError, match=f"fused=True cannot be served: {message}"):
            optimizer.step()
        assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))

    params = start("separable", {}, torch.float32)
    with pytest.raises(InputError, match="Invalid fused=True for PNorm: there is a fused step for"):
        MirrorDescent(params, 0.1, maps.PNorm(), fused=True)
    other = MirrorDescent(params, 0.1, fused=True)
    other.param_groups[0]["mirror_map"] = maps.PNorm()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(InputError, match="fused step for SeparableNeural and Euclidean, not for P"):
        other.step()
    refused("that of Euclidean keeps no anchor", params, dual_state=True)
    half = start("separable", {}, torch.bfloat16)
    refused("that of Euclidean takes .* float32, or of float64", half)
    refused("no fast backend serves .*, tanh", params, maps.SeparableNeural(params, sigma="tanh"))
    mixed = [params[0], params[1].detach().double().requires_grad_()]
    refused("float64 and other parameters", mixed, maps.SeparableNeural(mixed))
    with backends.use_backend("torch"):
        refused("no fast backend serves", params, maps.SeparableNeural(params))
    with pytest.raises(InputError, match="Invalid fused=True with foreach=True"):
        MirrorDescent(params, fused=True, foreach=True)
    with pytest.raises(InputError, match="Invalid fused=True with differentiable=True"):
        MirrorDescent(params, fused=True, differentiable=True)


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_what_could_fail_is_not_fused(policy, bad, taken):
    ends = []
    for params, optimizer in pair(nonfinite=policy, momentum=0.9):
        descend(optimizer, params, 1)
        params[1].grad[1] = bad
        try:
            optimizer.step()
        except FloatingPointError as error:
            ends.append(str(error))
        ends.append([x.nan_to_num(7.0) for x in snapshot(optimizer)])
    assert len(taken) == 1
    half = len(ends) // 2
    raised = policy == "raise" and not math.isfinite(bad)
    assert half == (2 if raised else 1)
    if raised:
        assert ends[0] == ends[2]
    for x, y in zip(ends[half - 1], ends[-1], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
def test_a_rate_that_could_leave_the_range_is_not_fused(rate, taken):
    params, optimizer = next(pair())
    descend(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = rate(1e15)
    params[0].grad.fill_(1.0)
    params[1].grad.fill_(1e30)
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert same(before, snapshot(optimizer))
    optimizer.param_groups[0]["lr"] = rate(1e10)
    for p in params:
        p.grad.fill_(1e-12)
    optimizer.step()
    assert len(taken) == 1  # the first


DTYPES = list(itertools.permutations([torch.float32, torch.float64]))


@pytest.mark.parametrize(("built", "used"), DTYPES, ids=str)
@pytest.mark.parametrize("choice", [None, False, True])
def test_another_dtype_than_the_map_was_built_for(built, used, choice, taken):
    params = start("separable", {}, built)
    optimizer = MirrorDescent(params, 0.1, learned("separable", params, {}), fused=choice)
    for p in params:
        p.data = p.data.to(used)
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with pytest.raises(InputError, match=r"convert the map with|another dtype"):
        optimizer.step()
    assert not taken
    assert same(before, params)


@pytest.mark.parametrize(("built", "used"), DTYPES, ids=str)
def test_parameters_that_change_their_dtype_beside_their_state(built, used, taken):
    ends = []
    for choice in (None, False):
        params = start("separable", {}, built)
        mirror_map = learned("separable", params, {})
        optimizer = MirrorDescent(params, 0.1, mirror_map, fused=choice, momentum=0.9)
        descend(optimizer, params, 2)
        taken.clear()
        for p in params:
            p.data = p.data.to(used)
            p.grad = None
        descend(optimizer, params, 2)
        ends.append(snapshot(optimizer))
    assert not taken
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"another dtype|changed their dtype"):
        fused.fused_step(optimizer._collect(optimizer.param_groups[0] | {"fused": True}))


def test_steps_without_units_or_with_an_empty_parameter():
    for backend in ("cpp", "triton"):
        if getattr(backends, backend).unavailable():
            continue
        with backends.use_backend(backend):
            params = [*start("separable", {}, torch.float32), torch.zeros(0, 2, requires_grad=True)]
            expected = [(p - 0.1 * (p - 1 / 3)).detach() for p in params]
            mirror_map = maps.SeparableNeural(params, units=0)
            optimizer = MirrorDescent(params, 0.1, mirror_map, fused=True)
            descend(optimizer, params, 1)
            torch.testing.assert_close(params, expected)


def test_float16_is_not_fused_where_it_could_overflow(taken):
    for params, optimizer in pair(torch.float16):
        descend(optimizer, params, 2)
    assert not taken


def test_coefficients_are_computed_again_when_the_map_has_changed(taken):
    ends = []
    for params, optimizer in pair():
        mirror_map = optimizer.param_groups[0]["mirror_map"]
        descend(optimizer, params, 2)
        with torch.no_grad():
            mirror_map.groups[0].p.add_(0.5)
        descend(optimizer, params, 2)
        mirror_map.groups[1].a = torch.nn.Parameter(mirror_map.groups[1].a + 0.3)
        descend(optimizer, params, 2)
        mirror_map.load_state_dict({k: v * 0.9 for k, v in mirror_map.state_dict().items()})
        descend(optimizer, params, 2)
        ends.append(snapshot(optimizer))
    assert len(taken) == 8
    first, *others = map(id, taken)
    assert [x == first for x in others] == [True, *[False] * 6]
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_no_temporary_of_the_size_of_the_parameters(variant, taken):
    params = [torch.randn(64, 500, requires_grad=True), torch.randn(8000, requires_grad=True)]
    mirror_map = maps.SeparableNeural(params, **variant)
    optimizer = MirrorDescent(params, 0.1, mirror_map, momentum=0.9, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # makes the state
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        optimizer.step()
        torch.zeros(25)  # 100 bytes, to show that the profiler sees them
    grown = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert len(taken) == 2
    assert 100 <= grown < 1000


def test_groups_step_together_or_not_at_all(taken):
    params = [torch.ones(4, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = MirrorDescent(
        [{"params": params[:1], "mirror_map": maps.SeparableNeural(params[:1])},
         {"params": params[1:]}], lr=0.1,
    )  # fmt: skip
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(taken) == 1
    assert all((p == 0.9).all() for p in params)
    params[1].grad[0] = math.nan
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, snapshot(optimizer), strict=True))


def attempted(change=None, dtype=torch.float32, **options):
    """The status of a step taken in one call; None where it was not taken."""
    params, optimizer = next(pair(dtype, nonfinite="skip", **options))
    descend(optimizer, params, 1)
    if change is not None:
        change(params, optimizer)
    lists = optimizer._collect(optimizer.param_groups[0])
    before = snapshot(optimizer)
    with torch.no_grad():
        status = fused.attempt(lists, getattr(optimizer, "grad_scale", None))
    assert (status is None) == same(before, snapshot(optimizer))
    return status


def transposed(params, optimizer):
    wide = next(p for p in params if p.dim() > 1)
    wide.data = wide.data.mT.contiguous().mT


def large(params, optimizer):
    params[1].grad[-1] = 1e16


def small_scale(params, optimizer):
    optimizer.grad_scale = torch.tensor(0.5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_step_that_is_sure_to_succeed_takes_one_call(dtype, options):
    assert attempted(dtype=dtype, **options) == 0


@pytest.mark.parametrize("change", [transposed, large, small_scale])
def test_a_step_that_is_not_as_usual_is_not_taken_in_one_call(change):
    assert attempted(change) is None


def test_parameters_elsewhere_are_not_read():
    params, optimizer = next(pair())
    descend(optimizer, params, 1)
    lists = optimizer._collect(optimizer.param_groups[0])
    elsewhere = lists._replace(params=[lists.params[0], lists.params[1].to("meta")])
    with torch.no_grad():
        assert fused.attempt(elsewhere, None) is None
        assert fused.attempt(lists, None) == 0


def test_a_backend_that_was_chosen_takes_its_steps_itself():
    params, optimizer = next(pair())
    descend(optimizer, params, 1)
    lists = optimizer._collect(optimizer.param_groups[0])
    with backends.use_backend("torch"), torch.no_grad():
        assert fused.attempt(lists, None) is None


def test_a_compiled_fused_step():
    ends = []
    for compiled in (False, True):
        params, optimizer = next(pair(momentum=0.9, nonfinite="skip"))
        step = optimizer.step
        if compiled:
            torch._dynamo.reset()
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for bad in (False, False, True, False):
            for p in params:
                p.grad = torch.cos(p.detach())
            if bad:
                params[0].grad[0] = math.nan
            step()
        ends.append(snapshot(optimizer))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_a_map_that_was_built_in_inference_mode():
    p = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        mirror_map = maps.SeparableNeural([p])
    optimizer = MirrorDescent([p], 0.1, mirror_map)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))


@pytest.mark.parametrize("kind", [fused.SeparableStep, fused.EuclideanStep])
def test_scale_and_flag_of_another_device_are_moved_to_the_parameters(kind, monkeypatch):
    # The flag is that of all groups, which may be on several devices.
    param = torch.ones(3, device="meta")
    lists = plan.Lists({}, [0], [param], [param], [], [], [], [])
    step = kind(*([lists, None] if kind is fused.SeparableStep else [lists]))
    monkeypatch.setattr(kind, "_take", lambda self, *scalars: scalars)
    assert all(x.is_meta for x in step.take(torch.zeros(()), torch.ones(())))
    assert step.take(None, None) == (None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("order", [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("name", ["separable", "euclidean"])
def test_groups_on_two_devices(name, order):
    ends = []
    for devices in (order, ("cpu", "cpu")):
        groups, params = [], []
        for seed, device in enumerate(devices):
            mine = [p.detach().to(device) for p in start(name, {}, torch.float32, seed)]
            mine = [p.requires_grad_() for p in mine]
            owned = mine if maps.REGISTRY[name].owns_tensors else []
            groups.append({"params": mine, "mirror_map": maps.create(name, owned)})
            params += mine
        optimizer = MirrorDescent(groups, torch.tensor(0.1), nonfinite="skip")
        for scale in (1.0, 4.0):
            for p in params:
                p.grad = torch.full_like(p, scale)
            optimizer.grad_scale = torch.tensor(scale, device=devices[0])
            optimizer.found_inf = torch.zeros((), device=devices[0])
            optimizer.step()
        ends.append([p.detach().cpu() for p in params])
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y)


def test_a_map_that_derives_from_one_with_a_fused_step_keeps_its_own_mathematics():
    class Doubled(maps.Euclidean):
        def _gradient(self, x, coefficient):
            return 2 * x

        def _gradient_conjugate(self, z, coefficient):
            return z / 2

    class Steep(maps.SeparableNeural):
        def inverse(self, zs, coefficients=None):
            return tuple(z / 2 for z in super().inverse(zs, coefficients))

        def forward(self, xs, coefficients=None):
            return super().forward([2 * x for x in xs], coefficients)

    for make in (lambda params: Doubled(), Steep):
        ends = []
        for asked in (None, False):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(5))]
            optimizer = MirrorDescent(params, lr=0.1, mirror_map=make(params), fused=asked)
            descend(optimizer, params, 2)
            ends.append(params[0].detach())
        assert torch.equal(*ends)
        with pytest.raises(InputError, match="Invalid fused=True for"):
            MirrorDescent(params, mirror_map=make(params), fused=True)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("how", ["eager", "accelerator", "compiled"])
@pytest.mark.parametrize("name", ["separable", "euclidean"])
def test_fused_and_unfused_groups_step_together_or_not_at_all(name, how, bad, monkeypatch):
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    mirror_map = maps.create(name, [a] if name == "separable" else [])
    groups = [
        {"params": [a], "mirror_map": mirror_map, "fused": True},
        {"params": [b], "mirror_map": maps.Hypentropy()},
    ]
    optimizer = MirrorDescent(groups, lr=torch.tensor(0.1), nonfinite="skip")
    if how == "accelerator":
        as_on_an_accelerator(monkeypatch)
    torch._dynamo.reset()
    step = optimizer.step
    if how == "compiled":
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    for finite in (True, False):
        before = [a.detach().clone(), b.detach().clone()]
        for p in (a, b):
            p.grad = torch.ones(3)
        if not finite:
            (a, b)[bad].grad[1] = math.nan
        step()
        assert [torch.equal(x, y) for x, y in zip((a, b), before, strict=True)] == [not finite] * 2


@pytest.mark.parametrize("how", ["accelerator", "compiled"])
@pytest.mark.parametrize("name", ["separable", "euclidean"])
def test_a_fused_step_that_is_asked_to_raise_does(name, how, monkeypatch):
    p = torch.ones(3, requires_grad=True)
    mirror_map = maps.create(name, [p] if name == "separable" else [])
    optimizer = MirrorDescent([p], 0.1, mirror_map, nonfinite="raise", fused=True)
    if how == "accelerator":
        as_on_an_accelerator(monkeypatch)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager") if how == "compiled" else None
    p.grad = torch.ones(3)
    (step or optimizer.step)()
    after = p.detach().clone()
    p.grad[1] = math.nan
    with pytest.raises(FloatingPointError, match="the gradient of parameter 0"):
        (step or optimizer.step)()
    assert torch.equal(p, after)
    p.grad = torch.full((3,), 1e20)  # beyond what a fused step takes: it is not dropped
    (step or optimizer.step)()
    assert not torch.equal(p, after)
