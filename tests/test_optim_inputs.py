"""torch's own optimizer test inputs, driven at MirrorDescent with several maps.

``torch.testing`` describes an optimizer by an ``OptimizerInfo``; PyTorch's generic optimizer tests
run over those. They are not in the wheel, so what they check is written here over the same inputs.
"""

import copy
import functools
import io
import itertools
import weakref

import pytest
import torch
from optim_cases import learned, quadratic, same, snapshot
from torch.optim import lr_scheduler
from torch.optim import optimizer as base
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirror_opt import MirrorDescent, backends


def construct(name, map_options, params, **kwargs):
    """MirrorDescent over the map of this name, off its identity start, one for each group."""
    params = list(params)
    if params and isinstance(params[0], dict):
        groups = [{**group, "params": _as_list(group["params"])} for group in params]
        for group in groups:
            group["mirror_map"] = learned(name, tensors(group["params"]), map_options)
        return MirrorDescent(groups, **kwargs)
    return MirrorDescent(params, mirror_map=learned(name, tensors(params), map_options), **kwargs)


def _as_list(params):
    return [params] if isinstance(params, torch.Tensor) else list(params)


def tensors(params):
    return [p[1] if isinstance(p, tuple) else p for p in params]


def inputs(device, dtype=None):
    options = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "weight decay": {"lr": 0.01, "weight_decay": 0.5},
        "momentum": {"lr": 0.01, "momentum": 0.9},
        "maximize": {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "dual state": {"lr": 0.01, "momentum": 0.5, "dual_state": True},
    }
    return [OptimizerInput(params=None, kwargs=v, desc=k) for k, v in options.items()]


def error_inputs(device, dtype):
    # The base class warns of repeated parameters before a map is chosen.
    common = [
        e for e in get_error_inputs_for_all_optims(device, dtype) if e.error_type is not UserWarning
    ]
    own = {
        r"Invalid momentum=-0.5: pass a number in \[0, 1\)": {"momentum": -0.5},
        r"Invalid lr=-0.1: pass a number in \[0, inf\)": {"lr": -0.1},
        "is torch.complex64: pass float16.*view_as_complex": {
            "params": [torch.ones(2, 2, dtype=torch.complex64)]
        },
    }
    for regex, kwargs in own.items():
        params = kwargs.pop("params", None)
        given = OptimizerInput(params=params, kwargs=kwargs, desc=regex)
        common.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=regex))
    return common


def info(name, **map_options):
    separable = name == "separable" and backends.cpp.unavailable() is None
    return OptimizerInfo(
        functools.partial(construct, name, map_options),
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        supported_impls=("foreach", "differentiable", *["fused"] * separable),
        supports_fused_on=("cpu",) if separable else (),
        not_og_supported_flags=("foreach", "fused", "maximize", "nesterov", "dual_state", "anchor",
                                "rounding"),
        supports_complex=False,
    )


INFOS = {
    "euclidean": info("euclidean"),
    "pnorm": info("pnorm", p=1.5),
    "hypentropy": info("hypentropy", beta=0.1),
    "negative-entropy": info("negative-entropy"),
    "diagonal": info("diagonal"),
    "separable": info("separable"),
    "separable-primal": info("separable", parametrization="primal"),
    "kronecker": info("kronecker"),
}
over_maps = pytest.mark.parametrize("name", INFOS)


def every(name, *skip):
    """The optimizer's class and all inputs, with each of the flags that exclude each other."""
    i = INFOS[name]
    return i.optim_cls, _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, i, skip)


