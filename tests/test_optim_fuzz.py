"""Invariants over options, groups, shapes, dtypes, maps and steps, drawn by hypothesis."""

import io
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import CASES, learned

from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent

SHAPES = [(), (1,), (3,), (2, 3), (3, 1), (2, 2, 3, 3)]
EMPTY = [(0,), (4, 0)]  # no row of which sums to 1
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Those for which there may be a fused step; drawn often enough to meet one.
FUSED = [("euclidean", {}), ("separable", {}), ("separable", {"parametrization": "primal"})]


def domain(case) -> str:
    name, options = case
    return "reals" if name != "negative-entropy" else ("positive" if options else "simplex")


@st.composite
def rates(draw):
    rate = draw(st.sampled_from([0.0, 1e-4, 0.1, 10.0]))
    shape = draw(st.sampled_from([None, (), (1,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return rate if shape is None else torch.full(shape, rate, dtype=dtype)


@st.composite
def groups(draw):
    fused = draw(st.sampled_from([None, False, True]))
    case = draw(st.sampled_from(FUSED if fused else [*CASES, *FUSED]))
    momentum = draw(st.sampled_from([0, 0.5, 0.9]))
    rounding = "nearest" if fused else draw(st.sampled_from(["nearest", "stochastic"]))
    shapes = st.sampled_from(SHAPES if domain(case) == "simplex" else SHAPES + EMPTY)
    dtypes = st.sampled_from(DTYPES[1:] if rounding == "stochastic" else DTYPES)
    if draw(st.booleans()):  # all of one dtype, as fused steps of Euclidean need it
        dtypes = st.just(draw(dtypes))
    anchors = ["auto", "zero", "init"] if domain(case) == "reals" else ["auto", "zero"]
    return {
        "case": case,
        "tensors": draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3)),
        "options": {
            "lr": draw(rates()),
            "momentum": momentum,
            "nesterov": momentum > 0 and draw(st.booleans()),
            "weight_decay": draw(st.sampled_from([0, 0.1])),
            "maximize": draw(st.booleans()),
            "dual_state": draw(st.sampled_from([None, False, True])),
            "anchor": draw(st.sampled_from(anchors)),
            "foreach": None if fused else draw(st.sampled_from([None, False, True])),
            "fused": fused,
            "rounding": rounding,
        },
    }


@st.composite
def runs(draw):
    return {
        "groups": draw(st.lists(groups(), min_size=1, max_size=3)),
        "nonfinite": draw(st.sampled_from(["raise", "skip", "propagate"])),
        "seed": draw(st.integers(0, 2**16)),
        "scale": draw(st.sampled_from([0.0, 1e-6, 1.0, 1e3, 1e30])),
        "bad": draw(st.sampled_from([None, None, math.nan, math.inf])),
        "frozen": draw(st.sets(st.integers(0, 4), max_size=2)),
        "requires_grad": draw(st.booleans()),  # of what is frozen
        "steps": draw(st.integers(1, 3)),
    }


def start(run, generator):
    """Values of the parameters; rows on the simplex lie in every domain."""
    return [
        [torch.rand(s, generator=generator).softmax(-1).to(dtype) for s, dtype in g["tensors"]]
        for g in run["groups"]
    ]


def build(run, values, nonfinite, options=True):
    """The optimizer, with the options of its groups or with none."""
    parts = []
    for group, tensors in zip(run["groups"], values, strict=True):
        params = [v.clone().requires_grad_() for v in tensors]
        name, map_options = group["case"]
        part = {"params": params, "mirror_map": learned(name, params, map_options)}
        parts.append({**part, **(group["options"] if options else {})})
    optimizer = MirrorDescent(parts, nonfinite=nonfinite)
    for i, p in enumerate(parameters(optimizer)):
        p.requires_grad_(i not in run["frozen"] or run["requires_grad"])
    return optimizer


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents(optimizer):
    """The bytes of all that a step may change, by name, and their dtypes."""
    params = parameters(optimizer)
    tensors = {(i, "parameter"): p for i, p in enumerate(params)}
    for i, p in enumerate(params):
        tensors |= {(i, key): value for key, value in optimizer.state.get(p, {}).items()}
    return {
        key: (t.dtype, t.detach().flatten().view(torch.uint8).tolist())
        for key, t in tensors.items()
    }


def is_finite(optimizer):
    states = [t for state in optimizer.state.values() for t in state.values()]
    return all(t.isfinite().all() for t in [*parameters(optimizer), *states])


def saved_and_loaded(run, optimizer, values, nonfinite):
    """A copy by way of a file, with options and rates that come from there."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = build(run, values, nonfinite, options=False)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(parameters(optimizer), parameters(resumed), strict=True):
        q.data.copy_(p.detach())
        q.grad = p.grad
    return resumed


def attempt(optimizer, seed):
    """How a step ends; stochastic rounding draws the same for every optimizer."""
    torch.manual_seed(seed)
    try:
        optimizer.step()
    except (ArithmeticError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return "stepped"


@settings(max_examples=250, deadline=None, derandomize=True)
@given(runs())
def test_steps_are_finite_or_refused_and_resume_exactly(run):
    generator = torch.Generator().manual_seed(run["seed"])
    values, policy = start(run, generator), run["nonfinite"]
    optimizer = build(run, values, policy)
    params = parameters(optimizer)
    for step in range(run["steps"]):
        for i, p in enumerate(params):
            gradient = run["scale"] * torch.randn(p.shape, generator=generator)
            if run["bad"] is not None and step == 1 and p.numel() and i == len(params) - 1:
                gradient.view(-1)[0] = run["bad"]
            p.grad = None if i in run["frozen"] else gradient.to(p.dtype)
        was_finite, before = is_finite(optimizer), contents(optimizer)
        resumed = saved_and_loaded(run, optimizer, values, policy)
        careful = saved_and_loaded(run, optimizer, values, "raise")
        outcome, *others = (attempt(o, run["seed"] + step) for o in (optimizer, resumed, careful))
        after = contents(optimizer)

        # Saved and loaded goes on as uninterrupted, and so does a failure.
        assert outcome == others[0]
        assert after == contents(resumed)
        # What may be done with a result that is not finite changes none that is.
        if others[1] == "stepped":
            assert outcome == "stepped"
            assert after == contents(careful)

        # Finite goes in: finite comes out, or an error.
        finite = all(p.grad is None or p.grad.isfinite().all() for p in params)
        if policy != "propagate":
            assert is_finite(optimizer)
        elif was_finite and not is_finite(optimizer):
            assert others[1] != "stepped"
        groups = optimizer.param_groups
        if "fused=True cannot be served" in outcome:
            assert any(group["fused"] for group in groups)
        elif outcome.startswith("InputError"):
            assert "their product has to be below 1" in outcome
            assert any(group["lr"] * group["weight_decay"] >= 1 for group in groups)
        elif policy == "skip":
            assert outcome == "stepped"
        elif policy == "raise" and not finite:
            assert outcome != "stepped"
        # All or nothing: what was not there may have been created.
        if outcome != "stepped" or (policy == "skip" and others[1] != "stepped"):
            assert {key: after[key] for key in before} == before
        for i in run["frozen"] & set(range(len(params))):
            assert after[i, "parameter"] == before[i, "parameter"]
            assert params[i] not in optimizer.state
