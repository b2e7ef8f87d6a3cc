"""The pictures: drawn from rows and checkpoints, for every task and for odd rows."""

import os

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from PIL import Image

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.runs import RunConfig, compare, plots, results, train
from mirror_opt.runs.compare import open_comparison
from mirror_opt.runs.config import build

TINY = {"iterations": 3, "tasks_per_batch": 2, "queries": 3, "adapt_steps": "0,2", "test_tasks": 2}


def row(**values):
    common = {
        "method": "maml",
        "map": None,
        "task": "sinusoid",
        "ways": None,
        "shots": 10,
        "train_steps": 5,
        "metric": "mse",
        "test_tasks": 4,
        "guard": "auto",
        "ci95": 0.1,
    }
    return dict.fromkeys(results.ROW) | common | values


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_picture_of_a_comparison(tmp_path):
    given = {"task": "sinusoid", "shots": 4, "train_steps": 2, **TINY}
    compare(open_comparison(tmp_path, given, ("maml", "mirror")), tmp_path)
    written = plots.draw(tmp_path)
    names = {"adaptation.png", "training.png", "fits.png"}
    assert {os.path.relpath(path, tmp_path) for path in written} == {
        *names,
        "map.png",
        *(os.path.join("maml", name) for name in names),
        *(os.path.join("mirror", name) for name in (*names, "map.png")),
    }
    for path in written:
        assert pixels(path).std() > 5, path  # not blank


def test_every_picture_of_a_run_on_images(tmp_path):
    train(RunConfig.create("glyphs", "mirror", ways=2, shots=2, filters=2, **TINY), tmp_path)
    written = plots.draw(tmp_path)
    assert {path.name for path in written} == {
        "adaptation.png",
        "training.png",
        "map.png",
        "episodes.png",
    }
    # Frames of right and wrong queries: every one has one of the two colours.
    found = {tuple(pixel) for pixel in pixels(tmp_path / "episodes.png").reshape(-1, 3)}
    assert found & {(0, 158, 115), (213, 94, 0)}


@pytest.mark.parametrize(
    ("task", "options"), [("sinusoid", {}), ("glyphs", {"ways": 2, "filters": 2})]
)
def test_a_run_that_diverged_is_drawn_too(tmp_path, task, options):
    config = RunConfig.create(task, "maml", **TINY, **options, lr=1e30, guard="off")
    train(config, tmp_path)
    assert len(plots.draw(tmp_path)) == 3


def test_a_picture_is_of_the_saved_rows(tmp_path):
    train(RunConfig.create("sinusoid", "maml", **TINY), tmp_path)
    first = {path.name: pixels(path) for path in plots.draw(tmp_path)}
    results.merge(
        tmp_path / "results.json",
        [found | {"mean": found["mean"] / 2} for found in results.read(tmp_path / "results.json")],
    )
    second = {path.name: pixels(path) for path in plots.draw(tmp_path)}
    same = {name for name in first if np.array_equal(first[name], second[name])}
    assert same == {"training.png", "fits.png"}


def test_the_learned_map_is_drawn_against_the_identity(tmp_path):
    x = torch.linspace(-4, 4, 9)
    figure = plots.learned_map(
        [maps.Profile(i, c, x, (1 + i) * x + c) for i in range(14) for c in range(2)],
        tuple(f"layer{i}" for i in range(14)),
    )
    titles = [axes.get_title(loc="center") or axes.get_title(loc="left") for axes in figure.axes]
    # The four farthest from it, in order; below each the difference.
    assert titles == ["layer10", "layer11", "layer12", "layer13", "", "", "", ""]
    first, second, identity = (line.get_xydata() for line in figure.axes[0].lines)
    assert np.allclose(first[:, 1], 11 * first[:, 0])
    assert np.allclose(second[:, 1], 11 * second[:, 0] + 1)
    assert np.array_equal(identity[:, 0], identity[:, 1])
    below = figure.axes[4].lines[1].get_xydata()
    assert np.allclose(below[:, 1], 10 * below[:, 0] + 1)


