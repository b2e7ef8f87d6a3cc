"""Gradients and results that are not finite never reach the parameters of MirrorDescent."""

import pickle

import pytest
import torch
from optim_cases import descend, learned, parameter, same, snapshot, start

from mirror_opt import maps
from mirror_opt.newton import NewtonError
from mirror_opt.optim import MirrorDescent

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


def test_a_rate_of_zero_hides_no_gradient():
    p = parameter(1.0, 2.0)
    optimizer = MirrorDescent(
        [p], lr=0.0, mirror_map=maps.Hypentropy(), dual_state=True, nonfinite="raise"
    )
    p.grad = torch.tensor([0.0, float("nan")])
    with pytest.raises(FloatingPointError, match="holds NaN or Inf"):
        optimizer.step()


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


def test_a_solve_that_fails_says_where():
    params = [parameter(1.0, 2.0), torch.tensor([3e30, 1.0]).requires_grad_()]
    groups = [{"params": [p], "mirror_map": maps.PNorm(1.1, eps=0.1)} for p in params]
    groups[1]["mirror_map"] = maps.PNorm(20.0, eps=0.1)
    optimizer = MirrorDescent(groups, lr=0.1)
    for p in params:
        p.grad = torch.ones(2)
    with pytest.raises(NewtonError, match="step of group 1 was not taken, and nothing was") as at:
        optimizer.step()
    again = pickle.loads(pickle.dumps(at.value))
    assert (str(again), again.status) == (str(at.value), at.value.status)


def test_overflow_of_the_momentum_is_refused():
    # softmax hides it: the parameters stay finite.
    p = torch.full((3,), 1 / 3).requires_grad_()
    optimizer = MirrorDescent([p], lr=0.1, mirror_map=maps.NegativeEntropy(), momentum=0.9)
    p.grad = torch.tensor([3e38, 0.0, 0.0])
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match=r"the momentum of parameter 0 .* leaves the ra"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_parameter_that_is_nan_already_is_named():
    p = parameter(float("nan"), 1.0)
    p.grad = torch.zeros(2)
    with pytest.raises(FloatingPointError, match=r"parameter 0 .* holds NaN or Inf already"):
        MirrorDescent([p]).step()