def start(seed=0, dtype=torch.float32, shapes=((4, 3), (3,))):
    """Parameters inside the domain of every map."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [d.softmax(-1).to(dtype).requires_grad_() for d in draws]


def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps=3, first=0):
    for k in range(first, first + steps):
        give(params, k)
        optimizer.step()


def close(xs, ys, factor=16):
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype
        eps = factor * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=eps, atol=eps)


# Construction.


@over_maps
def test_errors(name):
    i = INFOS[name]
    for error in i.optim_error_inputs_func("cpu", torch.float32):
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        given = error.optimizer_error_input
        params = start() if given.params is None else given.params
        with pytest.raises(error.error_type, match=error.error_regex):
            # Without the map, whose own refusal of such parameters would come first.
            MirrorDescent(params, **given.kwargs)
        if given.params is None:
            with pytest.raises(error.error_type, match=error.error_regex):
                i.optim_cls(params, **given.kwargs)


def test_complex_numbers_train_as_real_pairs_as_sgd_trains_them():
    # What the error for a complex parameter advises.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, dtype=torch.complex64, generator=generator)
    pair = torch.view_as_real(z).clone().requires_grad_()
    z.requires_grad_()
    ours, theirs = MirrorDescent([pair], 0.1, momentum=0.9), torch.optim.SGD([z], 0.1, momentum=0.9)
    for _ in range(3):
        for optimizer, value in ((ours, torch.view_as_complex(pair)), (theirs, z)):
            optimizer.zero_grad()
            (value * value - 1j).abs().square().sum().backward()
            optimizer.step()
    close([torch.view_as_complex(pair.detach()).real], [z.detach().real])
    close([torch.view_as_complex(pair.detach()).imag], [z.detach().imag])


@over_maps
def test_it_can_be_printed(name):
    cls, cases = every(name)
    for case in cases:
        text = repr(cls(start(), **case.kwargs))
        assert all(f"{key}: " in text for key in case.kwargs)


@over_maps
def test_defaults_reach_groups_and_groups_override_them(name):
    cls, cases = every(name, "differentiable")
    for case in cases:
        p, q = start()
        optimizer = cls([{"params": p, "lr": 0.5, "weight_decay": 0.25}, {"params": q}],
                        **case.kwargs)  # fmt: skip
        first, second = optimizer.param_groups
        assert (first["lr"], first["weight_decay"]) == (0.5, 0.25)
        for key, value in case.kwargs.items():
            assert second[key] is value
        together = [p, q]
        run(optimizer, together)
        for index, options in ((0, {"lr": 0.5, "weight_decay": 0.25}), (1, {})):
            alone = start()[index]
            other = cls([alone], **{**case.kwargs, **options})
            for k in range(3):
                both = start()
                give(both, k)
                alone.grad = both[index].grad
                other.step()
            close([alone.detach()], [together[index].detach()])


# Directions.

SCHEDULERS = [
    [],
    [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
    [
        lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
    ],
]


@over_maps
def test_goes_in_the_right_direction(name):
    cls, cases = every(name, "differentiable")
    strided = [False, True]
    for case, schedulers, contiguous in itertools.product(cases, SCHEDULERS, strided):
        params = start()
        if not contiguous:
            params = [
                torch.stack([p.detach()] * 2, -1)[..., 0].detach().requires_grad_() for p in params
            ]
            assert not any(p.is_contiguous() for p in params)
        kwargs = {**case.kwargs, "weight_decay": 0}
        if isinstance(kwargs.get("lr"), torch.Tensor):
            kwargs["lr"] = kwargs["lr"].clone()  # schedulers change it in place
        optimizer = cls([("weight", params[0]), ("bias", params[1])], **kwargs)
        schedules = [s(optimizer) for s in schedulers]

        def closure(optimizer=optimizer, params=params):
            optimizer.zero_grad()
            loss = quadratic(params)
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
            for schedule in schedules:
                plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
                schedule.step(*[losses[-1]] * plateau)
        if kwargs.get("maximize"):
            losses.reverse()
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


# One answer from every implementation.

SHAPES = ((4, 3), (3,), (), (2, 2, 3), (1, 1))


@over_maps
def test_implementations_agree_over_mixed_dtypes_and_empty_and_missing_gradients(name):
    i = INFOS[name]
    flags = [x for x in ("foreach", "fused") if x in i.supported_impls]
    for case, flag, dtypes in itertools.product(
        i.optim_inputs_func("cpu"), flags, ((torch.float32, torch.bfloat16), (torch.float64,))
    ):
        ends = []
        for value in (False, True):
            mixed = (*dtypes, torch.float64) if flag == "foreach" else dtypes
            params = [
                p.detach().to(dtype).requires_grad_()
                for p, dtype in zip(start(shapes=SHAPES), itertools.cycle(mixed), strict=False)
            ]
            params.append(torch.empty(0, 3, dtype=dtypes[0], requires_grad=True))
            optimizer = i.optim_cls(params, **{"fused": False, **case.kwargs, flag: value})
            for k in range(3):
                give(params, k)
                params[k].grad = None
                optimizer.step()
            ends.append(snapshot(optimizer))
        close(*ends, factor=64)


@over_maps
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr_is_float_lr(name, shape):
    cls, cases = every(name, "differentiable")
    for case in cases:
        ends = []
        for lr in (0.0625, torch.full(shape, 0.0625)):  # exact in float32
            params = start()
            optimizer = cls(params, **{**case.kwargs, "lr": lr})
            run(optimizer, params)
            assert optimizer.param_groups[0]["lr"] is lr
            ends.append(snapshot(optimizer))
        close(*ends)


@over_maps
def test_the_default_dtype_does_not_matter(name):
    cls, cases = every(name, "differentiable")
    for case in cases:
        ends = []
        for dtype in (torch.float32, torch.float64):
            params = start(dtype=torch.float64)
            gradients = [torch.linspace(-1, 1, p.numel()).double().view(p.shape) for p in params]
            optimizer = cls(params, **copy.deepcopy(case.kwargs))
            torch.set_default_dtype(dtype)
            try:
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
                optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
            ends.append(snapshot(optimizer))
        assert same(*ends)


# Steps that do nothing, or run around a hook.


@over_maps
def test_a_step_without_gradients_changes_nothing(name):
    cls, cases = every(name)
    for case in cases:
        params = start()
        optimizer = cls(params, **case.kwargs)
        optimizer.step()
        assert same([p.detach() for p in params], [p.detach() for p in start()])
        assert not any(optimizer.state.values())


@over_maps
def test_zero_gradients_without_decay_change_nothing_beyond_rounding(name):
    cls, cases = every(name, "differentiable")
    for case in cases:
        params = start()
        optimizer = cls(params, **{**case.kwargs, "weight_decay": 0})
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        close([p.detach() for p in params], [p.detach() for p in start()])


@over_maps
def test_state_is_kept_where_an_option_asks_for_it(name):
    cls, cases = every(name, "differentiable")
    for case in cases:
        params = start()
        optimizer = cls(params, **case.kwargs)
        run(optimizer, params, 1)
        expected = {"momentum_buffer"} if case.kwargs.get("momentum") else set()
        group = optimizer.param_groups[0]
        dual = case.kwargs.get("dual_state") or not group["mirror_map"].forward_is_closed
        if group["mirror_map"].anchored:
            expected |= {"anchor", "dual"} if dual else {"anchor"}
        elif dual:
            expected |= {"dual", "dual_init"}
        assert all(set(optimizer.state[p]) == expected for p in params)


def test_hooks_of_one_optimizer_and_of_all():
    calls = []

    def hook(tag):
        return lambda optimizer, args, kwargs: calls.append(tag)

    p = start()[:1]
    optimizer, other = MirrorDescent(p, 0.1), MirrorDescent(start()[:1], 0.1)
    handles = [
        base.register_optimizer_step_pre_hook(hook("all before")),
        base.register_optimizer_step_post_hook(hook("all after")),
        optimizer.register_step_pre_hook(hook("before")),
        optimizer.register_step_post_hook(hook("after")),
    ]
    try:
        run(optimizer, p, 1)
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    run(optimizer, p, 1)
    assert calls == ["all before", "before", "after", "all after", "all before", "all after"]


def test_hooks_of_state_dicts_run_in_order_and_may_replace_it():
    calls = []
    params = start()
    optimizer = MirrorDescent(params, 0.1, momentum=0.9)
    run(optimizer, params, 1)

    def hook(tag, result=lambda saved: None):
        def call(optimizer, *saved):
            calls.append(tag)
            return result(*saved)

        return call

    def replaced(saved):
        return {**saved, "note": "kept"}

    optimizer.register_state_dict_pre_hook(hook("pre", lambda: None))
    optimizer.register_state_dict_post_hook(hook("post"))
    optimizer.register_state_dict_post_hook(hook("post first", replaced), prepend=True)
    saved = optimizer.state_dict()
    assert saved.pop("note") == "kept"
    optimizer.register_load_state_dict_pre_hook(hook("load pre"))
    optimizer.register_load_state_dict_pre_hook(hook("load pre first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(hook("load post", lambda: None))
    optimizer.register_load_state_dict_post_hook(hook("load post first", lambda: None), True)
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post first", "post", "load pre first", "load pre",
                     "load post first", "load post"]  # fmt: skip
    run(optimizer, params, 1)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    x, ends = torch.rand(8, 3, generator=generator), []
    for parts in (1, 4):
        params = start()
        optimizer = INFOS["negative-entropy"].optim_cls(params, lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for chunk in x.chunk(parts):
                ((chunk @ params[0].T).square().mean() + (chunk @ params[1]).mean()).div(
                    parts
                ).backward()
            optimizer.step()
        ends.append(snapshot(optimizer))
    close(*ends)


# State dicts.


@over_maps
def test_state_dicts_resume_and_do_not_depend_on_names(name):
    cls, cases = every(name, "differentiable")
    for case, named, named_later in itertools.product(cases, (False, True), (False, True)):
        def with_names(params, names):
            return list(zip("ab", params, strict=True)) if names else params

        params = start()
        optimizer = cls(with_names(params, named), **copy.deepcopy(case.kwargs))
        run(optimizer, params, 2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        others = [p.detach().clone().requires_grad_() for p in params]
        other = cls(with_names(others, named_later), lr=1.0)
        other.load_state_dict(saved)
        run(optimizer, params, 2, 2)
        run(other, others, 2, 2)
        assert same(snapshot(optimizer), snapshot(other))


@over_maps
def test_older_state_dicts_load(name):
    i = INFOS[name]
    cls, cases = every(name, "differentiable")
    for case in cases:
        params = start()
        optimizer = cls(params, **case.kwargs)
        run(optimizer, params, 1)
        saved = optimizer.state_dict()
        for flag in i.not_og_supported_flags:
            older = copy.deepcopy(saved)
            for group in older["param_groups"]:
                del group[flag]
            other = cls(start())
            other.load_state_dict(older)
            assert flag in other.param_groups[0]
            run(other, other.param_groups[0]["params"], 1)


@over_maps
def test_copies_have_all_public_attributes(name):
    cls, cases = every(name)
    for case in cases:
        params = start()
        optimizer = cls(params, **case.kwargs)
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        assert public == {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")}


# Flags changed after the construction.


def test_flags_changed_later_take_effect():
    params = start()
    optimizer = INFOS["separable"].optim_cls(params, fused=False, foreach=False)
    group = optimizer.param_groups[0]
    group["foreach"] = True
    with counting("_foreach_") as counted:
        run(optimizer, params, 1)
    assert counted()
    group["foreach"] = group["fused"] = None
    with counting("_foreach_", "separable_step_") as counted:
        run(optimizer, params, 1)
    fused = backends.cpp.unavailable() is None
    assert counted() == ["separable_step_"] * fused


# What a step costs.


class Operators(TorchDispatchMode):
    """Names the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


