"""Bad batches are left out, and training goes back to a sound state after it has diverged."""

import itertools
import math
import random

import pytest
import torch
from torch import nn

from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.recovery import Recovery
from mirror_opt.runs.train import train


def make() -> tuple[nn.Linear, torch.optim.Optimizer, Recovery]:
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    return module, optimizer, Recovery(module, optimizer)


def step(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.ones(3, 2)).square().mean().backward()
    optimizer.step()


class Walk:
    """A module whose weight counts the iterations that were taken."""

    def __init__(self):
        self.module, _, self.recovery = make()
        nn.init.zeros_(self.module.weight)

    def take(self, count: int, loss: float = 1.0) -> list[bool]:
        taken = []
        for _ in range(count):
            taken.append(self.recovery.admit(loss, 1.0))
            if taken[-1]:
                with torch.no_grad():
                    self.module.weight.add_(1.0)
        return taken

    def fail(self) -> None:
        """Bad batches until training goes back."""
        before = self.recovery.rate
        for i in range(5):
            assert not self.recovery.admit(math.nan, 1.0)
            if self.recovery.rate < before:
                assert i > 0
                return
        pytest.fail("nothing but bad batches, and no return")

    @property
    def at(self) -> float:
        return self.module.weight[0, 0].item()


@pytest.mark.parametrize(
    ("loss", "norm", "usual"),
    [
        (1.5, 1.0, True),
        (0.0, 90.0, True),
        (math.nan, 1.0, False),
        (1.5, math.inf, False),
        (1e3, 1.0, False),
        (1.5, 110.0, False),
    ],
)
def test_a_bad_batch_is_left_out_and_nothing_else(loss, norm, usual):
    walk = Walk()
    walk.take(15)
    assert walk.recovery.admit(loss, norm) is usual
    assert walk.at == 15
    assert walk.recovery.rate == 1.0


@pytest.mark.parametrize("deviation", [0.5, 1.5, 2.5])
def test_heavy_tails_are_not_divergence(deviation):
    # Small losses of few examples: as log-normal as they come, and no trend.
    draws = random.Random(0)
    walk = Walk()
    for _ in range(1500):
        z = draws.gauss(0, 1)
        other = 0.8 * z + 0.6 * draws.gauss(0, 1)
        walk.recovery.admit(1e-4 * math.exp(deviation * z), math.exp(deviation * other))
    assert walk.recovery.rate == 1.0


def test_divergence_is_seen_through_heavy_tails():
    draws = random.Random(0)
    walk = Walk()
    for _ in range(500):
        walk.recovery.admit(math.exp(1.5 * draws.gauss(0, 1)), 1.0)
    admitted = [walk.recovery.admit(50 * math.exp(1.5 * draws.gauss(0, 1)), 1.0) for _ in range(60)]
    assert walk.recovery.rate < 1.0
    assert not all(admitted)


def test_rates_do_not_vanish():
    walk = Walk()
    walk.take(1)
    for _ in range(60):
        walk.recovery.admit(math.nan, 1.0)
    assert walk.recovery.rate == 2.0**-10


def test_rare_bad_batches_never_lead_back():
    walk = Walk()
    for _ in range(40):
        walk.take(4)
        assert not walk.recovery.admit(math.inf, math.inf)
    assert walk.at == 160
    assert walk.recovery.rate == 1.0


