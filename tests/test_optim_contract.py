"""MirrorDescent as any torch optimizer: options, groups, hooks, schedulers, checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from optim_cases import CASES, IDS, descend, learned, quadratic, same, snapshot, start
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import lr_scheduler, swa_utils

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.newton import NewtonError
from mirror_opt.optim import MirrorDescent


def parameter(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"Invalid lr=-0.1: pass a number in \[0, inf\)"),
        ({"lr": float("nan")}, "Invalid lr=nan"),
        ({"lr": float("inf")}, "Invalid lr=inf"),
        ({"lr": "0.1"}, "Invalid lr='0.1'"),
        ({"lr": torch.tensor(-1.0)}, r"Invalid lr=tensor\(-1.\)"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"Tensor lr must be 1-element, got shape \(2,\)"),
        ({"momentum": 1.0}, r"Invalid momentum=1.0: pass a number in \[0, 1\)"),
        ({"momentum": -0.5}, "Invalid momentum=-0.5"),
        ({"weight_decay": -1}, r"Invalid weight_decay=-1: pass a number in \[0, inf\)"),
        ({"weight_decay": torch.tensor(0.1)}, "Invalid weight_decay=tensor"),
        ({"nesterov": True}, r"Invalid nesterov=True with momentum=0: pass a momentum in \(0, 1\)"),
        ({"nesterov": "yes", "momentum": 0.9}, "Invalid nesterov='yes': pass one of True, False"),
        ({"anchor": "here"}, "Invalid anchor='here': pass one of 'auto', 'init', 'zero'"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite='ignore': pass one of 'raise', 'skip'"),
        ({"dual_state": 2}, "Invalid dual_state=2"),
        ({"foreach": True, "differentiable": True}, "pass foreach=False"),
        ({"mirror_map": maps.Hypentropy}, "Invalid mirror_map=.*pass an instance of a map"),
        ({"mirror_map": maps.Diagonal([torch.ones(3)])}, "was built for tensors of shapes"),
        ({"mirror_map": maps.NegativeEntropy()}, "not in the domain of NegativeEntropy"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    params = [parameter(1.0, -2.0)]
    with pytest.raises(InputError, match=message) as error:
        MirrorDescent(params, **options)
    assert "\n" not in str(error.value)
    # And the same for a group of its own.
    optimizer = MirrorDescent([parameter(1.0)])
    with pytest.raises(
        InputError, match=message if "differentiable" not in options else "foreach|whole"
    ):
        optimizer.add_param_group({"params": params, **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_parameters_are_real_floating_tensors(dtype):
    with pytest.raises(InputError, match=f"is {dtype}: pass float16, bfloat16, float32 or float64"):
        MirrorDescent([torch.ones(2, dtype=dtype)])


def test_errors_of_the_base_class_stay():
    p = parameter(1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        MirrorDescent([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        MirrorDescent(p)
    with pytest.raises(ValueError, match="more than one parameter group"):
        MirrorDescent([{"params": p}, {"params": p}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        MirrorDescent([p, p])


@pytest.mark.parametrize("name", ["differentiable", "nonfinite"])
def test_options_of_the_whole_optimizer_are_not_for_a_group(name):
    optimizer = MirrorDescent([parameter(1.0)])
    value = {"differentiable": True, "nonfinite": "skip"}[name]
    with pytest.raises(InputError, match="holds for the whole optimizer"):
        optimizer.add_param_group({"params": [parameter(2.0)], name: value})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradient_is_refused_before_anything_changes():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    dense = parameter(1.0)
    optimizer = MirrorDescent([("dense", dense), ("table", embedding.weight)], momentum=0.9)
    (dense.sum() + embedding(torch.tensor([1])).sum()).backward()
    before = [dense.detach().clone(), embedding.weight.detach().clone()]
    with pytest.raises(InputError, match=r"parameter 'table' is torch\.sparse_coo"):
        optimizer.step()
    assert same([dense.detach(), embedding.weight.detach()], before)


# Around a step.


def test_closure_runs_with_gradients():
    p = parameter(1.0)
    optimizer = MirrorDescent([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 1
    assert p.item() == 0
    assert optimizer.step() is None


def test_step_leaves_the_grad_mode_and_builds_no_graph():
    params = start("separable", {})
    mirror_map = learned("separable", params, {})
    optimizer = MirrorDescent(params, lr=0.1, mirror_map=mirror_map, momentum=0.9, dual_state=True)
    descend(optimizer, params, 2)
    assert torch.is_grad_enabled()
    state = [t for s in optimizer.state.values() for t in s.values()]
    assert not any(t.requires_grad for t in state)
    assert all(p.is_leaf and p.requires_grad for p in params)


def test_step_hooks_fire():
    calls = []
    p = parameter(1.0)
    optimizer = MirrorDescent([p], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append(("pre", p.item())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("post", p.item())))
    p.grad = torch.ones(1)
    optimizer.step()
    assert calls == [("pre", 1), ("post", 0.5)]


def test_zero_grad():
    p = parameter(1.0)
    optimizer = MirrorDescent([p], foreach=True)
    p.grad = torch.ones(1)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.item() == 0
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()
    assert p.item() == 1


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=0),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("as_lr", [float, torch.tensor])
def test_schedulers_drive_it_as_they_drive_sgd(scheduler, as_lr):
    ends, rates = [], []
    for cls in (MirrorDescent, torch.optim.SGD):
        p = parameter(1.0, -2.0)
        optimizer = cls([p], lr=as_lr(0.1), momentum=0.8)
        schedule = SCHEDULERS[scheduler](optimizer)
        rates.append([])
        for _ in range(6):
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
            loss = descend(optimizer, [p], 1)[-1]
            schedule.step(*([loss] if scheduler == "plateau" else []))
        ends.append(p.detach())
    assert torch.equal(*ends)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_weight_averaging_wraps_it():
    model = torch.nn.Linear(2, 1)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = MirrorDescent(model.parameters(), lr=0.1, dual_state=True)
    for _ in range(3):
        descend(optimizer, list(model.parameters()), 1)
        average.update_parameters(model)
    assert torch.isfinite(average.module.weight).all()
    assert not torch.equal(average.module.weight, model.weight)


def test_grad_scaler_scales_and_skips():
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    scaled, plain = (MirrorDescent([x], lr=0.1, momentum=0.9) for x in (p, q))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    descend(plain, [q], 1)
    scaler.scale(quadratic([p])).backward()
    scaler.step(scaled)
    scaler.update()
    assert torch.equal(p, q)
    before = snapshot(scaled)
    p.grad.fill_(float("inf"))
    scaler.step(scaled)
    scaler.update()
    assert same(snapshot(scaled), before)
    assert scaler.get_scale() == 512


def test_group_can_join_later():
    p, q = parameter(1.0), torch.full((3,), 1 / 3).requires_grad_()
    optimizer = MirrorDescent([("p", p)], lr=0.1, momentum=0.9)
    descend(optimizer, [p], 2)
    optimizer.add_param_group({"params": [("q", q)], "mirror_map": maps.NegativeEntropy(), "lr": 1})
    group = optimizer.param_groups[1]
    assert group["momentum"] == 0.9
    assert group["param_names"] == ["q"]
    losses = descend(optimizer, [p, q], 2)
    assert losses[-1] < losses[0]
    assert "NegativeEntropy" in repr(optimizer)


# Checkpoints.


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_saved_and_resumed_is_uninterrupted(name, options, dtype):
    # bfloat16 rounds rows off the simplex by more than float32 does, within what the map accepts.
    settings = {"lr": 0.05, "momentum": 0.9, "dual_state": dtype == torch.bfloat16 or None}
    params = start(name, options, dtype)
    mirror_map = learned(name, params, options)
    optimizer = MirrorDescent(params, mirror_map=mirror_map, **settings)
    descend(optimizer, params, 3)
    saved = through_a_file(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    descend(optimizer, params, 3)

    others = [v.clone().requires_grad_() for v in values]
    resumed = MirrorDescent(others, lr=1.0, mirror_map=learned(name, others, options, seed=5))
    resumed.load_state_dict(saved)
    assert isinstance(resumed.param_groups[0]["mirror_map"], maps.MirrorMap)
    before = copy.deepcopy(saved["state"])
    descend(resumed, others, 3)
    assert same(snapshot(resumed), snapshot(optimizer))
    if settings["dual_state"]:
        assert all(t.dtype == torch.float32 for s in resumed.state.values() for t in s.values())
    # Steps write in place, but not into the checkpoint.
    for p, state in before.items():
        assert same(list(state.values()), list(saved["state"][p].values()))


def test_state_dict_holds_plain_values_only():
    params = start("kronecker", {})
    optimizer = MirrorDescent(params, mirror_map=maps.KroneckerNeural(params), momentum=0.9)
    descend(optimizer, params, 1)

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, str | int)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        else:
            assert value is None or type(value) in (torch.Tensor, int, float, bool, str)

    saved = optimizer.state_dict()
    walk(saved)
    packed = saved["param_groups"][0]["mirror_map"]
    assert packed["name"] == "kronecker"
    assert packed["state"].keys() == optimizer.param_groups[0]["mirror_map"].state_dict().keys()


def trained(mirror_map, *values):
    p = parameter(*(values or (1.0, 2.0)))
    optimizer = MirrorDescent(
        [("w", p)], lr=0.1, mirror_map=mirror_map([p]), momentum=0.9, dual_state=True
    )
    descend(optimizer, [p], 2)
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trained(lambda p: maps.Hypentropy()), "is of mirror map 'hypentropy' and this"),
        (
            lambda: trained(lambda p: maps.PNorm(3.0)),
            r"map 'pnorm' has p 3.0, this group's has 1.5",
        ),
        (
            lambda: trained(lambda p: maps.PNorm(1.5), 1.0),
            r"dual of parameter 'w' has shape \(1,\)|"
            r"momentum_buffer of parameter 'w' has",
        ),
        (lambda: torch.optim.SGD([parameter(1.0, 2.0)]), "load what MirrorDescent.state_dict"),
    ],
)
def test_checkpoint_of_something_else_is_refused_and_changes_nothing(other, message):
    optimizer = trained(lambda p: maps.PNorm(1.5))
    before = snapshot(optimizer)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(InputError, match=message) as error:
        optimizer.load_state_dict(other().state_dict())
    assert "\n" not in str(error.value)
    assert same(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_checkpoint_of_a_map_with_other_tensors_is_refused():
    few = trained(lambda p: maps.SeparableNeural(p, units=2))
    many = trained(lambda p: maps.SeparableNeural(p, units=4))
    before = {k: v.clone() for k, v in many.param_groups[0]["mirror_map"].state_dict().items()}
    with pytest.raises(InputError, match=r"of shape \(1, 2\), this group's has \(1, 4\)|of shape"):
        many.load_state_dict(few.state_dict())
    after = many.param_groups[0]["mirror_map"].state_dict()
    assert same(list(before.values()), list(after.values()))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dual_state", [False, True])
def test_state_loads_into_parameters_of_another_dtype(to, dual_state):
    p = parameter(1.0, 2.0)
    options = {"lr": 0.1, "momentum": 0.9, "dual_state": dual_state, "anchor": "init"}
    optimizer = MirrorDescent([p], **options)
    descend(optimizer, [p], 2)
    q = p.detach().to(to).requires_grad_()
    other = MirrorDescent([q], **options)
    other.load_state_dict(optimizer.state_dict())
    expected = torch.promote_types(to, torch.float32) if dual_state else to
    assert other.state[q].keys() == optimizer.state[p].keys()
    assert all(t.dtype == expected for t in other.state[q].values())
    descend(optimizer, [p], 3)
    descend(other, [q], 3)
    torch.testing.assert_close(q.detach().float(), p.detach(), rtol=0.02, atol=0.02)


def test_checkpoint_from_before_an_option_existed():
    optimizer = trained(lambda p: maps.Hypentropy())
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("nesterov", "maximize", "dual_state", "anchor", "foreach", "nonfinite"):
        del saved["param_groups"][0][name]
    p = parameter(1.0, 2.0)
    other = MirrorDescent([p], mirror_map=maps.Hypentropy(), nonfinite="skip")
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["maximize"], group["dual_state"], group["anchor"]) == (False, None, "auto")
    assert group["nonfinite"] == "skip"
    descend(other, [p], 1)


def test_hooks_of_saving_and_loading_see_what_is_saved_and_loaded():
    optimizer = trained(lambda p: maps.Hypentropy())
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda o, saved: seen.append(saved["param_groups"][0]["mirror_map"]["name"])
    )

    def rename(o, saved):
        seen.append(type(saved["state"][0]["dual"]))
        groups = [{**g, "lr": 0.25} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(type(t) for t in o.state[o.param_groups[0]["params"][0]].values())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["hypentropy"] + [torch.Tensor] * 4
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", ["hypentropy", "kronecker"])
def test_copies_go_on_alike_and_apart(copied, name):
    params = start(name, {})
    optimizer = MirrorDescent(
        params, lr=0.05, mirror_map=learned(name, params, {}), momentum=0.9, dual_state=True
    )
    descend(optimizer, params, 2)
    twin = copied(optimizer)
    before = snapshot(twin)
    descend(optimizer, params, 2)
    assert same(snapshot(twin), before)
    descend(twin, twin.param_groups[0]["params"], 2)
    assert same(snapshot(twin), snapshot(optimizer))


def test_defaults_changed_later_hold_for_later_groups():
    optimizer = MirrorDescent([parameter(1.0)], lr=0.1)
    optimizer.defaults["lr"] = 0.5
    optimizer.add_param_group({"params": [parameter(1.0)]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_distributed_checkpoints_know_its_state():
    params = start("kronecker", {})
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(params[0].detach().clone())})
    optimizer = MirrorDescent(
        model.parameters(), mirror_map=maps.KroneckerNeural(list(model.parameters())), momentum=0.9
    )
    descend(optimizer, [model["w"]], 2)
    saved = copy.deepcopy(distributed.get_optimizer_state_dict(model, optimizer))
    assert saved["state"]["w"].keys() == {"momentum_buffer", "anchor", "dual"}
    before = snapshot(optimizer)
    descend(optimizer, [model["w"]], 2)
    with torch.no_grad():
        model["w"].copy_(before[0])
    distributed.set_optimizer_state_dict(model, optimizer, saved)
    assert same(snapshot(optimizer), before)


# Values that are not finite.

BAD = [float("nan"), float("inf"), float("-inf")]


def pair_with_bad_gradient(bad: float, **options):
    """Two groups, stepped once; then the second one's gradient goes bad."""
    p, q = parameter(1.0, 2.0), torch.full((3,), 1 / 3).requires_grad_()
    optimizer = MirrorDescent(
        [
            {"params": [("p", p)]},
            {"params": [("q", q)], "mirror_map": maps.NegativeEntropy(), "dual_state": True},
        ],
        lr=0.1,
        momentum=0.9,
        **options,
    )
    descend(optimizer, [p, q], 1)
    p.grad = torch.ones(2)
    q.grad = torch.tensor([0.0, bad, 0.0])
    return optimizer, q


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("options", [{}, {"nonfinite": "raise"}], ids=str)
def test_nonfinite_gradient_raises_before_anything_changes(bad, options):
    optimizer, _ = pair_with_bad_gradient(bad, **options)
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match="gradient of parameter 'q' holds NaN or Inf"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("foreach", [False, True])
def test_nonfinite_gradient_skips_the_whole_step(bad, foreach):
    optimizer, q = pair_with_bad_gradient(bad, nonfinite="skip", foreach=foreach)
    before = snapshot(optimizer)
    optimizer.step()
    assert same(snapshot(optimizer), before)
    q.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert not any(
        torch.equal(x, y) for x, y in zip(snapshot(optimizer)[:2], before[:2], strict=True)
    )


