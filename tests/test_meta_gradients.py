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


class Calls(nn.Module):
    """A normalisation by a function, which no module tells of."""

    def __init__(self, normalise):
        super().__init__()
        self.normalise = normalise
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.normalise(x, None, None, self.scale, self.shift, True)


# Of 4 channels with 3 entries each.
NORMS = {
    "batch, running": lambda: nn.BatchNorm1d(4),
    "batch, evaluated": lambda: nn.BatchNorm1d(4).eval(),
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch, fixed": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "batch, called": lambda: Calls(F.batch_norm),
    "instance, running": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance, fixed": lambda: nn.InstanceNorm1d(4),
    "instance, called": lambda: Calls(F.instance_norm),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm((4, 3)),
    "rms": lambda: nn.RMSNorm((4, 3)),
    "weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "weight, of all": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3), dim=None),
}


def normalised(norm: str) -> nn.Module:
    torch.manual_seed(0)
    between = (nn.Unflatten(1, (4, 3)), NORMS[norm](), nn.Flatten(), nn.Tanh())
    net = nn.Sequential(nn.Linear(2, 12), *between, nn.Linear(12, 1)).double()
    torch.manual_seed(4)
    with torch.no_grad():  # weights of the norm that do not start at 1 and 0
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


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
@pytest.mark.parametrize("norm", [None, "batch", "batch, called", "instance", "layer"])
def test_engines_agree(name, norm):
    gradients = []
    for engine in ("loop", "vmap"):
        model = normalised(norm) if norm else mlp()
        mirror_map = maps.create(name, list(model.parameters()))
        learner = MetaLearner(model, mirror_map, lr=0.1, steps=2, learn_lr=True, engine=engine)
        gradients.append(meta_gradient(learned(learner)))
    assert gradients[0].keys() == gradients[1].keys()
    assert "log_lr" in gradients[0]
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-9, atol=1e-11)


def adapt_each(learner: MetaLearner, sx, sy, qx, qy, **options) -> torch.Tensor:
    adapted = [learner.adapt(F.mse_loss, x, y, **options) for x, y in zip(sx, sy, strict=True)]
    return F.mse_loss(torch.stack([a(x) for a, x in zip(adapted, qx, strict=True)]), qy)


def adapt_all(learner: MetaLearner, sx, sy, qx, qy, **options) -> torch.Tensor:
    return F.mse_loss(learner.adapt_batch(F.mse_loss, sx, sy, **options)(qx), qy)


def meta_loss(learner: MetaLearner, *data) -> torch.Tensor:
    return learner.meta_loss(F.mse_loss, *data)


@pytest.mark.parametrize("engine", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("loss_of", [meta_loss, adapt_all, adapt_each])
@pytest.mark.parametrize(
    ("name", "norm"),
    [*(("kronecker", norm) for norm in NORMS)]
    + [(name, norm) for name in ("euclidean", "meta-curvature") for norm in ("batch", "layer")],
)
def test_finite_differences_with_normalisation(name, norm, loss_of, engine):
    # Gradients of gradients that are taken within vmap are wrong through some of these norms, at
    # 1e-1 to 1e-3 of their size; every way must be right, or refuse.
    model = normalised(norm)
    mirror_map = maps.create(name, list(model.parameters()))
    if engine == "vmap" and "running" in norm:
        with pytest.raises(InputError, match="track_running_stats=False"):
            MetaLearner(model, mirror_map, engine=engine)
        return
    learner = learned(MetaLearner(model, mirror_map, lr=0.1, steps=2, engine=engine))
    named = dict(learner.named_parameters())
    loss_of(learner, *tasks()).backward()
    gradient = {n: p.grad for n, p in named.items() if p.grad is not None}
    assert gradient.keys() >= {f"model.{n}" for n, _ in model.named_parameters()}
    torch.manual_seed(3)
    direction = {n: torch.randn_like(named[n]) for n in gradient}
    h = 1e-5

    def loss_at(t: float) -> float:
        with torch.no_grad():
            for n, d in direction.items():
                named[n].add_(t * d)
            value = loss_of(learner, *tasks()).item()
            for n, d in direction.items():
                named[n].sub_(t * d)
        return value

    finite = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    exact = sum((gradient[n] * d).sum().item() for n, d in direction.items())
    assert exact == pytest.approx(finite, rel=1e-7)


@pytest.mark.parametrize("guard", [True, "auto"])
@pytest.mark.parametrize("lr", [0.1, 1.0])  # steps are refused at the second
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_guarded_runs_of_a_batch_are_differentiable(norm, lr, guard):
    gradients = []
    for loss_of, engine in ((adapt_each, "loop"), (adapt_all, "loop"), (adapt_all, "vmap")):
        model = normalised(norm) if norm else mlp()
        learner = MetaLearner(
            model, maps.Diagonal(model.parameters()), lr=lr, steps=2, engine=engine
        )
        accepted = learner.adapt_batch(F.mse_loss, *tasks()[:2], steps=4, guard=guard).accepted
        assert accepted.shape == (TASKS, 4)
        if guard is True:
            assert bool(accepted.all()) == (lr == 0.1)
        loss_of(learned(learner), *tasks(), steps=4, guard=guard).backward()
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-11)


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
