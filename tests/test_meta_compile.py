"""torch.compile of the meta-learner's inner step, as docs/examples/compiled_inner_step.py does."""

import runpy
from pathlib import Path

import pytest
import torch
from optim_cases import COMPILER_WARNINGS
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from mirror_opt import maps, meta

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "compiled_inner_step.py"

pytestmark = COMPILER_WARNINGS


def gradients(learner, loss):
    learner.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in learner.parameters() if p.requires_grad)]


@pytest.mark.parametrize("name", ["diagonal", "meta-curvature", "separable", "kronecker"])
def test_second_order_meta_gradients_through_a_compiled_inner_step(name):
    torch._dynamo.reset()
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    mirror_map = maps.create(name, list(model.parameters()))
    learner = meta.MetaLearner(model, mirror_map, lr=0.1, steps=3)
    compiled = torch.compile(example["inner_step"], backend="aot_eager", fullgraph=True)
    before, graphs = counters["stats"]["unique_graphs"], []
    for _ in range(3):
        batch = [torch.randn(2, 5, n, dtype=torch.float64) for n in (2, 1, 2, 1)]
        expected = gradients(learner, learner.meta_loss(F.mse_loss, *batch))
        assert sum(bool(g.any()) for g in expected[1:]) >= 4  # of the initialisation at least
        for step in (example["inner_step"], compiled):
            found = gradients(learner, example["meta_loss"](learner, step, batch))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(0.01)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    # The first step's, whose dual state needs no gradient yet, and one for all others.
    assert graphs == [2] * 3


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_compiled_meta_loss_is_that_of_the_loss(engine, first_order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    mirror_map = maps.KroneckerNeural(model.parameters())
    learner = meta.MetaLearner(
        model, mirror_map, lr=0.1, steps=2, engine=engine, first_order=first_order
    )
    batch = [torch.randn(2, 5, n, dtype=torch.float64) for n in (2, 1, 2, 1)]
    compiled = torch.compile(learner.meta_loss, backend="aot_eager")
    found = gradients(learner, compiled(F.mse_loss, *batch))
    torch.testing.assert_close(found, gradients(learner, learner.meta_loss(F.mse_loss, *batch)))


# Where gradients that torch.func takes within vmap were differentiated again, these were wrong.
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)], ids=["layer", "batch"]
)
def test_meta_gradients_through_norms_are_those_of_tasks_in_turn(norm):
    torch._dynamo.reset()
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 1)).double()
    learner = meta.MetaLearner(model, lr=0.1, steps=2, engine="loop")
    batch = [torch.randn(2, 5, n, dtype=torch.float64) for n in (2, 1, 2, 1)]
    expected = gradients(learner, learner.meta_loss(F.mse_loss, *batch))
    step = torch.compile(example["inner_step"], backend="aot_eager", fullgraph=True)
    found = gradients(learner, example["meta_loss"](learner, step, batch))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE))["main"](iterations=1, backend="aot_eager")
    assert "query loss" in capsys.readouterr().out
