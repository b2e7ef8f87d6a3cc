"""Invariants over options, shapes, dtypes, maps and steps, drawn by hypothesis."""

import io

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import CASES, learned, same, snapshot

from mirror_opt.optim import MirrorDescent

SHAPES = [(), (1,), (3,), (2, 3), (3, 1), (2, 2, 3, 3)]
EMPTY = [(0,), (4, 0)]  # no row of which sums to 1


@st.composite
def runs(draw):
    case = draw(st.sampled_from(CASES))
    on_simplex = case == ("negative-entropy", {})
    shapes = st.sampled_from(SHAPES if on_simplex else SHAPES + EMPTY)
    momentum = draw(st.sampled_from([0, 0.5, 0.9]))
    return {
        "case": case,
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64])),
        "shapes": draw(st.lists(shapes, min_size=1, max_size=3)),
        "seed": draw(st.integers(0, 2**16)),
        "scale": draw(st.sampled_from([0.0, 1e-6, 1.0, 1e3, 1e30])),
        "frozen": draw(st.integers(0, 2)),
        "steps": draw(st.integers(1, 3)),
        "options": {
            "lr": draw(st.sampled_from([0.0, 1e-4, 0.1, 10.0])),
            "momentum": momentum,
            "nesterov": momentum > 0 and draw(st.booleans()),
            "weight_decay": draw(st.sampled_from([0, 0.1])),
            "maximize": draw(st.booleans()),
            "dual_state": draw(st.sampled_from([None, False, True])),
            "foreach": draw(st.booleans()),
        },
    }


def build(run, values):
    params = [v.clone().requires_grad_() for v in values]
    name, options = run["case"]
    mirror_map = learned(name, params, options)
    return params, MirrorDescent(params, mirror_map=mirror_map, **run["options"])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(runs())
def test_steps_are_finite_or_refused_and_resume_exactly(run):
    generator = torch.Generator().manual_seed(run["seed"])
    # Rows on the simplex lie in every domain.
    values = [
        torch.rand(s, generator=generator).softmax(-1).to(run["dtype"]) for s in run["shapes"]
    ]
    params, optimizer = build(run, values)
    for _ in range(run["steps"]):
        for i, p in enumerate(params):
            gradient = run["scale"] * torch.randn(p.shape, generator=generator)
            p.grad = None if i == run["frozen"] else gradient.to(p.dtype)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        before = snapshot(optimizer)
        resumed_params, resumed = build(run, values)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for p, q in zip(params, resumed_params, strict=True):
            q.data.copy_(p.detach())
            q.grad = p.grad
        outcomes = []
        for o in (optimizer, resumed):
            try:
                o.step()
                outcomes.append("stepped")
            except ArithmeticError as error:
                outcomes.append(str(error))
        # Saved and loaded goes on as uninterrupted, and so does a failure.
        assert outcomes[0] == outcomes[1]
        after = snapshot(optimizer)
        assert same(after, snapshot(resumed))
        assert all(t.isfinite().all() for t in after)
        if outcomes[0] != "stepped":  # refused: no value has changed (state may have been created)
            assert same(after[: len(params)], before[: len(params)])
        for i, p in enumerate(params):
            if i == run["frozen"]:
                assert torch.equal(p.detach(), values[i])
