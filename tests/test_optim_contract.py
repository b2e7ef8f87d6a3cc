"""MirrorDescent as any torch optimizer: options, groups, hooks, schedulers."""

import numpy as np
import pytest
import torch
from optim_cases import descend, learned, parameter, quadratic, same, snapshot, start
from torch.optim import lr_scheduler, swa_utils

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent

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
        ({"maximize": np.array([1, 2])}, "Invalid maximize=array.*: pass one of True, False"),
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


def test_a_group_that_cannot_be_checked_is_not_added():
    optimizer = MirrorDescent([parameter(1.0)])
    rate = torch.tensor(0.1, device="meta")  # whose value no one can ask
    with pytest.raises(InputError, match="Invalid lr on the meta device: pass a number in"):
        optimizer.add_param_group({"params": [parameter(1.0)], "lr": rate})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [torch.ones(2, 2).to_sparse()], "is torch.sparse_coo: pass p.to_dense()"),
        (lambda: [torch.ones(2, 2).to_sparse_csr()], "is torch.sparse_csr: pass p.to_dense()"),
        (lambda: torch.nn.LazyLinear(2).parameters(), "not initialised: pass a batch through"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_parameters_that_cannot_be_stepped_are_told_what_to_do(make, message):
    with pytest.raises(InputError, match=message):
        MirrorDescent(make(), 0.1, maps.NegativeEntropy())


def test_maps_say_what_parameters_to_pass():
    model = torch.nn.LazyLinear(2)
    with pytest.raises(InputError, match=r"parameter 0 .* is not initialised: pass a batch"):
        maps.KroneckerNeural(model.parameters())
    with pytest.raises(InputError, match=r"is tuple: .*such as those of model.parameters\(\)"):
        maps.KroneckerNeural(torch.nn.Linear(2, 2).named_parameters())


def test_messages_have_one_line():
    for options in ({"lr": torch.nn.Parameter(torch.tensor(-0.1))},
                    {"mirror_map": torch.nn.Sequential(torch.nn.Linear(1, 1))}):  # fmt: skip
        with pytest.raises(InputError) as caught:
            MirrorDescent([parameter(1.0)], **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("simplex", [True, False])
def test_weight_decay_does_not_leave_the_domain(simplex):
    p = parameter(0.7, 0.2, 0.1)
    optimizer = MirrorDescent([p], 10.0, maps.NegativeEntropy(simplex), weight_decay=0.1)
    p.grad = torch.zeros(3)
    with pytest.raises(InputError, match=r"weight_decay=0.1 with lr=10.0 .* below 1"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([0.7, 0.2, 0.1]))
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.step()
    assert (p > 0).all()


def test_parameters_whose_values_are_not_there_yet():
    lazy = torch.nn.LazyLinear(2)
    optimizer = MirrorDescent(lazy.parameters(), 0.1, maps.Hypentropy())
    lazy(torch.ones(1, 3)).sum().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, lazy.weight)
    MirrorDescent([torch.ones(3, device="meta")], mirror_map=maps.NegativeEntropy())
    MirrorDescent([torch.ones(3, 0)], mirror_map=maps.NegativeEntropy())


@pytest.mark.parametrize("shape", [(1,), (1, 3)])
def test_parameters_whose_entries_share_memory_are_refused(shape):
    expanded = torch.zeros(shape).expand(4, *shape[1:]).requires_grad_()
    with pytest.raises(ValueError, match=r"parameter 0 .* is expanded, .* pass p.contiguous"):
        MirrorDescent([expanded])


def test_errors_of_the_base_class_stay():
    p = parameter(1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        MirrorDescent([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        MirrorDescent(p)
    with pytest.raises(ValueError, match="more than one parameter group"):
        MirrorDescent([{"params": p}, {"params": p}])


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_a_repeated_parameter_is_stepped_once(options):
    p, q = parameter(1.0), parameter(1.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        repeated = MirrorDescent([p, p], lr=0.1, momentum=0.9, **options)
    once = MirrorDescent([q], lr=0.1, momentum=0.9, **options)
    for _ in range(2):
        for x, optimizer in ((p, repeated), (q, once)):
            x.grad = torch.ones_like(x)
            optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("options", [{}, {"dual_state": True}], ids=str)
def test_a_rate_of_zero_leaves_every_bit(lr, options):
    for name in maps.REGISTRY:
        params = start(name, {}, torch.float32)
        before = [p.detach().clone() for p in params]
        mirror_map = learned(name, params, {})
        optimizer = MirrorDescent(params, lr=lr, mirror_map=mirror_map, weight_decay=0.1, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert same([p.detach() for p in params], before)


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


@pytest.mark.parametrize("name", maps.REGISTRY)
def test_step_leaves_the_grad_mode_and_builds_no_graph(name):
    params = start(name, {})
    mirror_map = learned(name, params, {})
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


@pytest.mark.parametrize("name", maps.REGISTRY)
@pytest.mark.parametrize("as_lr", [float, torch.tensor])
def test_schedulers_drive_every_map(name, as_lr):
    for scheduler, schedule_of in SCHEDULERS.items():
        # By a scheduler, and by hand with the rates and momenta that it gave.
        scheduled, by_hand = start(name, {}), start(name, {})
        optimizer, other = (
            MirrorDescent(ps, lr=lr, mirror_map=learned(name, ps, {}), momentum=0.8)
            for ps, lr in ((scheduled, as_lr(0.1)), (by_hand, 1.0))
        )
        schedule, rates = schedule_of(optimizer), []
        for _ in range(6):
            group = optimizer.param_groups[0]
            rates.append((float(group["lr"]), group["momentum"]))
            other.param_groups[0].update(zip(("lr", "momentum"), rates[-1], strict=True))
            loss, _ = descend(optimizer, scheduled, 1)
            descend(other, by_hand, 1)
            schedule.step(*([loss] if scheduler == "plateau" else []))
        assert same(snapshot(optimizer), snapshot(other))
        assert len(set(rates)) > 1


@pytest.mark.parametrize("averaging", ["swa", "ema"])
@pytest.mark.parametrize("name", ["euclidean", "hypentropy", "kronecker"])
def test_weight_averaging_wraps_it(name, averaging):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    ema = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)} if averaging == "ema" else {}
    average = swa_utils.AveragedModel(model, **ema)
    params = list(model.parameters())
    optimizer = MirrorDescent(params, 0.1, learned(name, params, {}), dual_state=True)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    trail = []
    for _ in range(3):
        descend(optimizer, params, 1)
        schedule.step()
        average.update_parameters(model)
        trail.append([p.detach().clone() for p in params])
    for i, p in enumerate(average.module.parameters()):
        first, second, third = (at[i] for at in trail)
        mean = (first + second + third) / 3
        torch.testing.assert_close(
            p.detach(), mean if averaging == "swa" else first / 4 + second / 4 + third / 2
        )
    swa_utils.update_bn([torch.randn(8, 2)], average)
    # Training goes on from the average, beside the dual state of what it replaces.
    model.load_state_dict(average.module.state_dict())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, x in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), x)


def test_a_scheduler_drives_every_group_by_its_own_rate():
    ends = []
    for cls in (MirrorDescent, torch.optim.SGD):
        params = [parameter(1.0, -2.0), parameter(3.0), parameter(4.0)]
        rates = (0.1, 0.01, 1e-28)
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
        optimizer = cls(groups, momentum=0.8)
        first = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        second = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1 / (k + 1)] * 3)
        for _ in range(4):
            descend(optimizer, params, 1)
            first.step()
            second.step()
        ends.append([*(p.detach() for p in params), *(g["lr"] for g in optimizer.param_groups)])
    assert all(map(torch.equal, ends[0][:3], ends[1][:3]))
    assert ends[0][3:] == ends[1][3:]


@pytest.mark.parametrize("name", maps.REGISTRY)
def test_grad_scaler_scales_and_skips(name):
    ps, qs = (start(name, {}, torch.float32) for _ in range(2))
    scaled, plain = (
        MirrorDescent(xs, lr=0.1, momentum=0.9, mirror_map=learned(name, xs, {})) for xs in (ps, qs)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    descend(plain, qs, 1)
    scaler.scale(quadratic(ps)).backward()
    scaler.step(scaled)
    scaler.update()
    assert same(snapshot(scaled), snapshot(plain))
    before = snapshot(scaled)
    ps[0].grad.fill_(float("inf"))
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
