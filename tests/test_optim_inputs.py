"""The checks of torch's own generic optimizer tests, for MirrorDescent with several maps."""

import copy
import io
import itertools

import pytest
import torch
from optim_cases import quadratic, same, snapshot
from optim_infos import (
    INFOS,
    close,
    counting,
    every,
    give,
    over_maps,
    run,
    start,
)
from torch.optim import lr_scheduler
from torch.optim import optimizer as base
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
)

from mirror_opt import MirrorDescent, backends
from mirror_opt.errors import InputError

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
        for group in saved["param_groups"]:
            for flag in i.not_og_supported_flags:
                del group[flag]
        other = cls(start())
        other.load_state_dict(saved)
        assert set(i.not_og_supported_flags) <= other.param_groups[0].keys()
        run(other, other.param_groups[0]["params"], 1)


@over_maps
def test_equal_runs_have_equal_state_dicts_that_keep_names(name):
    cls, cases = every(name, "differentiable")
    for case in cases:
        found = []
        for _ in range(2):
            params = start()
            optimizer = cls(list(zip("ab", params, strict=True)), **copy.deepcopy(case.kwargs))
            run(optimizer, params)
            found.append(optimizer.state_dict())
        (group,), (other,) = (saved["param_groups"] for saved in found)
        assert group["params"] == other["params"] == [0, 1]
        assert group["param_names"] == ["a", "b"]
        assert {k: v for k, v in group.items() if k != "mirror_map"} == {
            k: v for k, v in other.items() if k != "mirror_map"
        }
        assert same(*([x for s in saved["state"].values() for x in s.values()] for saved in found))
        fresh = cls(list(zip("xy", start(), strict=True)))
        fresh.load_state_dict(found[0])
        assert fresh.state_dict()["param_groups"][0]["param_names"] == ["a", "b"]


@over_maps
@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_state_moves_to_the_device_of_its_parameter(name, device):
    cls, _ = every(name)
    params = start(dtype=torch.bfloat16)
    options = {"lr": 0.01, "momentum": 0.9, "dual_state": True}
    optimizer = cls(params, **options)
    run(optimizer, params, 2)
    moved = [p.detach().to(device).requires_grad_() for p in params]
    here = cls(start(dtype=torch.bfloat16), **options).param_groups[0]["mirror_map"]
    other = MirrorDescent(moved, mirror_map=here.to(device), **options)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, moved, strict=True):
        for key, x in optimizer.state[p].items():
            assert other.state[q][key].device.type == device
            assert other.state[q][key].dtype == x.dtype == torch.float32


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


@pytest.mark.parametrize(("name", "value"), [("nonfinite", "skip"), ("differentiable", True)])
def test_options_of_the_whole_optimizer_do_not_change_in_one_group(name, value):
    params = start()
    optimizer = MirrorDescent([{"params": [p]} for p in params], 0.1)
    optimizer.param_groups[1][name] = value
    give(params, 0)
    with pytest.raises(InputError, match=f"Invalid {name}={value!r} in a parameter group"):
        optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in start()])
    if name == "nonfinite":
        optimizer.param_groups[1][name] = None
        optimizer.defaults[name] = value
        params[0].grad.fill_(torch.nan)
        optimizer.step()
