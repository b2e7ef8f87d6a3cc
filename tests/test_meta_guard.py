"""The guard's rule, step by step, against the same in numbers."""

import math

import pytest
import torch
from torch import nn

from mirror_opt import maps
from mirror_opt.meta import MetaLearner


class Scalar(nn.Module):
    """w x, so that at x = 1 a loss of the prediction is a function of w."""

    def __init__(self, w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return self.w * x


def follow(loss, w=1.0, lr=0.1, steps=3, guard=True, horizon=1, mirror_map=None):
    model, one = Scalar(w), torch.ones(1, dtype=torch.float64)
    geometry = mirror_map and mirror_map(model)
    learner = MetaLearner(model, geometry, lr=lr, steps=horizon, engine="loop")
    return learner.adapt(lambda p, y: loss(p.squeeze()), one, one, steps=steps, guard=guard)


LOSSES = {  # value and slope in w
    "quadratic": (lambda w: w**2 / 2, lambda w: w),
    "quartic": (lambda w: w**4 / 4, lambda w: w**3),
    # Flat, and steep below 1: a long step is refused, half of it is far from too long.
    "wall": (
        lambda w: w**2 / 4 + 50 * (w < 1) * (1 - w) ** 2,
        lambda w: w / 2 - 100 * (w < 1) * (1 - w),
    ),
}


def documented(value, slope, w, alpha, steps, horizon, trusted):
    """The rule of ``meta.stability``: losses before each step, and which steps are taken."""
    size, theta = 1.0, 1.0
    losses, accepted = [], []
    for k in range(steps):
        a, g = size * alpha, slope(w)
        candidate = w - a * g
        s, r = g * (candidate - w), slope(candidate) * (candidate - w)
        beta = abs(s - r) / (a * abs(s))
        bound = value(w) + 0.1 * min(s, 0) + 1e-6 * abs(value(w)) + 1e-10
        taken = k < trusted or value(candidate) <= bound
        losses.append(value(w))
        accepted.append(taken)
        limit = 0.7 / (beta * alpha)
        if not taken:
            theta = min(theta, 1.0)
            size = min(size / 2, max(limit, size / 1000)) if k + 1 >= horizon else size / 2
        elif k + 1 >= horizon:
            grown = min(1.0, size * math.sqrt(1 + theta), limit)
            theta, size = grown / size, grown
        w = candidate if taken else w
    return losses, accepted


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("guard", [True, "auto"])
@pytest.mark.parametrize("start", [0.6, 3.1])
@pytest.mark.parametrize("alpha", [0.3, 1.7, 1.9, 8.0])
@pytest.mark.parametrize("name", LOSSES)
def test_the_rule_is_the_documented_one(name, alpha, start, guard, horizon):
    value, slope = LOSSES[name]
    result = follow(value, start, alpha, 8, guard, horizon)
    trusted = horizon if guard == "auto" else 0
    losses, accepted = documented(value, slope, start, alpha, 8, horizon, trusted)
    assert result.accepted.tolist() == accepted
    losses = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(result.losses, losses, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "rise", "taken"),
    [(1, 5e-7, True), (1, 2e-6, False), (0, 5e-11, True), (0, 1e-9, False)],
)
def test_rounding_of_the_loss_is_no_rise(size, rise, taken):
    # Once w has moved the loss is higher by a little, of which no gradient tells.
    found = follow(lambda p: size + rise * (p.detach() != 1) + 1e-14 * p)
    assert bool(found.accepted[0]) is taken


def test_a_step_uphill_gets_no_allowance_for_its_slope():
    def flipped(model):
        curvature = maps.MetaCurvature(model.parameters())
        with torch.no_grad():
            for p in curvature.parameters():
                p.neg_()
        return curvature

    # Uphill the slope promises a rise of 100, and the loss, which saturates, rises by 1.
    found = follow(lambda p: 1 - torch.exp(-p), w=0.0, lr=100.0, mirror_map=flipped)
    assert not bool(found.accepted.any())


def test_a_candidate_outside_the_domain_of_the_loss_is_halved():
    found = follow(lambda p: p**2 / 2 + 0 * p.sqrt(), lr=1.5)
    assert found.accepted.tolist() == [False, True, True]
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("lr", [50.0, 100.0, 1e6])
def test_a_candidate_that_overflows_does_not_end_adaptation(lr):
    found = follow(torch.cosh, w=3.0, lr=lr, steps=100)
    assert not bool(found.accepted[0])
    assert found.losses[-1] < 0.2 * found.losses[0]
