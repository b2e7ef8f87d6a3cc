"""A step in a CUDA graph: nothing of it goes through the host, and replays are steps."""

import functools
import runpy
from pathlib import Path

import pytest
import torch
from optim_cases import CASES, IDS, learned, snapshot, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirror_opt import MirrorDescent, backends, maps
from mirror_opt.errors import InputError
from mirror_opt.optim import fused, state

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "cuda_graph.py"

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# Without a device, tensors that have no data stand for those of an accelerator: what asks for a
# value fails, and an operator that meets the host is seen.


class OnDevice(TorchDispatchMode):
    """Names the operators that take tensors of the host, or indices, which come from there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        name = function.name().partition("::")[2]
        if any(t.device.type != "meta" for t in tensors) or name.startswith("index"):
            self.found.append(name)
        return result


def without_data(name, map_options, **options):
    """An optimizer after a step, and its parameters, moved where tensors have no data."""
    params = start(name, {}, torch.float32)
    params.append(params[1].detach().clone().requires_grad_())
    mirror_map = learned(name, params, map_options)
    optimizer = MirrorDescent(params, 0.1, mirror_map, momentum=0.9, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    mirror_map.to("meta")
    moved = [torch.nn.Parameter(p.detach().to("meta")) for p in params]
    state = {q: optimizer.state.pop(p) for p, q in zip(params, moved, strict=True)}
    for p, tensors in state.items():
        optimizer.state[p] = {kind: t.to("meta") for kind, t in tensors.items()}
    optimizer.param_groups[0].update(params=moved, lr=torch.empty((), device="meta"))
    return optimizer, moved


@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize(("name", "map_options"), CASES, ids=IDS)
def test_a_step_on_an_accelerator_takes_nothing_from_the_host(name, map_options, policy):
    for options in ({}, {"dual_state": True}, {"foreach": True}):
        options = {"fused": False, **options}
        optimizer, params = without_data(name, map_options, nonfinite=policy, **options)
        mirror_map = optimizer.param_groups[0]["mirror_map"]
        dual = bool(options.get("dual_state")) or not mirror_map.forward_is_closed
        if not (mirror_map.inverse_is_closed and (mirror_map.forward_is_closed or dual)):
            pytest.skip("a solve asks whether it has converged")
        for p in params[:-1]:  # of two alike one has a gradient
            p.grad = torch.ones_like(p)
        with OnDevice() as seen:
            optimizer.step()
        assert seen.found == []


@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_a_fused_step_on_an_accelerator_takes_a_rate_at_most_from_the_host(policy, monkeypatch):
    optimizer, params = without_data("separable", {}, nonfinite=policy)
    gains = [torch.empty_like(p) for p in params]
    columns = [torch.empty(4, len(p), device="meta") for p in params]
    cached = fused._Coefficients([], [], gains, (columns, columns, columns), True, None)
    monkeypatch.setattr(fused, "_coefficients", lambda *args: cached)
    monkeypatch.setattr(backends, "choose", lambda *args: None)  # a kernel, which does not run
    for p in params[:-1]:
        p.grad = torch.ones_like(p)
    for lr, expected in ((torch.empty((), device="meta"), []), (0.1, ["separable_step_"])):
        optimizer.param_groups[0]["lr"] = lr
        with torch.device("meta"), OnDevice() as seen:  # whatever the default device
            optimizer.step()
        assert [name for name in seen.found if name not in ("lift_fresh", "detach")] == expected


def test_state_that_a_graph_would_create_anew_is_refused(monkeypatch):
    def refuse(p):
        raise InputError("captured")

    refusing = functools.partial(monkeypatch.setattr, state, "_check_not_captured")
    check = state._check_not_captured
    for mirror_map, options in ((maps.Euclidean(), {"momentum": 0.9}),
                                (maps.Hypentropy(), {"dual_state": True})):  # fmt: skip
        (p, *_) = params = start("hypentropy", {})
        optimizer = MirrorDescent(params, 0.1, mirror_map, **options)
        p.grad = torch.ones_like(p)
        refusing(refuse)
        with pytest.raises(InputError, match="captured"):
            optimizer.step()
        refusing(check)
        optimizer.step()
        refusing(refuse)
        optimizer.step()


def test_the_example_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="needs a CUDA device, and there is none"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


# With one.


class Run:
    """An optimizer on the device whose gradients stay where they are, and a rate that is there."""

    def __init__(self, name, device="cuda", **options):
        params = start(name, {}, torch.float32)
        mirror_map = learned(name, params, {}).to(device)
        self.params = [p.detach().to(device).requires_grad_() for p in params]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.lr = torch.tensor(0.1, device=device)
        self.optimizer = MirrorDescent(self.params, self.lr, mirror_map, momentum=0.9, **options)

    def give(self, k, bad=False):
        """The gradients and the rate of step k."""
        generator = torch.Generator().manual_seed(k)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        if bad:
            self.params[0].grad[0] = torch.nan
        self.lr.fill_(0.1 * 0.8**k)

    def step(self, k, replay=None, bad=False):
        self.give(k, bad)
        (replay or self.optimizer.step)()


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("separable", {"fused": True}),
        ("separable", {"fused": True, "weight_decay": 0.1}),
        ("euclidean", {"weight_decay": 0.1}),
        ("euclidean", {"fused": False}),
        ("hypentropy", {}),
        ("hypentropy", {"dual_state": True, "foreach": False}),
        ("kronecker", {"dual_state": True}),
    ],
    ids=str,
)
def test_a_captured_step_replays(name, options, policy):
    captured, plain = (Run(name, nonfinite=policy, **options) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(2):
            captured.step(k)
    torch.cuda.current_stream().wait_stream(stream)
    for k in range(2):
        plain.step(k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for k in range(2, 6):
        bad = k == 3 and policy == "skip"
        before = snapshot(captured.optimizer)
        captured.step(k, graph.replay, bad)
        plain.step(k, bad=bad)
        after = snapshot(captured.optimizer)
        torch.testing.assert_close(after, snapshot(plain.optimizer))
        assert torch.equal(before[0], after[0]) == bad


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_first_step_is_not_captured():
    run = Run("hypentropy")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(InputError, match="create the state anew"), torch.cuda.graph(graph):
        run.optimizer.step()


@pytest.mark.gpu
@needs_device
def test_the_example_runs(capsys):
    losses = runpy.run_path(str(EXAMPLE))["main"](steps=50)
    assert losses[-1] < losses[0]
    assert "replays" in capsys.readouterr().out
