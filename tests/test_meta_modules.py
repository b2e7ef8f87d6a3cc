"""Any module will do: the engine that serves it, second derivatives, and what is refused."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import maps, meta
from mirror_opt.errors import InputError
from mirror_opt.meta import MetaLearner, NonFiniteLossError
from mirror_opt.meta.engines import choose_engine
from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.train import train


class Sequence(nn.Module):
    """A module over (n, length, 4) or (n, length) indices, then a mean and a linear layer."""

    def __init__(self, body: nn.Module, indices: bool = False):
        super().__init__()
        self.body, self.head, self.indices = body, nn.Linear(4, 2), indices

    def forward(self, x):
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


BODIES = {
    "padding": lambda: nn.Embedding(6, 4, padding_idx=-1),
    "max_norm": lambda: nn.Embedding(6, 4, max_norm=0.5),
    "embedding": lambda: nn.Embedding(6, 4),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "gru": lambda: nn.GRU(4, 4, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
}
OF_INDICES = ("padding", "max_norm", "embedding")


def problem(name, seed=0):
    torch.manual_seed(seed)
    model = Sequence(BODIES[name]()).double()
    x = torch.randint(6, (3, 5, 4)) if name in OF_INDICES else torch.randn(3, 5, 4, 4).double()
    return model, x, torch.randn(3, 5, 2, dtype=torch.float64)


def gradients(learner, x, y):
    loss = learner.meta_loss(F.mse_loss, x, y, x, y)
    return [loss, *torch.autograd.grad(loss, list(learner.model.parameters()))]


class Cell(nn.LSTMCell):
    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = super().forward(step, state)
        return state[0].unsqueeze(1)


@pytest.mark.parametrize("training", [True, False])
def test_what_torch_cannot_batch_is_found_out(training):
    found = []
    for engine in ("auto", "loop", "vmap"):
        torch.manual_seed(0)
        model, (_, x, y) = Sequence(Cell(4, 4)).double(), problem("lstm")
        learner = MetaLearner(model, lr=0.1, steps=2, engine=engine).train(training)
        if engine == "vmap":
            with pytest.raises(InputError, match="pass engine='loop'"):
                gradients(learner, x, y)
            continue
        drawn = torch.get_rng_state()
        with told(engine == "auto", "meta_loss"):
            found.append(gradients(learner, x, y))
        assert torch.equal(torch.get_rng_state(), drawn)
        gradients(learner, x, y)  # and says so once
        with told(engine == "auto", "evaluate"):
            learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y, adapt_steps=(2,))
        with told(engine == "auto", "adapt_batch"):
            learner.adapt_batch(F.mse_loss, x, y)
    assert all(map(torch.equal, *found))


def told(whether, method):
    if not whether:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=f"^{method} takes the tasks in turn: ")


def test_a_metric_that_torch_cannot_batch_leaves_training_as_it_is():
    learner = MetaLearner(nn.Linear(4, 3), lr=0.1, steps=1)
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 3)
    batched = []

    def loss_fn(prediction, y):
        batched.append(torch._C._functorch.is_batchedtensor(prediction))
        return F.mse_loss(prediction, y)

    def metric_fn(prediction, y):
        return torch.tensor(float(F.mse_loss(prediction, y)))

    with told(True, "evaluate"):
        learner.evaluate(F.mse_loss, metric_fn, x, y, x, y, adapt_steps=(1,))
    learner.meta_loss(loss_fn, x, y, x, y)
    assert all(batched)


def test_a_task_whose_solve_fails_draws_nothing_from_the_others():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    p_norm = maps.PNorm(3, eps=0.1)
    x, y = torch.ones(2, 64, 4), torch.ones(2, 64, 3)
    y[1] = math.nan
    found = []
    for engine in ("loop", "vmap"):
        learner = MetaLearner(model, p_norm, lr=0.1, steps=2, engine=engine)
        torch.manual_seed(0)
        found.append(
            learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y, adapt_steps=(2,)).losses[0]
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_the_automatic_engine_is_that_of_every_task_alone(name, training):
    found = []
    for engine in ("auto", "loop"):
        model, x, y = problem(name)
        learner = MetaLearner(model, lr=0.1, steps=2, engine=engine).train(training)
        found.append(gradients(learner, x, y))
        learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y, adapt_steps=(2,))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["attention", "lstm", "padding"])
def test_meta_gradients_are_those_of_finite_differences(name):
    model, x, y = problem(name)
    learner = MetaLearner(model, lr=0.1, steps=2)
    _, *gradient = gradients(learner, x, y)
    for p, g in zip(model.parameters(), gradient, strict=True):
        direction = torch.randn_like(p)
        if name == "padding" and p is model.body.weight:
            direction[-1] = 0  # which autograd holds still
        values = []
        for h in (1e-5, -2e-5):
            with torch.no_grad():
                p.add_(direction, alpha=h)
            values.append(learner.meta_loss(F.mse_loss, x, y, x, y).item())
        with torch.no_grad():
            p.add_(direction, alpha=1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(
            (g * direction).sum().item(), 1e-5, 1e-8
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("padding", "padding_idx"),
        ("max_norm", "max_norm"),
        ("lstm", "batch LSTM"),
        ("spectral_norm", "spectral_norm"),
    ],
)
def test_vmap_is_refused_where_it_would_fail_or_differ(body, message):
    with pytest.raises(InputError, match=f"engine='vmap' cannot .*{message}.*engine='loop'"):
        MetaLearner(problem(body)[0], engine="vmap")
    assert choose_engine("auto", problem(body)[0], maps.Euclidean()) == "loop"
    assert choose_engine("auto", problem("embedding")[0], maps.Euclidean()) == "vmap"


def test_what_vmap_cannot_run_is_named():
    learner = MetaLearner(nn.Linear(4, 3), engine="vmap")
    x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))

    def loss_fn(prediction, y):
        return (
            F.mse_loss(prediction, prediction.new_zeros(3).expand_as(prediction)) * y.max().item()
        )

    for call in (learner.adapt_batch, lambda *task: learner.meta_loss(*task, x, y)):
        with pytest.raises(InputError, match=r"engine='vmap' cannot run .* pass engine='loop'"):
            call(loss_fn, x, y)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_loss_is_one_number(engine):
    learner = MetaLearner(nn.Linear(4, 3), engine=engine)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)

    def loss_fn(prediction, y):
        return F.mse_loss(prediction, y, reduction="none")

    calls = (
        lambda: learner.adapt(loss_fn, x[0], y[0]),
        lambda: learner.adapt_batch(loss_fn, x, y),
        lambda: learner.meta_loss(loss_fn, x, y, x, y),
        lambda: learner.evaluate(loss_fn, F.mse_loss, x, y, x, y),
        lambda: learner.calibrate(loss_fn, x, y),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"a loss of shape \(5, 3\) .* a 0-dim tensor"):
            call()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_batch_of_no_tasks_is_refused(engine):
    learner = MetaLearner(nn.Linear(4, 3), engine=engine)
    x, y = torch.randn(0, 5, 4), torch.randn(0, 5, 3)
    with pytest.raises(InputError, match="a batch of no tasks"):
        learner.meta_loss(F.mse_loss, x, y, x, y)
    with pytest.raises(InputError, match="a batch of no tasks"):
        learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y)


def test_inference_mode_is_refused():
    learner = MetaLearner(nn.Linear(4, 3), engine="loop")
    with torch.inference_mode(), pytest.raises(InputError, match="use no_grad"):
        learner.adapt(F.mse_loss, torch.randn(5, 4), torch.randn(5, 3))


# Solves that fail.

SOLVED = {
    "separable": lambda p: maps.SeparableNeural(p, parametrization="primal"),
    "kronecker": lambda p: maps.KroneckerNeural(p, parametrization="primal", eps=0.0),
    "pnorm": lambda p: maps.PNorm(1.5, eps=0.1),
}


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", SOLVED)
def test_a_task_that_diverges_past_its_solve_is_that_task_alone(name, engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    options = {"lr": 0.1, "steps": 3, "engine": engine}
    learner = MetaLearner(model, SOLVED[name](list(model.parameters())), **options)
    x, y = torch.randn(3, 6, 4), torch.randn(3, 6, 2)
    x[1] *= 1e9
    with pytest.raises(NonFiniteLossError, match="of task 1 is not finite"):
        learner.meta_loss(F.mse_loss, x, y, x, y)
    with pytest.raises(NonFiniteLossError, match="of task 1 is not finite"):
        learner.adapt_batch(F.mse_loss, x, y)
    with pytest.raises(NonFiniteLossError):
        learner.adapt(F.mse_loss, x[1], y[1])
    learner.nonfinite = "skip"
    loss = learner.meta_loss(F.mse_loss, x, y, x, y)
    others = [t[[0, 2]] for t in (x, y, x, y)]
    torch.testing.assert_close(loss, learner.meta_loss(F.mse_loss, *others))
    found = learner.evaluate(F.mse_loss, F.mse_loss, x, y, x, y, adapt_steps=(3,)).metrics[3]
    assert found.isfinite().tolist() == [True, False, True]


def test_training_leaves_out_iterations_whose_solve_fails(tmp_path):
    config = RunConfig.create(
        "sinusoid", "mirror", map="separable", map_options={"parametrization": "primal"},
        iterations=30, test_tasks=4, lr=0.3, train_steps=5, tasks_per_batch=4,
    )  # fmt: skip
    assert len(train(config, tmp_path)) == len(config.adapt_steps)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_skipping_every_task_is_an_error(engine):
    learner = MetaLearner(nn.Linear(4, 3), engine=engine, nonfinite="skip")
    x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    nothing = torch.full_like(y, -100)  # what cross_entropy leaves out: its mean is 0 / 0
    with pytest.raises(NonFiniteLossError):
        learner.meta_loss(F.cross_entropy, x, nothing, x, y)


# Learners by name.


def test_a_learned_init_that_leaves_the_domain_is_refused():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    learner = MetaLearner(model, maps.NegativeEntropy(simplex=False))
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    learner.adapt(F.mse_loss, x, y)
    with torch.no_grad():
        model.bias[0] = -0.1
    with pytest.raises(InputError, match=r"parameter 1 .* not in the domain of NegativeEntropy"):
        learner.adapt(F.mse_loss, x, y)


def test_a_method_by_name_adapts_what_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    learner = meta.build("mirror", model, adapt=(name for name in ["1.*"]))
    assert learner.names == ("1.weight", "1.bias")
    assert meta.build("maml", model, adapt="0.bias").names == ("0.bias",)
    with pytest.raises(InputError, match="leave adapt out"):
        meta.build("anil", model, adapt=["0.*"])


def test_anil_refuses_a_head_that_is_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match=r"shares 1.weight with another"):
        meta.build("anil", model)
    assert meta.build("maml", model).names == ("0.weight", "0.bias", "1.bias")