def test_parameters_and_moments_come_back():
    module, optimizer, recovery = make()
    step(module, optimizer)
    recovery.admit(1.0, 1.0)
    expected = [p.detach().clone() for p in module.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    for expected_rate in (0.5, 0.25):  # and can come back again
        step(module, optimizer)
        with torch.no_grad():
            module.weight.fill_(math.nan)
        while recovery.rate > expected_rate:
            recovery.admit(math.nan, math.nan)
        for p, e in zip(module.parameters(), expected, strict=True):
            assert torch.equal(p, e)
        for s, m in zip(optimizer.state.values(), moments, strict=True):
            assert torch.equal(s["exp_avg"], m)


def test_a_loss_that_rises_for_good_leads_back():
    walk = Walk()
    walk.take(25)
    assert walk.take(3, loss=90.0) == [True, True, False]
    assert walk.at == 20
    assert walk.recovery.rate == 0.5
    walk = Walk()  # from the first state on it may rise, which is of one batch
    assert all(walk.take(1, loss=0.01) + walk.take(30, loss=0.1))


def test_rates_are_halved_at_a_return_and_grow_back():
    walk = Walk()
    walk.take(1)
    for expected in (0.5, 0.25):
        walk.fail()
        assert walk.recovery.rate == expected
    walk.take(10)
    assert walk.recovery.rate == pytest.approx(0.25 * 1.01**10)
    walk.take(200)
    assert walk.recovery.rate == 1.0


def test_a_state_that_soon_fails_again_is_given_up():
    walk = Walk()
    walk.take(25)
    for back in (20, 10, 0, 0):  # the first is never given up
        with torch.no_grad():
            walk.module.weight.fill_(math.nan)
        walk.fail()
        assert walk.at == back
        walk.take(5)
    walk.take(6)  # eleven since: a later state takes its place
    walk.fail()
    assert walk.at == 10


def test_states_are_kept_ever_farther_apart():
    walk = Walk()
    walk.take(3000)
    times = [time for time, *_ in walk.recovery.state_dict()["kept"]]
    ages = [3000 - time for time in reversed(times)]
    assert times[0] == 0
    assert ages[:2] == [10, 20]
    assert all(b <= 4 * a for a, b in itertools.pairwise(ages))
    assert len(ages) <= 12


def test_what_is_kept_survives_a_checkpoint(tmp_path):
    module, optimizer, recovery = make()
    for _ in range(25):
        recovery.admit(1.0, 1.0)
        step(module, optimizer)
    recovery.admit(math.nan, 1.0)
    torch.save(recovery.state_dict(), tmp_path / "state.pt")
    again, other, resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):  # four bad ones in a row, of which one was before
        assert not recovery.admit(math.nan, 1.0)
        assert not resumed.admit(math.nan, 1.0)
    assert resumed.rate == recovery.rate == 0.5
    fresh = make()[0]
    for a, b, start in zip(
        module.parameters(), again.parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)
    assert other.state_dict()["state"][0]["step"] == 20


def test_a_rate_that_diverges_still_leaves_a_model(tmp_path):
    config = RunConfig.create(
        "sinusoid", "mirror", iterations=60, map_lr=0.1, init_lr=0.01, test_tasks=20, seed=1,
        tasks_per_batch=4,
    )  # fmt: skip
    rows = train(config, tmp_path)
    trained = next(row["mean"] for row in rows if row["adapt_steps"] == config.train_steps)
    assert trained is not None
    assert trained < 100


def test_the_running_means_and_variances():
    recovery = make()[2]
    for x in (0.0, 1.0, 3.0):
        assert recovery.admit(math.exp(x), 1.0)
    state = recovery.state_dict()
    assert state["means"][0] == pytest.approx(0.9 * 0.1 + 0.1 * 3)
    assert state["variances"][0] == pytest.approx(0.98 * 0.02 + 0.02 * (3 - 0.1) ** 2)


@pytest.mark.parametrize(("log", "usual"), [(9.9, True), (10.1, False)])
def test_a_spike_is_beyond_five_deviations(log, usual):
    recovery = make()[2]
    known = {"means": (0.0, 0.0), "variances": (4.0, 4.0)}
    recovery.load_state_dict({**recovery.state_dict(), **known})
    assert recovery.admit(math.exp(log), 1.0) is usual


def test_means_and_variances_go_back_with_the_state():
    walk = Walk()
    walk.take(21)  # the last kept state is of iteration 20
    state = walk.recovery.state_dict()
    walk.take(5, loss=2.0)
    walk.fail()
    back = walk.recovery.state_dict()
    assert walk.at == 20
    assert (back["means"], back["variances"]) == (state["means"], state["variances"])


def test_a_resumed_run_knows_that_it_has_just_gone_back():
    walk, again = Walk(), Walk()
    walk.take(25, loss=1.5)
    walk.fail()
    again.recovery.load_state_dict(walk.recovery.state_dict())
    again.fail()
    assert again.at == 10  # 20 failed again: the one before it


def test_small_losses_have_spikes_too():
    walk = Walk()
    walk.take(15, loss=1e-6)
    assert not walk.recovery.admit(1e-3, 1.0)