def test_adaptation_marks_what_diverged_and_tells_guards_apart():
    figure = plots.adaptation(
        [
            row(adapt_steps=0, mean=2.0),
            row(adapt_steps=1, mean=1.0),
            row(adapt_steps=100, mean=None, ci95=None),
            row(adapt_steps=0, mean=2.0, guard="off"),
            row(adapt_steps=1, mean=0.5, guard="off"),
        ]
    )
    (axes,) = figure.axes
    curves = [line for line in axes.lines if not line.get_label().startswith("_")]
    names = ["maml, guard auto", "maml, guard off"]
    assert [line.get_label() for line in curves] == [*names, "a task diverged"]
    assert [text.get_text() for text in axes.get_legend().get_texts()][2:] == ["a task diverged"]
    assert curves[0].get_xydata().tolist() == [[0, 2], [1, 1]]
    assert next(line.get_xdata() for line in axes.lines if line.get_marker() == "x") == [100]
    assert axes.get_yscale() == "log"
    assert axes.get_xscale() == "symlog"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "100"]


@pytest.mark.parametrize("worst", [3.0, 1e3, 1e12, 1e38])
def test_a_y_axis_has_its_ticks(tmp_path, worst):
    figure = saved(tmp_path, [row(adapt_steps=0, mean=1.0), row(adapt_steps=1, mean=worst)])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    ticks = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert 2 <= len(set(ticks)) <= 20


def test_bands_of_few_lines_and_bars_of_many():
    for seeds, below in ((4, False), (5, True)):
        rows = [row(adapt_steps=s, mean=2.0 - s, seed=i) for i in range(seeds) for s in (0, 1)]
        figure = plots.adaptation(rows)
        (axes,) = figure.axes
        bars = [c for c in axes.collections if isinstance(c, LineCollection)]
        assert len(axes.collections) == seeds
        assert len(bars) == (seeds if below else 0)
        assert (axes.get_legend() is None) == bool(figure.legends) == below
        (legend,) = figure.legends or [axes.get_legend()]
        assert len(legend.get_texts()) == seeds


def saved(tmp_path, rows):
    """The picture as it is laid out when it is drawn."""
    with plots._styled():
        figure = plots.adaptation(rows)
        figure.savefig(tmp_path / "adaptation.png")
    return figure


def test_many_settings_of_one_method_are_told_apart(tmp_path):
    long = {"task_options": {"split": "background", "validation": 100, "rotations": True}}
    rows = [row(adapt_steps=s, mean=2.0 - s, seed=i, **long) for i in range(12) for s in (0, 1)]
    rows += [r | {"data": 64 * "7", "task_options": {}, "test_tasks": 9} for r in rows]
    figure = saved(tmp_path, rows)
    (axes,) = figure.axes
    curves = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len({(c.get_color(), c.get_linestyle(), c.get_marker()) for c in curves}) == 24
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(names)) == 24
    assert not any("None" in name or "none" in name for name in names)
    width, height = figure.get_size_inches()
    assert axes.get_position().width * width > 6
    assert axes.get_position().height * height > 2.8


def test_long_names_of_few_lines_are_below_the_axes(tmp_path):
    rows = [row(adapt_steps=1, mean=1.0, data=c * 200) for c in "ab"]
    figure = saved(tmp_path, rows)
    (axes,) = figure.axes
    assert axes.get_legend() is None
    box = figure.legends[0].get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= axes.get_window_extent().y0


def test_texts_are_drawn_as_they_are(tmp_path):
    text = r"$\frac{$"
    rows = [row(adapt_steps=1, mean=1.0, task=text, seed=i, method=text) for i in (0, 1)]
    figure = saved(tmp_path, rows)
    assert figure.axes[0].get_title(loc="left") == r"\$\frac{\$, 10-shot, trained at 5 steps"


def test_ticks_of_a_short_training_are_whole():
    config = RunConfig.create("sinusoid", "maml", iterations=3)
    figure = plots.training([(config, torch.tensor([3.0, 2.0, 1.0]))])
    figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_the_share_of_right_queries_is_of_those_shown(monkeypatch):
    config = RunConfig.create("glyphs", "maml", ways=2, queries=12, filters=2, device="cpu")
    task, learner = build(config)
    batch = task.sample("test", 0, 1)
    # Right are the first eight of each class, and no other.
    shown = torch.arange(24) % 12 < 8
    labels = torch.where(shown, batch.query_y[0], 1 - batch.query_y[0])
    monkeypatch.setattr(plots, "_predict", lambda *_: torch.eye(2)[labels][None])
    with plots._styled():
        figure = plots.episode([(config, task, learner)])
    assert figure.axes[1].get_title(loc="left") == "maml: 100%"
    assert "framed green: right, orange: wrong" in figure.get_suptitle()


def test_accuracy_is_in_percent():
    figure = plots.adaptation([row(adapt_steps=1, mean=0.5, ci95=0.01, metric="accuracy")])
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata().tolist() == [50]
    assert axes.get_ylabel() == "query accuracy (%)"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        plots.draw(tmp_path)