class counting(Operators):  # noqa: N801
    """The operators of these prefixes that run inside."""

    def __init__(self, *prefixes):
        super().__init__()
        self.prefixes = prefixes

    def __enter__(self):
        super().__enter__()
        return lambda: [name for name in self.names if name.startswith(self.prefixes)]


@over_maps
def test_a_step_that_skips_reads_nothing_back(name):
    # What capturable means for torch's own: no value comes to the host, so an accelerator is never
    # waited for. There is no step count, hence no flag. On the CPU a tensor lr and the question
    # whether a fused step can be taken are read, since it costs nothing there.
    cls, cases = every(name, "differentiable", "fused")
    for case in cases:
        params = start()
        kwargs = {**case.kwargs, "lr": 0.1, "nonfinite": "skip", "fused": False}
        optimizer = cls(params, **kwargs)
        run(optimizer, params, 1)  # the first step creates the state
        with counting("_local_scalar_dense", "nonzero", "equal", "is_nonzero") as counted:
            run(optimizer, params, 1)
        mirror_map = optimizer.param_groups[0]["mirror_map"]
        decays = case.kwargs.get("weight_decay", 0) > 0
        if mirror_map.inverse_is_closed and (mirror_map.forward_is_closed or not decays):
            assert counted() == []
        else:
            assert "_local_scalar_dense" in counted()  # a solve asks whether it has converged


