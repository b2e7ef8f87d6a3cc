"""What the results say, at small scale: the full studies are in bench/ and their rows beside it."""

import pytest
import torch

from mirror_opt import maps
from mirror_opt.maps.base import dot
from mirror_opt.runs.config import RunConfig
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


def test_sinusoid_one_step_of_the_learned_map_beats_five_of_maml(tmp_path):
    maml = metrics(tmp_path, "sinusoid", "maml", **SINUSOID)
    mirror = metrics(tmp_path, "sinusoid", "mirror", map_options={"terms": 1}, **SINUSOID)
    assert mirror[1] < maml[5]
    assert mirror[5] < 0.5 * maml[5]


def test_images_one_step_of_the_learned_map(tmp_path):
    maml = metrics(tmp_path, "glyphs", "maml", **GLYPHS)
    mirror = metrics(tmp_path, "glyphs", "mirror", **GLYPHS)
    assert mirror[1] > maml[1] + 0.05


@pytest.mark.parametrize("map_options", [{"terms": 1}, {"terms": 2}, {"eps": 0.0}], ids=str)
def test_the_trained_map_is_a_valid_distance(tmp_path, map_options):
    options = {**SINUSOID, "iterations": 10, "test_tasks": 2, "map_options": map_options}
    train(RunConfig.create("sinusoid", "mirror", **options), tmp_path)
    _, task, learner, _ = load_run(tmp_path)
    mirror_map = learner.mirror_map
    assert isinstance(mirror_map, maps.KroneckerNeural)
    factors = [p for name, p in mirror_map.named_parameters() if "factors" in name]
    moved = max(p.abs().max().item() for p in factors)
    assert moved > 1e-3
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
