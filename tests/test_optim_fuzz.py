"""Invariants over options, shapes, dtypes, maps and steps, drawn by hypothesis."""

import io
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import CASES, learned, same, snapshot

from mirror_opt.optim import MirrorDescent

SHAPES = [(), (1,), (3,), (2, 3), (3, 1), (2, 2, 3, 3)]
EMPTY = [(0,), (4, 0)]  # no row of which sums to 1
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def runs(draw):
    case = draw(st.sampled_from(CASES))
    on_simplex = case == ("negative-entropy", {})
    shapes = st.sampled_from(SHAPES if on_simplex else SHAPES + EMPTY)
    momentum = draw(st.sampled_from([0, 0.5, 0.9]))
    rounding = draw(st.sampled_from(["nearest", "stochastic"]))
    dtypes = st.sampled_from(DTYPES[1:] if rounding == "stochastic" else DTYPES)
    tensors = draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3))
    return {
        "case": case,
        "tensors": tensors,
        "own_group": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        "scale": draw(st.sampled_from([0.0, 1e-6, 1.0, 1e3, 1e30])),
        "bad": draw(st.sampled_from([None, None, math.nan, math.inf])),
        "frozen": draw(st.integers(0, 2)),
        "steps": draw(st.integers(1, 3)),
        "options": {
            "lr": draw(st.sampled_from([0.0, 1e-4, 0.1, 10.0])),
            "momentum": momentum,
            "nesterov": momentum > 0 and draw(st.booleans()),
            "weight_decay": draw(st.sampled_from([0, 0.1])),
            "maximize": draw(st.booleans()),
            "dual_state": draw(st.sampled_from([None, False, True])),
            "anchor": draw(st.sampled_from(["auto", "zero"])),
            "foreach": draw(st.sampled_from([None, False, True])),
            "nonfinite": draw(st.sampled_from(["raise", "skip"])),
            "rounding": rounding,
        },
    }


def build(run, values):
    """The parameters, and their optimizer: one group, or the last parameter in one of its own."""
    params = [v.clone().requires_grad_() for v in values]
    name, options = run["case"]
    parts = [params[:-1], params[-1:]] if run["own_group"] and len(params) > 1 else [params]
    groups = [{"params": part, "mirror_map": learned(name, part, options)} for part in parts]
    return params, MirrorDescent(groups, **run["options"])


def attempt(optimizer, seed):
    """How a step ends; stochastic rounding draws the same for every optimizer."""
    torch.manual_seed(seed)
    try:
        optimizer.step()
    except ArithmeticError as error:
        return str(error)
    return "stepped"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(runs())
def test_steps_are_finite_or_refused_and_resume_exactly(run):
    generator = torch.Generator().manual_seed(run["seed"])
    # Rows on the simplex lie in every domain.
    values = [
        torch.rand(shape, generator=generator).softmax(-1).to(dtype)
        for shape, dtype in run["tensors"]
    ]
    params, optimizer = build(run, values)
    for step in range(run["steps"]):
        bad = run["bad"] if step == 1 else None
        for i, p in enumerate(params):
            gradient = run["scale"] * torch.randn(p.shape, generator=generator)
            if bad is not None and p.numel() and i == len(params) - 1:
                gradient.view(-1)[0] = bad
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
        outcomes = [attempt(o, run["seed"] + step) for o in (optimizer, resumed)]
        # Saved and loaded goes on as uninterrupted, and so does a failure.
        assert outcomes[0] == outcomes[1]
        after = snapshot(optimizer)
        assert same(after, snapshot(resumed))
        assert all(t.isfinite().all() for t in after)
        finite = all(p.grad is None or p.grad.isfinite().all() for p in params)
        if not finite:
            assert (outcomes[0] == "stepped") == (run["options"]["nonfinite"] == "skip")
        if not finite or outcomes[0] != "stepped":
            # No value has changed; state may have been created.
            assert same(after[: len(params)], before[: len(params)])
        for i, p in enumerate(params):
            if i == run["frozen"]:
                assert torch.equal(p.detach(), values[i])
