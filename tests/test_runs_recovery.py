"""Training goes back to its last sound state after it has diverged."""

import math

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


@pytest.mark.parametrize(
    ("loss", "norm", "sound"),
    [
        (1.5, 1.0, True),
        (0.0, 9.0, True),
        (math.nan, 1.0, False),
        (1.5, math.inf, False),
        (1e3, 1.0, False),
        (1.5, 11.0, False),
    ],
)
def test_what_is_sound(loss, norm, sound):
    *_, recovery = make()
    assert recovery.sound(1e9, 1.0)  # nothing to compare with yet
    recovery.keep(1.0, 1.0)
    assert recovery.sound(loss, norm) is sound


def test_parameters_and_moments_come_back():
    module, optimizer, recovery = make()
    step(module, optimizer)
    recovery.keep(1.0, 1.0)
    expected = [p.detach().clone() for p in module.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    for _ in range(2):  # and can come back again
        step(module, optimizer)
        with torch.no_grad():
            module.weight.fill_(math.nan)
        recovery.restore()
        for p, e in zip(module.parameters(), expected, strict=True):
            assert torch.equal(p, e)
        for s, m in zip(optimizer.state.values(), moments, strict=True):
            assert torch.equal(s["exp_avg"], m)


def test_rates_are_halved_at_a_return_and_grow_back():
    *_, recovery = make()
    recovery.keep(1.0, 1.0)
    for expected in (0.5, 0.25):
        recovery.restore()
        assert recovery.rate == expected
    for _ in range(10):
        recovery.keep(1.0, 1.0)
    assert recovery.rate == pytest.approx(0.25 * 1.01**10)
    for _ in range(200):
        recovery.keep(1.0, 1.0)
    assert recovery.rate == 1.0


def test_what_is_kept_is_renewed_and_survives_a_checkpoint(tmp_path):
    module, optimizer, recovery = make()
    for _ in range(25):
        recovery.keep(1.0, 1.0)
        step(module, optimizer)
    torch.save(recovery.state_dict(), tmp_path / "state.pt")
    again, other, resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not resumed.sound(1.0, 11.0)
    recovery.restore()
    resumed.restore()
    assert resumed.rate == recovery.rate == 0.5
    fresh = make()[0]
    for a, b, start in zip(
        module.parameters(), again.parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)
    assert other.state_dict()["state"][0]["step"] == 20


def test_a_state_that_soon_fails_again_is_given_up():
    module, _, recovery = make()

    def sound(count: int) -> None:
        for _ in range(count):
            recovery.keep(1.0, 1.0)
            with torch.no_grad():
                module.weight.add_(1.0)

    start = module.weight.detach().clone()
    sound(25)
    for back in (20, 10, 0, 0):  # the first is never given up
        with torch.no_grad():
            module.weight.fill_(math.nan)
        recovery.restore()
        torch.testing.assert_close(module.weight.detach(), start + back)
        sound(5)
    sound(6)  # eleven since: a later state takes its place
    recovery.restore()
    torch.testing.assert_close(module.weight.detach(), start + 10)


def test_states_are_kept_ever_farther_apart():
    *_, recovery = make()
    for _ in range(3000):
        recovery.keep(1.0, 1.0)
    times = [time for time, _ in recovery.state_dict()["kept"]]
    ages = [3000 - time for time in reversed(times)]
    assert times[0] == 0 and ages[:2] == [10, 20]
    assert all(b <= 4 * a for a, b in zip(ages, ages[1:], strict=False))
    assert len(ages) <= 12


def test_a_rate_that_diverges_still_leaves_a_model(tmp_path):
    config = RunConfig.create(
        "sinusoid", "mirror", iterations=60, map_lr=0.3, init_lr=0.01, test_tasks=20, seed=1,
        tasks_per_batch=4,
    )  # fmt: skip
    rows = train(config, tmp_path)
    assert all(row["mean"] is not None and row["mean"] < 100 for row in rows)
