"""torch.compile of the meta-learner's inner step, as docs/examples/compiled_inner_step.py does."""

import runpy
from pathlib import Path

import pytest
import torch
from optim_cases import COMPILER_WARNINGS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mirror_opt import maps, meta

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "compiled_inner_step.py"

pytestmark = COMPILER_WARNINGS


@pytest.mark.parametrize("name", ["kronecker", "separable", "diagonal", "meta-curvature"])
def test_second_order_meta_gradients_through_a_compiled_inner_step(name):
    torch._dynamo.reset()
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    mirror_map = maps.create(name, list(model.parameters()))
    learner = meta.MetaLearner(model, mirror_map, lr=0.1, steps=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(example["inner_step"], backend=counter, fullgraph=True)
    graphs = []
    for _ in range(3):
        batch = [torch.randn(2, 5, n, dtype=torch.float64) for n in (2, 1, 2, 1)]
        results = []
        for step in (example["inner_step"], compiled):
            learner.zero_grad()
            loss = example["meta_loss"](learner, step, batch)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in learner.parameters())])
        expected = learner.meta_loss(torch.nn.functional.mse_loss, *batch)
        torch.testing.assert_close(results[0][0], expected.detach())
        for x, y in zip(*results, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        assert sum(g is not None and g.abs().max() > 0 for g in results[0][1:]) >= 4
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(0.01)
        graphs.append(counter.frame_count)
    # What the first steps take, whose dual state needs no gradient yet, and nothing later.
    assert graphs == [graphs[0]] * 3
    assert graphs[0] <= 3
