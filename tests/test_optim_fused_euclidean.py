"""MirrorDescent's fused step of Euclidean: that of torch's own SGD."""

import math

import pytest
import torch
from optim_cases import as_on_an_accelerator, descend, same, snapshot, start

from mirror_opt import maps
from mirror_opt.optim import MirrorDescent, fused

EUCLIDEAN = [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1}, {"lr": torch.tensor(0.1), "momentum": 0.9},
]  # fmt: skip


def euclidean(flagged=False, dtype=torch.float32, **options):
    """Three steps of a fused Euclidean optimizer; flagged: the third has a NaN."""
    params = start("euclidean", {}, dtype)
    optimizer = MirrorDescent(params, **{"lr": 0.1, **options})
    descend(optimizer, params, 2)
    if flagged:
        params[1].grad[1] = math.nan
    optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", EUCLIDEAN, ids=str)
def test_the_fused_euclidean_step_is_sgd(options, dtype, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(fused.EuclideanStep, "take", None)  # not callable: taken it would fail
        unfused = euclidean(dtype=dtype, fused=False, **options)
        with pytest.raises(TypeError):
            euclidean(dtype=dtype, **options)
    assert same(euclidean(dtype=dtype, **options), unfused)
    # As on an accelerator, where nothing is read back, and the kernel may round otherwise.
    as_on_an_accelerator(monkeypatch)
    for x, y in zip(euclidean(dtype=dtype, nonfinite="skip", **options), unfused, strict=True):
        torch.testing.assert_close(x, y, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_fused_decay_beside_an_unfused_group_keeps_float64():
    found = []
    for nonfinite in ("raise", "skip"):
        p, q = (torch.tensor([0.7], dtype=torch.float64, requires_grad=True) for _ in range(2))
        groups = [{"params": [p]}, {"params": [q], "mirror_map": maps.Hypentropy()}]
        optimizer = MirrorDescent(groups, lr=1e-4, weight_decay=0.1, nonfinite=nonfinite)
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("options", EUCLIDEAN, ids=str)
@pytest.mark.parametrize("accelerator", [False, True])
def test_a_fused_euclidean_step_that_is_not_finite_changes_nothing(
    accelerator, options, monkeypatch
):
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    finite, flagged = (euclidean(flag, nonfinite="skip", **options) for flag in (False, True))
    params = start("euclidean", {}, torch.float32)
    optimizer = MirrorDescent(params, **{"lr": 0.1, **options})
    descend(optimizer, params, 2)
    assert same(flagged, snapshot(optimizer))
    assert not same(finite, flagged)
    if not accelerator:
        with pytest.raises(FloatingPointError, match="the gradient of parameter 1"):
            euclidean(True, **options)


def test_a_fused_euclidean_step_leaves_scaled_gradients_to_the_scaler():
    params = start("euclidean", {}, torch.float32)
    optimizer = MirrorDescent(params, 0.1)
    assert not optimizer._step_supports_amp_scaling
    optimizer.grad_scale = torch.tensor(4.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, x in zip(params, before, strict=True):
        torch.testing.assert_close(p, x - 0.1 / 4)
        assert (p.grad == 1).all()
