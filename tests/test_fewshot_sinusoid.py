import numpy as np
import torch

from mirror_opt.fewshot import Sinusoid


def test_targets_are_sinusoids_of_the_stated_ranges():
    episodes = Sinusoid(shots=10, queries=10).sample("train", 0, 400)
    x = torch.cat([episodes.support_x, episodes.query_x], 1).double()
    y = torch.cat([episodes.support_y, episodes.query_y], 1).double()
    assert x.min() >= -5
    assert x.max() <= 5
    # y = A cos(phase) sin x - A sin(phase) cos x, so a fit of two numbers gives A and phase.
    fit = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], -1), y).solution[..., 0]
    assert (fit[:, None, 0:1] * x.sin() + fit[:, None, 1:2] * x.cos() - y).abs().max() < 1e-5
    amplitude = fit.norm(dim=1)
    phase = torch.atan2(-fit[:, 1], fit[:, 0])
    for values, (low, high) in ((amplitude, (0.1, 5.0)), (phase, (0.0, np.pi)), (x, (-5, 5))):
        room = 0.02 * (high - low)
        assert low - 1e-5 <= values.min() <= low + room
        assert high - room <= values.max() <= high + 1e-5
        # Uniform: the mean within five standard errors of the middle.
        error = (high - low) / np.sqrt(12 * values.numel())
        assert abs(values.mean() - (low + high) / 2) < 5 * error


def test_regression_has_no_ways():
    family = Sinusoid()
    assert (family.ways, family.shots, family.metric) == (None, 10, "mse")
    assert family.splits == ("train", "val", "test")
    assert family.fingerprint is None  # no data that could be other data
