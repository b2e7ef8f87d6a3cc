"""Differentiating through steps: against hand-written unrolls and finite differences."""

import pytest
import torch
from optim_cases import CASES, IDS, learned
from torch import Tensor

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent

STEPS = 3
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "dual_state": True},
    {"momentum": 0.5, "weight_decay": 0.3},
    {"momentum": 0.5, "weight_decay": 0.3, "dual_state": True, "maximize": True},
]


def initial(name: str = "euclidean") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return (phi.softmax(-1) if name == "negative-entropy" else phi).requires_grad_()


def task_loss(phi: Tensor) -> Tensor:
    return (phi**4 / 4 + torch.sin(phi)).sum() + phi.sum() ** 2 / 2


def with_optimizer(phi_0: Tensor, lr, mirror_map, options: dict) -> Tensor:
    p = phi_0.clone()
    optimizer = MirrorDescent([p], lr=lr, mirror_map=mirror_map, differentiable=True, **options)
    for _ in range(STEPS):
        phi = p.clone()  # the step writes p in place, and autograd keeps what the loss has read
        (p.grad,) = torch.autograd.grad(task_loss(phi), phi, create_graph=True)
        optimizer.step()
    return task_loss(p.clone())


def by_hand(phi_0: Tensor, lr, mirror_map, options: dict) -> Tensor:
    momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    sign = -1 if options.get("maximize") else 1
    anchor = phi_0 if mirror_map.anchored else torch.zeros_like(phi_0)
    phi, buffer = phi_0, torch.zeros_like(phi_0)
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(task_loss(phi), phi, create_graph=True)
        gradient = sign * gradient
        buffer = momentum * buffer + gradient
        direction = gradient + momentum * buffer if options.get("nesterov") else buffer
        (z,) = mirror_map([(1 - lr * decay) * phi - anchor])
        phi = anchor + mirror_map.inverse([z - lr * direction])[0]
    return task_loss(phi)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "map_options"), CASES, ids=IDS)
def test_gradients_are_those_of_the_unroll_by_hand(name, map_options, options):
    results = []
    for run in (with_optimizer, by_hand):
        phi_0, lr = initial(name), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        mirror_map = learned(name, [phi_0], map_options)
        loss = run(phi_0, lr, mirror_map, options)
        wanted = [phi_0, lr, *mirror_map.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append([loss, *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert all(g.abs().max() > 1e-4 for g in results[0][1:3])
    of_map = results[0][3:]
    assert not of_map or any(g.abs().max() > 1e-4 for g in of_map)


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
@pytest.mark.parametrize(("name", "map_options"), CASES, ids=IDS)
def test_gradients_are_finite_differences(name, map_options, options):
    mirror_map = learned(name, [initial(name)], map_options)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    values = list(mirror_map.parameters())
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss(phi_0: Tensor, lr: Tensor, t: Tensor) -> Tensor:
        # The map's parameters, moved by t along a fixed direction.
        moved = dict(
            zip(
                (key for key, _ in mirror_map.named_parameters()),
                (v.detach() + t * a for v, a in zip(values, along, strict=True)),
                strict=True,
            )
        )
        with torch.nn.utils.stateless._reparametrize_module(mirror_map, moved):
            return with_optimizer(phi_0, lr, mirror_map, options)

    assert torch.autograd.gradcheck(loss, (initial(name), lr, t), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_first_momentum_is_not_detached():
    # torch.optim.SGD(differentiable=True, momentum=0.9) gives 0 here.
    gradient = torch.ones(2, requires_grad=True)
    p = torch.zeros(2, requires_grad=True).clone()
    p.grad = gradient * 1
    MirrorDescent([p], lr=0.1, momentum=0.9, differentiable=True).step()
    p.sum().backward()
    assert torch.equal(gradient.grad, torch.full((2,), -0.1))


@pytest.mark.parametrize(("name", "map_options"), CASES, ids=IDS)
def test_steps_are_those_without_autograd(name, map_options):
    ends = []
    for differentiable in (False, True):
        leaf = initial(name)
        p = leaf.clone() if differentiable else leaf
        mirror_map = learned(name, [p], map_options)
        optimizer = MirrorDescent(
            [p], lr=0.1, mirror_map=mirror_map, momentum=0.9, differentiable=differentiable,
            fused=False,
        )  # fmt: skip
        for _ in range(3):
            p.grad = torch.cos(p.detach())
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_leaf_is_refused():
    p = initial()
    optimizer = MirrorDescent([p], differentiable=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(InputError, match="pass non-leaf parameters"):
        optimizer.step()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_refused_step_leaves_no_trace_in_the_graph(policy):
    gradients = []
    for bad in (False, True):
        phi_0 = initial()
        p = phi_0.clone()
        optimizer = MirrorDescent(
            [p],
            lr=0.1,
            mirror_map=maps.Hypentropy(),
            momentum=0.9,
            differentiable=True,
            nonfinite=policy,
            dual_state=True,
        )
        for k in range(3):
            p.grad = 2 * p.clone()
            if bad and k == 1:
                p.grad = p.grad * float("nan")
                if policy == "raise":
                    with pytest.raises(FloatingPointError):
                        optimizer.step()
                else:
                    optimizer.step()
                p.grad = 2 * p.clone()
            optimizer.step()
        gradients += torch.autograd.grad(p.sum(), phi_0)
    assert torch.equal(*gradients)


def test_recorded_learning_rate_costs_no_precision():
    # A tensor times a bfloat16 gradient would be rounded to bfloat16.
    duals = []
    for lr in (0.1, torch.tensor(0.1, requires_grad=True)):
        p = torch.zeros(3, dtype=torch.bfloat16)
        optimizer = MirrorDescent([p], lr=lr, differentiable=True, dual_state=True)
        p.grad = torch.tensor([1.0, -0.7, 0.3], dtype=torch.bfloat16)
        optimizer.step()
        duals.append(optimizer.state[p]["dual"].detach())
    torch.testing.assert_close(*duals)
