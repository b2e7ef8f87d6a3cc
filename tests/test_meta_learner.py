"""MetaLearner: what it leaves alone, what it reports, and its configurations."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import maps, meta
from mirror_opt.errors import InputError
from mirror_opt.meta import METHODS, MetaLearner, NonFiniteLossError
from mirror_opt.meta.engines import choose_engine

KINDS = pytest.mark.parametrize("engine", ["loop", "vmap"])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def data(n: int = 4):
    torch.manual_seed(1)
    x = torch.randn(n, 5, 1)
    return x, torch.sin(x), x + 0.1, torch.sin(x + 0.1)


@pytest.mark.parametrize("method", METHODS)
@KINDS
def test_every_method_learns(method, engine):
    learner = meta.build(method, model(), lr=0.05, steps=2, engine=engine)
    learner.calibrate(F.mse_loss, *data()[:2])
    groups = learner.param_groups(init_lr=0.01, map_lr=0.01)
    assert next(g["name"] for g in groups) == "init"
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = learner.meta_loss(F.mse_loss, *data())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@KINDS
def test_the_model_is_left_as_it_was(engine):
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    if engine == "vmap":
        net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learner = MetaLearner(net, maps.Diagonal(net.parameters()), engine=engine)
    adapted = learner.adapt(F.mse_loss, data()[0][0], data()[1][0])
    adapted(data()[2][0])
    learner.meta_loss(F.mse_loss, *data()).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not torch.equal(adapted.params["0.weight"], net[0].weight)


@KINDS
def test_evaluate_follows_adapt(engine):
    learner = meta.build("mirror", model(), lr=0.05, steps=2, engine=engine)
    sx, sy, qx, qy = data()
    result = learner.evaluate(
        F.mse_loss, F.mse_loss, sx, sy, qx, qy, adapt_steps=(0, 2, 4), guard=False
    )
    assert list(result.metrics) == [0, 2, 4]
    assert result.losses.shape == result.slopes.shape == (4, 4)
    assert result.accepted is None
    for steps, metric in result.metrics.items():
        for t in range(4):
            adapted = learner.adapt(F.mse_loss, sx[t], sy[t], steps=steps, guard=False)
            torch.testing.assert_close(F.mse_loss(adapted(qx[t]), qy[t]), metric[t])
    only_start = learner.evaluate(F.mse_loss, F.mse_loss, sx, sy, qx, qy, adapt_steps=(0,))
    assert only_start.losses.shape == (4, 0)


def test_maps_on_the_parameters_themselves():
    # Hypentropy is not anchored: phi = grad h*(grad h(phi_0) - alpha g).
    net = model()
    hypentropy = maps.Hypentropy(0.5)
    learner = MetaLearner(net, hypentropy, lr=0.1, steps=1)
    sx, sy, _, _ = (x[0] for x in data())
    params = list(net.parameters())
    grads = torch.autograd.grad(F.mse_loss(net(sx), sy), params)
    duals = [z - 0.1 * g for z, g in zip(hypentropy(params), grads, strict=True)]
    adapted = learner.adapt(F.mse_loss, sx, sy)
    for ours, expected in zip(adapted.params.values(), hypentropy.inverse(duals), strict=True):
        torch.testing.assert_close(ours, expected)


def test_learned_rates_per_step():
    learner = MetaLearner(model(), lr=0.1, steps=3, learn_lr=True)
    assert learner.log_lr.exp().tolist() == pytest.approx([0.1] * 3)
    learner.meta_loss(F.mse_loss, *data()).backward()
    assert (learner.log_lr.grad != 0).all()
    assert learner.inner_loop().rate(7) == learner.inner_loop().rate(2)


@KINDS
def test_nonfinite_losses_name_task_and_step(engine):
    sx, sy, qx, qy = data()
    learner = MetaLearner(model(), lr=0.1, steps=2, engine=engine)
    bad = sx.clone()
    bad[2] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 0 of task 2") as caught:
        learner.meta_loss(F.mse_loss, bad, sy, qx, qy)
    assert (caught.value.task, caught.value.step) == (2, 0)
    with pytest.raises(NonFiniteLossError, match="query loss"):
        learner.meta_loss(F.mse_loss, sx, sy, bad, qy)
    with pytest.raises(NonFiniteLossError):
        learner.adapt_batch(F.mse_loss, bad, sy)
    skipping = MetaLearner(model(), lr=0.1, steps=2, engine=engine, nonfinite="skip")
    assert torch.isfinite(skipping.meta_loss(F.mse_loss, bad, sy, qx, qy))
    with pytest.raises(NonFiniteLossError):
        skipping.meta_loss(F.mse_loss, torch.full_like(sx, float("nan")), sy, qx, qy)


def test_state_dict_round_trip():
    first = learner = meta.build("mirror", model(), lr=0.05, steps=2)
    first.calibrate(F.mse_loss, *data()[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = meta.build("mirror", model(), lr=0.5, steps=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = (m.meta_loss(F.mse_loss, *data()) for m in (learner, second))
    assert torch.equal(ours, theirs)


def test_a_random_horizon_is_drawn_in_training_and_the_longest_elsewhere():
    learner = MetaLearner(model(), steps=(1, 3), lr=0.1)
    assert (learner.horizon, learner.steps, len(learner.log_lr)) == ((1, 3), 3, 3)
    torch.manual_seed(0)
    batch = data()
    at = [learner.meta_loss(F.mse_loss, *batch, steps=k).item() for k in (1, 2, 3)]
    drawn = [learner.meta_loss(F.mse_loss, *batch).item() for _ in range(30)]
    assert set(drawn) == set(at)
    torch.manual_seed(5)
    first = [learner.meta_loss(F.mse_loss, *batch).item() for _ in range(10)]
    torch.manual_seed(5)
    assert first == [learner.meta_loss(F.mse_loss, *batch).item() for _ in range(10)]
    learner.eval()
    assert {learner.meta_loss(F.mse_loss, *batch).item() for _ in range(10)} == {at[-1]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*maps.REGISTRY])
def test_models_of_half_precision(name, dtype):
    torch.manual_seed(0)
    net = model()
    if name == "negative-entropy":
        for p in net.parameters():
            p.data = torch.rand_like(p).softmax(-1)
    losses = {}
    for model_dtype in (torch.float32, dtype):
        net = net.to(model_dtype)
        learner = MetaLearner(net, maps.create(name, list(net.parameters())), lr=0.1, steps=3)
        batch = [x.to(model_dtype) for x in data()]
        learner.calibrate(F.mse_loss, *batch[:2])
        adapted = learner.adapt(F.mse_loss, *(x[0] for x in batch[:2]))
        assert {p.dtype for p in adapted.params.values()} == {model_dtype}
        loss = learner.meta_loss(F.mse_loss, *batch)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        guarded = learner.adapt_batch(F.mse_loss, *batch[:2], guard=True)
        assert torch.isfinite(guarded.losses).all()
        losses[model_dtype] = loss.item()
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.05)


@pytest.mark.parametrize("guard", [False, True])
def test_small_steps_of_half_precision_add_up(guard):
    # 1e-4 times a gradient of 1e-4 is no number of float16; that of many steps is one.
    net = nn.Linear(1, 1, bias=False).half()
    nn.init.zeros_(net.weight)
    learner = MetaLearner(net, maps.Euclidean(), lr=1e-4, steps=200)
    one = torch.ones(1, 1, dtype=torch.float16)
    adapted = learner.adapt(lambda p, y: -1e-4 * p.float().sum(), one, one, guard=guard)
    assert adapted.params["weight"].item() == pytest.approx(2e-6, rel=0.05)


@pytest.mark.parametrize("guard", [False, True])
def test_adaptation_in_inference_mode(guard):
    net = model()
    learner = MetaLearner(net, maps.Diagonal(net.parameters()), lr=0.1, steps=3, engine="vmap")
    x, y = data()[:2]
    expected = learner.adapt_batch(F.mse_loss, x, y, guard=guard)(x)
    with torch.inference_mode():
        found = learner.adapt_batch(F.mse_loss, x, y, guard=guard)(x)
    torch.testing.assert_close(found, expected.detach())


def test_engine_choice():
    def choose(net: nn.Module, mirror_map=None, engine: str = "auto") -> str:
        return choose_engine(engine, net, mirror_map or maps.Euclidean())

    assert choose(model()) == "vmap"
    assert choose(nn.Conv2d(1, 1, 1)) == "loop"
    assert choose(nn.BatchNorm1d(2)) == "loop"
    assert choose(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)) == "loop"
    assert choose(nn.BatchNorm1d(2, track_running_stats=False)) == "vmap"
    net = model()
    solved = maps.KroneckerNeural(net.parameters(), terms=2, parametrization="primal")
    assert choose(net, solved) == "loop"
    with pytest.raises(InputError, match="parametrization='dual'"):
        choose(net, solved, "vmap")


def test_meta_gradient_through_a_solved_inverse():
    # F of the primal parametrisation inverted by Newton-CG: its implicit meta-gradient against
    # finite differences.
    torch.manual_seed(0)
    net = model().double()
    solved = maps.KroneckerNeural(net.parameters(), terms=2, parametrization="primal")
    batch = [x.double() for x in data(2)]
    learner = MetaLearner(net, solved, lr=0.1, steps=2)
    learner.calibrate(F.mse_loss, *batch[:2])
    with torch.no_grad():
        for p in solved.parameters():
            p.add_(0.1 * torch.randn_like(p))
    learner.meta_loss(F.mse_loss, *batch).backward()
    named = [p for p in learner.parameters() if p.grad is not None]
    direction = [torch.randn_like(p) for p in named]
    exact = sum((p.grad * d).sum().item() for p, d in zip(named, direction, strict=True))
    h, values = 1e-4, []
    with torch.no_grad():
        for t in (h, -2 * h):
            for p, d in zip(named, direction, strict=True):
                p.add_(t * d)
            values.append(learner.meta_loss(F.mse_loss, *batch).item())
    assert exact == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"steps": 0}, "steps=0"),
        ({"steps": (3, 1)}, r"steps=\(3, 1\)"),
        ({"engine": "magic"}, "'loop' or 'vmap'"),
        ({"guard": "always"}, "guard='always'"),
        ({"guard": 1}, "guard=1"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"steps": 2.0}, r"steps=2\.0"),
        ({"steps": (1, 2.5)}, r"steps=\(1, 2\.5\)"),
        ({"nonfinite": "ignore"}, "'raise' or 'skip'"),
        ({"adapt": ["nothing*"]}, "nothing"),
        ({"adapt": ["0.*", "2.weigth"]}, r"matches '2\.weigth' of .* such as 0\.weight"),
        ({"adapt": []}, "pass patterns"),
        ({"first_order": "false"}, "first_order='false'"),
        ({"learn_lr": 1}, "learn_lr=1"),
        ({"mirror_map": "kronecker"}, "pass an instance of a map"),
        ({"mirror_map": maps.Euclidean}, "pass an instance of a map"),
        ({"mirror_map": maps.Diagonal([torch.zeros(3)])}, "shapes"),
        ({"mirror_map": maps.NegativeEntropy()}, "simplex"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        MetaLearner(model(), **arguments)


def test_bad_calls():
    with pytest.raises(InputError, match="one of maml"):
        meta.build("nonsense", model())
    with pytest.raises(InputError, match="own map"):
        meta.build("maml", model(), map_options={"units": 2})
    with pytest.raises(InputError, match="own map 'euclidean'"):
        meta.build("maml", model(), map_name="separable")
    with pytest.raises(InputError, match="one of maml"):
        meta.defaults("nonsense", "sinusoid")
    for norm in (nn.BatchNorm1d(2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)):
        with pytest.raises(InputError, match="track_running_stats"):
            MetaLearner(norm, engine="vmap")
    learner = MetaLearner(model())
    for steps in (-1, 1.5, True):
        with pytest.raises(InputError, match="at least 0"):
            learner.adapt(F.mse_loss, *(x[0] for x in data()[:2]), steps=steps)
    with pytest.raises(InputError, match="guard='Auto'"):
        learner.adapt(F.mse_loss, *(x[0] for x in data()[:2]), guard="Auto")
    with pytest.raises(InputError, match="one or more"):
        learner.evaluate(F.mse_loss, F.mse_loss, *data(), adapt_steps=[])
    for bad in (2.5, None, -1):
        with pytest.raises(InputError, match="pass"):
            learner.evaluate(F.mse_loss, F.mse_loss, *data(), adapt_steps=[1, bad, 5])


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_bad_tasks_and_losses(engine):
    learner = MetaLearner(model(), engine=engine)
    sx, sy, qx, qy = data()
    with pytest.raises(InputError, match=r"tensors of \[4, 2, 4, 4\] tasks: pass .* one T for all"):
        learner.meta_loss(F.mse_loss, sx, sy[:2], qx, qy)
    with pytest.raises(InputError, match="one T for all"):
        learner.adapt_batch(F.mse_loss, sx, sy[:2])
    for loss, message in (
        (lambda p, y: None, "gave a NoneType for a task"),
        (lambda p, y: (p.mean(), 0), "gave a tuple for a task"),
        (lambda p, y: p.detach().mean(), "a loss without a derivative"),
    ):
        with pytest.raises(InputError, match=message):
            learner.meta_loss(loss, sx, sy, qx, qy)


def test_calibration_on_nothing_is_refused():
    net = model()
    learner = MetaLearner(net, maps.SeparableNeural(net.parameters()))
    before = copy.deepcopy(learner.state_dict())
    x, y = data()[:2]
    with pytest.raises(InputError, match="no tasks"):
        learner.calibrate(F.mse_loss, x[:0], y[:0])
    with pytest.raises(InputError, match="not finite"):
        learner.calibrate(F.mse_loss, x * torch.nan, y)
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())


def test_calibration_is_on_the_first_euclidean_step():
    net = nn.Linear(1, 1)
    learner = MetaLearner(net, maps.SeparableNeural(net.parameters(), share="tensor"), lr=0.25)
    x, y = data()[:2]
    learner.calibrate(F.mse_loss, x, y)
    maml = MetaLearner(net, lr=0.25, steps=1)
    moved = [maml.adapt(F.mse_loss, *task) for task in zip(x, y, strict=True)]
    for name, group in zip(("weight", "bias"), learner.mirror_map.groups, strict=True):
        steps = torch.stack([m.params[name] - net.get_parameter(name) for m in moved])
        torch.testing.assert_close(group.unit.flatten(), steps.square().mean().sqrt().flatten())


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_parameter_that_is_frozen_outside_of_tasks_adapts_within(engine):
    net = model()
    learner = MetaLearner(net, lr=0.1, steps=2, engine=engine)
    expected = learner.meta_loss(F.mse_loss, *data())
    first, *others = net.parameters()
    gradients = torch.autograd.grad(expected, others)
    first.requires_grad_(False)
    loss = learner.meta_loss(F.mse_loss, *data())
    torch.testing.assert_close(loss, expected)
    for g, h in zip(torch.autograd.grad(loss, others), gradients, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("options", [{}, {"eps": 0.0, "parametrization": "primal"}], ids=str)
def test_autocast_does_not_reach_the_map(options):
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 1, bias=False)
        mirror_map = maps.KroneckerNeural(net.parameters(), **options)
        for p in mirror_map.parameters():
            nn.init.normal_(p, std=0.1)
        learner = MetaLearner(net, mirror_map, lr=0.1, steps=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            zeta = (torch.full((1, 3), 0.3),)
            ends.append(learner.inner_loop().primal(zeta, None)[0])
    assert torch.equal(*ends)


def test_its_error_is_copied_and_pickled():
    error = NonFiniteLossError(3, "query")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(again), str(again)) == (NonFiniteLossError, str(error))
        assert (again.task, again.step) == (3, "query")
