"""What the results say, at small scale: the full studies are in bench/ and their rows beside it."""

import pytest
import torch

from mirror_opt import maps
from mirror_opt.maps.base import dot
from mirror_opt.runs.config import RunConfig, build
from mirror_opt.runs.evaluate import load_run
from mirror_opt.runs.train import train

SINUSOID = {
    "iterations": 60, "test_tasks": 250, "adapt_steps": (1, 5), "threads": 1,
    "init_lr": 1e-2, "map_lr": 1e-2,
}  # fmt: skip
GLYPHS = {
    "iterations": 40, "test_tasks": 30, "adapt_steps": (1, 10), "threads": 1, "filters": 8,
    "queries": 5, "init_lr": 1e-2,
}  # fmt: skip


def metrics(path, task: str, method: str, **options) -> dict[int, float]:
    config = RunConfig.create(task, method, **options)
    return {row["adapt_steps"]: row["mean"] for row in train(config, path / method)}


def test_sinusoid_the_learned_map_beats_maml(tmp_path):
    maml = metrics(tmp_path, "sinusoid", "maml", **SINUSOID)
    mirror = metrics(tmp_path, "sinusoid", "mirror", map_options={"terms": 1}, **SINUSOID)
    assert mirror[1] < maml[1]
    assert mirror[5] < 0.5 * maml[5]


def test_images_one_step_of_the_learned_map(tmp_path):
    maml = metrics(tmp_path, "glyphs", "maml", **GLYPHS)
    mirror = metrics(tmp_path, "glyphs", "mirror", **GLYPHS)
    assert mirror[1] > maml[1] + 0.05


LEARNED = [
    (name, options)
    for name, cls in maps.REGISTRY.items()
    if cls.is_dgf and cls.owns_tensors
    for options in cls.variants
]


@pytest.mark.parametrize(("name", "map_options"), LEARNED, ids=str)
def test_the_trained_map_is_a_valid_distance(tmp_path, name, map_options):
    options = {**SINUSOID, "iterations": 10, "test_tasks": 2, "adapt_steps": (5,)}
    mirror_map = maps.create(name, [torch.zeros(2, 2)], **map_options)
    if not mirror_map.inverse_is_batchable:  # each step is a solve of many, over all entries
        options |= {"iterations": 3, "tasks_per_batch": 2}
    config = RunConfig.create("sinusoid", "mirror", map=name, map_options=map_options, **options)
    train(config, tmp_path)
    _, task, learner, _ = load_run(tmp_path)
    _, untrained = build(config)
    mirror_map = learner.mirror_map
    pairs = zip(mirror_map.parameters(), untrained.mirror_map.parameters(), strict=True)
    assert torch.cat([(a - b).flatten() for a, b in pairs]).abs().max() > 1e-3
    batch = task.sample("val", 0, 2)
    with torch.no_grad():
        points = [
            [p - i for p, i in zip(
                learner.adapt(task.loss_fn, x, y).params.values(), learner.inner_loop().init,
                strict=True,
            )]
            for x, y in zip(batch.support_x, batch.support_y, strict=True)
        ]  # fmt: skip
        x, y = points
        for back, point in zip(mirror_map.inverse(mirror_map(x)), x, strict=True):
            assert (back - point).abs().max() <= 1e-5 * point.abs().max()
        mirror_map.double()
        x, y = ([v.double() for v in point] for point in points)
        square = dot(*[[a - b for a, b in zip(x, y, strict=True)]] * 2)
        distance = mirror_map.bregman(x, y)
        slack = 1e-9 * square
        assert mirror_map.strong_convexity() / 2 * square - slack <= distance
        assert distance <= mirror_map.smoothness() / 2 * square + slack
