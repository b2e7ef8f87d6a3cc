"""Learned inner rates of a run: they move, and are what a resumed run goes on with."""

import math

import pytest
import torch
from runs_cases import InterruptedFamily

from mirror_opt import fewshot
from mirror_opt.cli import main
from mirror_opt.runs import checkpoint, results

TINY = {
    "task": "sinusoid",
    "shots": 4,
    "queries": 4,
    "iterations": 8,
    "tasks-per-batch": 2,
    "train-steps": "1-3",
    "adapt-steps": "0,1",
    "test-tasks": 4,
    "lr": 0.02,
}
COMMAND = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]


def rates(out):
    return checkpoint.load(out / "checkpoint.pt")["learner"]["log_lr"]


@pytest.mark.parametrize("method", ["maml", "mirror"])
def test_learned_rates_move(tmp_path, method):
    learned, fixed, faster = tmp_path / "learned", tmp_path / "fixed", tmp_path / "faster"
    command = ["train", *COMMAND, "--method", method]
    assert main([*command, "--out", str(fixed)]) == 0
    assert main([*command, "--learn-lr", "--out", str(learned)]) == 0
    assert main([*command, "--learn-lr", "--rate-lr", "0.1", "--out", str(faster)]) == 0
    start = torch.full((3,), math.log(0.02))
    assert torch.allclose(rates(fixed), start)
    moved = (rates(learned) - start).abs()
    assert moved.min() > 1e-3  # Adam at 0.01 moves by about that much an iteration
    assert moved.max() < 0.1
    assert (rates(faster) - start).abs().max() > 0.1


def _at_once():
    raise KeyboardInterrupt


def test_resumed_with_learned_rates_is_the_same(tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    command = ["train", *COMMAND, "--learn-lr", "--save-every", "0"]
    assert main([*command, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        make = fewshot.make_task
        patch.setattr(
            fewshot, "make_task", lambda *a, **k: InterruptedFamily(make(*a, **k), 5, _at_once)
        )
        assert main([*command, "--out", str(out)]) == 130
    assert checkpoint.load(out / "checkpoint.pt")["iteration"] == 5
    assert main(["train", "--out", str(out), "--resume", "--learn-lr"]) == 0
    assert torch.equal(rates(whole), rates(out))
    for one, other in zip(*(results.read(o / "results.json") for o in (whole, out)), strict=True):
        assert one["mean"] == other["mean"]
    assert main(["evaluate", "--out", str(out), "--adapt-steps", "2"]) == 0


def test_rates_are_part_of_what_a_run_is(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["compare", "--methods", "maml,mirror", *COMMAND]
    assert main([*command, "--rate-lr", "0.1", "--out", str(out)]) == 2
    assert "--rate-lr 0.1: the inner rates are not learned; pass --learn-lr" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    assert main([*command, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["compare", "--out", str(out), "--resume", "--learn-lr"]) == 2
    assert f"--learn-lr true: the run in {out} has false" in capsys.readouterr().err