def test_nonfinite_gradient_propagates_when_asked():
    optimizer, q = pair_with_bad_gradient(float("nan"), nonfinite="propagate")
    optimizer.step()
    assert q.isnan().all()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_result_out_of_range_is_not_stored(policy):
    # sinh of the step overflows though the gradient is finite.
    p = parameter(1.0)
    optimizer = MirrorDescent([p], lr=1.0, mirror_map=maps.Hypentropy(), nonfinite=policy)
    p.grad = torch.full((1,), -1e4)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"step of parameter 0 .* leaves the range of"):
            optimizer.step()
    else:
        optimizer.step()
    assert p.item() == 1


def test_result_out_of_the_range_of_a_narrow_parameter_is_not_stored():
    p = parameter(6e4, dtype=torch.float16)
    optimizer = MirrorDescent([p], lr=1.0)
    p.grad = torch.full_like(p, -6e4)
    with pytest.raises(FloatingPointError, match=r"leaves the range of torch.float16"):
        optimizer.step()
    assert p.item() == torch.tensor(6e4, dtype=torch.float16)


def test_saturating_map_does_not_hide_a_gradient():
    # softmax([0, 0, -inf]) is finite.
    p = torch.full((3,), 1 / 3).requires_grad_()
    optimizer = MirrorDescent([p], lr=1.0, mirror_map=maps.NegativeEntropy())
    p.grad = torch.tensor([0.0, 0.0, float("inf")])
    with pytest.raises(FloatingPointError, match="gradient of parameter 0"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_failed_solve_is_not_stored(policy):
    params = start("separable", {}, torch.float32)
    mirror_map = learned("separable", params, {"parametrization": "primal"})
    optimizer = MirrorDescent(params, lr=0.1, mirror_map=mirror_map, nonfinite=policy, momentum=0.9)
    descend(optimizer, params, 1)
    before = snapshot(optimizer)
    params[1].grad.fill_(float("nan"))
    if policy == "skip":
        optimizer.step()
    else:
        error = {"raise": FloatingPointError, "propagate": NewtonError}[policy]
        with pytest.raises(error, match="NaN or Inf"):
            optimizer.step()
    assert same(snapshot(optimizer), before)


def test_overflow_of_the_momentum_is_refused():
    # softmax hides it: the parameters stay finite.
    p = torch.full((3,), 1 / 3).requires_grad_()
    optimizer = MirrorDescent([p], lr=0.1, mirror_map=maps.NegativeEntropy(), momentum=0.9)
    p.grad = torch.tensor([3e38, 0.0, 0.0])
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match="the momentum or the dual state overflows"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_parameter_that_is_nan_already_is_named():
    p = parameter(float("nan"), 1.0)
    p.grad = torch.zeros(2)
    with pytest.raises(FloatingPointError, match=r"parameter 0 .* holds NaN or Inf already"):
        MirrorDescent([p]).step()
