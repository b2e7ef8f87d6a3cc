"""The guard: more steps than were trained never destroy a model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import maps
from mirror_opt.meta import MetaLearner

TASKS, STEPS = 6, 60


def make(map_name: str, lr: float, engine: str = "vmap") -> MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 1)).double()
    mirror_map = maps.create(map_name, list(model.parameters()))
    learner = MetaLearner(model, mirror_map, lr=lr, steps=1, engine=engine)
    with torch.no_grad():
        for p in mirror_map.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return learner


def data():
    torch.manual_seed(1)
    x = 10 * torch.rand(TASKS, 10, 1, dtype=torch.float64) - 5
    return x, 3 * torch.sin(x)


def follow(learner, guard):
    x, y = data()
    return learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y, adapt_steps=(1, STEPS), guard=guard)


@pytest.mark.parametrize("map_name", ["euclidean", "kronecker", "separable", "meta-curvature"])
@pytest.mark.parametrize("lr", [0.02, 0.5, 50.0])
def test_guarded_loss_never_rises(map_name, lr):
    result = follow(make(map_name, lr), guard=True)
    rise = result.losses.diff(dim=1)
    assert bool((rise <= 1e-6 * result.losses[:, :-1].abs() + 1e-10).all())
    assert torch.isfinite(result.metrics[STEPS]).all()
    assert result.accepted.shape == (TASKS, STEPS)


def test_without_the_guard_a_long_step_diverges():
    unguarded = follow(make("euclidean", 0.5), guard=False)
    guarded = follow(make("euclidean", 0.5), guard="auto")
    assert not bool((unguarded.losses[:, -1] < unguarded.losses[:, 0]).all())
    assert bool((guarded.losses[:, -1] < guarded.losses[:, 1]).all())


def test_trained_steps_are_left_alone():
    # Within the horizon "auto" changes nothing, whatever the loss does there.
    learner = make("euclidean", 0.5)
    unguarded, guarded = follow(learner, guard=False), follow(learner, guard="auto")
    assert torch.equal(unguarded.metrics[1], guarded.metrics[1])
    assert bool((unguarded.losses[:, 1] > unguarded.losses[:, 0]).any())  # and it did rise
    assert bool(guarded.accepted[:, 0].all())
    assert bool((guarded.losses[:, 1:].diff(dim=1) <= 1e-6 * guarded.losses[:, 1:-1]).all())


def test_steps_that_the_bound_allows_are_not_touched():
    learner = make("euclidean", 1e-3)
    unguarded, guarded = follow(learner, guard=False), follow(learner, guard=True)
    assert bool(guarded.accepted.all())
    torch.testing.assert_close(guarded.losses, unguarded.losses)


@pytest.mark.parametrize("map_name", ["euclidean", "kronecker"])
def test_engines_agree(map_name):
    loop, vmap = (follow(make(map_name, 0.3, engine), True) for engine in ("loop", "vmap"))
    torch.testing.assert_close(loop.losses, vmap.losses, rtol=1e-6, atol=1e-9)
    assert torch.equal(loop.accepted, vmap.accepted)


def test_every_direction_of_a_valid_map_descends():
    # <g, phi_new - phi> < 0 for every monotone map; a free linear preconditioner may go uphill.
    assert bool((follow(make("kronecker", 0.02), guard=True).slopes <= 0).all())
    flipped = make("meta-curvature", 0.02)
    with torch.no_grad():
        for p in flipped.mirror_map.parameters():
            p.neg_()
    assert bool((follow(flipped, guard=True).slopes > 0).any())


def test_nonfinite_candidates_are_refused_at_every_step():
    learner = make("euclidean", 1e300)
    result = follow(learner, guard="auto")
    assert torch.isfinite(result.losses).all()
    assert not bool(result.accepted[:, 0].any())
    assert torch.isfinite(result.metrics[STEPS]).all()
