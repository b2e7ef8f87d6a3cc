"""What makes rows of different days comparable: tasks, calibration, outer steps, the guard."""

import torch

from mirror_opt import meta
from mirror_opt.runs import RunConfig, checkpoint, evaluate, train
from mirror_opt.runs.config import build
from mirror_opt.runs.train import horizon, prepare

TINY = {
    "shots": 4,
    "queries": 4,
    "tasks_per_batch": 2,
    "train_steps": 1,
    "adapt_steps": "0,1",
    "device": "cpu",
}


def test_the_first_step_is_adams_on_a_gradient_of_norm_ten(tmp_path, monkeypatch):
    original = meta.MetaLearner.meta_loss

    def steep(self, *args, **options):
        return 1e4 * original(self, *args, **options)

    monkeypatch.setattr(meta.MetaLearner, "meta_loss", steep)
    train(RunConfig.create("sinusoid", "mirror", iterations=1, test_tasks=2, **TINY), tmp_path)
    optimizer = checkpoint.load(tmp_path / "checkpoint.pt")["optimizer"]
    assert all(group["betas"] == (0.9, 0.99) for group in optimizer["param_groups"])
    norms = torch.stack([state["exp_avg"].norm() for state in optimizer["state"].values()])
    torch.testing.assert_close(norms.norm(), torch.tensor(0.1 * 10.0), rtol=1e-4, atol=0)


def test_a_map_is_calibrated_on_the_first_training_tasks():
    config = RunConfig.create("sinusoid", "mirror", iterations=1, test_tasks=2, **TINY)
    task, learner = build(config)
    first = task.sample("train", 0, config.tasks_per_batch)
    learner.calibrate(task.loss_fn, first.support_x, first.support_y)
    mine, theirs = learner.state_dict(), prepare(config)[1].state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_which_tasks_an_evaluation_sees():
    config = RunConfig.create("sinusoid", "maml", iterations=1, test_tasks=30, **TINY)
    task, learner = build(config)
    found = evaluate(learner, task, config)[1]
    for index, count in ((0, 25), (1, 5)):
        batch = task.sample("test", index, count)
        exact = learner.evaluate(task.loss_fn, task.metric_fn, *batch, adapt_steps=(1,))
        torch.testing.assert_close(found[25 * index :][:count], exact.metrics[1])


def test_a_run_is_evaluated_with_its_guard():
    found = {}
    for guard in ("auto", "off", "on"):
        options = {**TINY, "adapt_steps": "1,8", "guard": guard, "lr": 0.5}
        config = RunConfig.create("sinusoid", "maml", iterations=1, test_tasks=4, **options)
        task, learner = build(config)
        found[guard] = evaluate(learner, task, config)[8]
    assert not torch.equal(found["auto"], found["off"])
    assert not torch.equal(found["auto"], found["on"])


def test_a_horizon_depends_on_the_seed():
    drawn = [[horizon(seed, i, (1, 5)) for i in range(50)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert set(drawn[0]) == {1, 2, 3, 4, 5}