class Memory(TorchDispatchMode):
    """The largest number of bytes held at once by storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in self.seen and key not in given:
                self._hold(key, storage)
        return result

    def _hold(self, key, storage):
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key, size):
        self.now -= size
        self.seen.remove(key)


def storages(tree):
    found = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return {s._cdata: s for s in found}


@pytest.mark.parametrize("flag", ["forloop", "foreach", "fused"])
def test_peak_memory_is_that_of_the_arithmetic(flag):
    # A step changes all or nothing, so the unfused ones hold the new values of all parameters, and
    # beside them the momentum or what one operation makes. The fused one holds neither.
    size = 1 << 12
    parameter_bytes = 8 * size * 4
    name = "separable" if flag == "fused" else "euclidean"
    if flag == "fused" and not INFOS[name].supports_fused_on:
        pytest.skip("the CPU library is not built")
    peaks = {}
    for momentum in (0, 0.9):
        params = [torch.ones(size, requires_grad=True) for _ in range(8)]
        flags = {"foreach": flag == "foreach", "fused": flag == "fused"}
        optimizer = INFOS[name].optim_cls(params, lr=0.1, momentum=momentum, **flags)
        run(optimizer, params, 1)
        with Memory() as memory:
            optimizer.step()
        peaks[momentum] = memory.peak / parameter_bytes
    expected = {"forloop": (1, 2), "foreach": (1, 2), "fused": (0, 0)}[flag]
    for peak, multiple in zip(peaks.values(), expected, strict=True):
        assert multiple <= peak <= multiple + 0.15  # a tensor in flight, and scalars
