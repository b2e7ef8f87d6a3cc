"""Meta-gradients: against hand-written unrolls, between engines, against finite differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import maps, meta
from mirror_opt.errors import InputError
from mirror_opt.meta import MetaLearner

TASKS = 3


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 1)
    ).double()


class CallsBatchNorm(nn.Module):
    """Normalises by the batch without a module that says so."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        h = F.batch_norm(self.first(x), None, None, self.scale, self.shift, training=True)
        return self.last(h.tanh())


def batch_norm_call_net() -> nn.Module:
    torch.manual_seed(0)
    return CallsBatchNorm().double()


def other_norms_net() -> nn.Module:
    torch.manual_seed(0)
    instance = nn.Sequential(
        nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    )
    rest = (nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1))
    return nn.Sequential(*instance, *rest).double()


def tasks(n: int = 6):
    torch.manual_seed(1)
    return tuple(torch.randn(TASKS, n, d, dtype=torch.float64) for d in (2, 1, 2, 1))


def learned(learner: MetaLearner) -> MetaLearner:
    """Moves the map away from the identity, so that no derivative is trivially right."""
    sx, sy, *_ = tasks()
    learner.calibrate(F.mse_loss, sx, sy)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in learner.mirror_map.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return learner


def meta_gradient(learner: MetaLearner, data=None) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    learner.meta_loss(F.mse_loss, *(data or tasks())).backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


def hand_written_maml(model, data, lr, steps, first_order):
    """MAML with nothing of the package in it."""
    names = [n for n, _ in model.named_parameters()]
    init = list(model.parameters())
    losses = []
    for sx, sy, qx, qy in zip(*data, strict=True):
        params = init
        for _ in range(steps):
            out = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (sx,))
            grads = torch.autograd.grad(F.mse_loss(out, sy), params, create_graph=not first_order)
            params = [p - lr * g for p, g in zip(params, grads, strict=True)]
        out = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (qx,))
        losses.append(F.mse_loss(out, qy))
    loss = torch.stack(losses).mean()
    return loss, torch.autograd.grad(loss, init)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_maml_equals_a_hand_written_unroll(engine, first_order, steps):
    model = mlp()
    learner = MetaLearner(model, lr=0.1, steps=3, first_order=first_order, engine=engine)
    loss, expected = hand_written_maml(model, tasks(), 0.1, steps, first_order)
    ours = learner.meta_loss(F.mse_loss, *tasks(), steps=steps)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-12)
    ours.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(n for n, c in maps.REGISTRY.items() if c.domain == "reals"))
@pytest.mark.parametrize("net", [mlp, batch_norm_net, batch_norm_call_net, other_norms_net])
def test_engines_agree(name, net):
    gradients = []
    for engine in ("loop", "vmap"):
        model = net()
        mirror_map = maps.create(name, list(model.parameters()))
        learner = MetaLearner(model, mirror_map, lr=0.1, steps=2, learn_lr=True, engine=engine)
        gradients.append(meta_gradient(learned(learner)))
    assert gradients[0].keys() == gradients[1].keys()
    assert "log_lr" in gradients[0]
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["euclidean", "separable", "kronecker", "meta-curvature"])
def test_finite_differences_with_batch_norm(engine, name):
    # The gradient over vmap of batch norm is wrong at second order; every engine must be right.
    model = batch_norm_net()
    mirror_map = maps.create(name, list(model.parameters()))
    learner = learned(MetaLearner(model, mirror_map, lr=0.3, steps=2, engine=engine))
    gradient = meta_gradient(learner)
    torch.manual_seed(3)
    named = {n: p for n, p in learner.named_parameters() if n in gradient}
    direction = {n: torch.randn_like(p) for n, p in named.items()}
    h = 1e-5

    def loss_at(t: float) -> float:
        with torch.no_grad():
            for n, p in named.items():
                p.add_(t * direction[n])
            value = learner.meta_loss(F.mse_loss, *tasks()).item()
            for n, p in named.items():
                p.sub_(t * direction[n])
        return value

    finite = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    exact = sum((gradient[n] * direction[n]).sum().item() for n in named)
    assert exact == pytest.approx(finite, rel=1e-7)


def test_adapt_batch_refuses_the_wrong_second_order_gradient():
    learner = MetaLearner(batch_norm_net(), engine="vmap")
    sx, sy, qx, _ = tasks()
    with pytest.raises(InputError, match="meta_loss"):
        learner.adapt_batch(F.mse_loss, sx, sy)
    with torch.no_grad():
        assert learner.adapt_batch(F.mse_loss, sx, sy)(qx).shape == (TASKS, 6, 1)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_adapted_is_differentiable(engine):
    model = mlp()
    learner = learned(
        MetaLearner(model, maps.KroneckerNeural(model.parameters()), lr=0.1, engine=engine)
    )
    expected = meta_gradient(learner)
    sx, sy, qx, qy = tasks()
    learner.zero_grad()
    predictions = learner.adapt_batch(F.mse_loss, sx, sy)(qx)
    F.mse_loss(predictions, qy).backward()
    for name, p in learner.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11)
    learner.zero_grad()
    for t in range(TASKS):
        adapted = learner.adapt(F.mse_loss, sx[t], sy[t])
        torch.testing.assert_close(adapted(qx[t]), predictions[t])
        (F.mse_loss(adapted(qx[t]), qy[t]) / TASKS).backward()
    for name, p in learner.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11)


def test_gradient_flows_through_a_guarded_run():
    model = mlp()
    learner = MetaLearner(model, maps.Diagonal(model.parameters()), lr=0.1, steps=2)
    sx, sy, qx, qy = (x[0] for x in tasks())
    adapted = learner.adapt(F.mse_loss, sx, sy, steps=4)
    assert adapted.accepted.all()
    F.mse_loss(adapted(qx), qy).backward()
    plain = learner.adapt(F.mse_loss, sx, sy, steps=4, guard=False)
    expected = torch.autograd.grad(F.mse_loss(plain(qx), qy), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_anil_adapts_the_head_and_learns_the_body():
    model = mlp()
    learner = meta.build("anil", model, lr=0.1, steps=2)
    assert learner.names == ("2.weight", "2.bias")
    gradient = meta_gradient(learner)
    assert {n for n, g in gradient.items() if g.abs().sum() > 0} == {
        f"model.{n}" for n, _ in model.named_parameters()
    }
    sx, sy, _, _ = tasks()
    assert set(learner.adapt(F.mse_loss, sx[0], sy[0]).params) == {"2.weight", "2.bias"}


def test_skipped_tasks_leave_the_others_alone():
    data = tasks()
    data[0][1] = float("nan")
    rest = tuple(x[[0, 2]] for x in data)
    for engine in ("loop", "vmap"):
        learner = MetaLearner(mlp(), lr=0.1, steps=2, engine=engine, nonfinite="skip")
        expected = meta_gradient(learner, rest)
        for key, value in meta_gradient(learner, data).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-14)
