r"""The pictures of a run, drawn from its saved rows and checkpoints: nothing is trained here."""

import collections
import contextlib
import io
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from mirror_opt import fewshot
from mirror_opt.fewshot import Episodes, TaskFamily
from mirror_opt.maps import Profile
from mirror_opt.meta import MetaLearner, NonFiniteLossError
from mirror_opt.runs import results
from mirror_opt.runs.config import GUARDS, RunConfig
from mirror_opt.runs.directory import RESULTS, write_bytes
from mirror_opt.runs.evaluate import load_run, method_dirs
from mirror_opt.runs.options import counted

__all__ = ["adaptation", "draw", "episode", "fits", "learned_map", "training"]

_STYLE: Any = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
# Okabe and Ito's palette, one colour a method wherever it appears.
_COLOURS = {
    "maml": "#56b4e9",
    "fomaml": "#999999",
    "anil": "#cc79a7",
    "meta-sgd": "#009e73",
    "meta-curvature": "#e69f00",
    "mirror": "#d55e00",
}
_WIDTH = 110  # letters of a legend below the axes
_RIGHT, _WRONG = (0, 158, 115), (213, 94, 0)

Trained = tuple[RunConfig, TaskFamily, MetaLearner]


def draw(out: str | os.PathLike, *, data_dir: str | os.PathLike | None = None) -> list[Path]:
    r"""Draws every picture of the run or comparison in ``out``, and of the runs inside it.

    Args:
        out: the directory, holding checkpoints, and results unless nothing is evaluated yet.
        data_dir: where the task's data is, if not where it was.

    Returns:
        The files written.

    Raises:
        InputError: checkpoint or data are absent, or they or the rows are damaged.
    """
    out = Path(out)
    directories = method_dirs(out)
    written = []
    if directories != [out]:
        for directory in directories:
            written += draw(directory, data_dir=data_dir)
    given = {} if data_dir is None else {"data_dir": data_dir}
    loaded = [load_run(directory, given) for directory in directories]
    trained: list[Trained] = [one[:3] for one in loaded]
    rows = results.stored(out / RESULTS)
    with _styled():
        figures = {"adaptation.png": adaptation(rows)} if rows else {}
        figures["training.png"] = training([(one[0], one[3]["losses"]) for one in loaded])
        for _, _, learner in trained:
            with torch.no_grad():
                curves = learner.mirror_map.profiles()
            if curves:
                figures["map.png"] = learned_map(curves, learner.names)
        if trained[0][0].task == "sinusoid":
            figures["fits.png"] = fits(trained)
        else:
            figures["episodes.png"] = episode(trained)
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            write_bytes(out / name, buffer.getvalue())
            written.append(out / name)
    return written


def adaptation(rows: list[dict[str, Any]]) -> Figure:
    r"""The metric against adaptation steps, one line a method and setting, with 95% intervals.

    They are bands; of more than four lines, whose bands would merge, they are bars. The legend of
    many lines, or of long names, is below the axes, and the picture grows with it. A step after
    which a task diverged has a cross at the edge of the axes.
    """
    percent = rows[0]["metric"] == "accuracy"
    lines = results.lines(rows)
    many = len(lines) > 4
    names = [_literal("\n".join(textwrap.wrap(name, _WIDTH)) or name) for name in lines]
    longest = max(map(len, "\n".join(names).splitlines()))
    below = many or longest > 40
    # Of a legend below: a marker takes the room of ten letters.
    columns = max(1, (_WIDTH + 10) // (longest + 10))
    lowest = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    figure = Figure(figsize=(9, 4 + 0.17 * lowest) if below else (6, 4))
    axes = figure.add_subplot()
    drawn: collections.Counter[str] = collections.Counter()
    for name, line in zip(names, lines.values(), strict=True):
        line = sorted(line, key=lambda row: row["adapt_steps"])
        colour = _COLOURS.get(line[0]["method"], "#333333")
        method = results.label(line[0])
        # Of one colour: seven markers and four dashes have 28 pairs before one comes again.
        style = ("-", "--", ":", "-.")[drawn[method] % 4]
        marker = "osD^vPX"[drawn[method] % 7]
        drawn[method] += 1
        known = [row for row in line if row["mean"] is not None]
        scale = 100 if percent else 1
        steps = np.array([row["adapt_steps"] for row in known])
        mean = scale * np.array([row["mean"] for row in known])
        ci95 = scale * np.array([row["ci95"] for row in known])
        # On a log axis a band must not reach zero.
        low = mean - ci95 if percent else np.maximum(mean - ci95, 0.2 * mean)
        if many:
            axes.vlines(steps, low, mean + ci95, color=colour, linewidth=1)
        else:
            axes.fill_between(steps, low, mean + ci95, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            steps,
            mean,
            style,
            color=colour,
            label=name,
            marker=marker,
            markersize=4,
        )
        if lost := [row["adapt_steps"] for row in line if row["mean"] is None]:
            axes.plot(
                lost,
                [0.98] * len(lost),
                "x",
                color=colour,
                clip_on=False,  # which the layout makes room for, even where nothing is drawn
                transform=axes.get_xaxis_transform(),
            )
    if any(row["mean"] is None for row in rows):
        axes.plot([], [], "x", color="#333333", label="a task diverged")
    ticks = sorted({row["adapt_steps"] for row in rows})
    if ticks[-1] > 20:
        axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.set_xlabel("adaptation steps")
    if percent:
        axes.set_ylabel("query accuracy (%)")
    else:
        axes.set_ylabel("query MSE")
        if any(row["mean"] is not None for row in rows):  # crosses alone have no place on it
            _log(axes)
    axes.set_title(_literal(results.setting(rows)))
    if below:
        figure.legend(loc="outside lower left", ncols=columns, fontsize=8, handlelength=3)
    else:
        axes.legend()
    return figure


def training(runs: list[tuple[RunConfig, Tensor]]) -> Figure:
    r"""Query loss over the meta-iterations, smoothed; skipped iterations, NaN, are gaps."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for config, losses in runs:
        values = losses.numpy()
        window = max(1, len(values) // 50)
        blocks = [values[i : i + window] for i in range(0, len(values), window)]
        middle = [min(i * window + window / 2, len(values)) for i in range(len(blocks))]
        means = [
            float(np.mean(b[np.isfinite(b)])) if np.isfinite(b).any() else math.nan for b in blocks
        ]
        axes.plot(middle, means, color=_COLOURS.get(config.method), label=config.label)
    _log(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("meta-iteration")
    axes.set_ylabel(f"query loss after {counted(runs[0][0].train_steps, 'step')}")
    axes.set_title(f"{runs[0][0].task}: meta-training")
    axes.legend()
    return figure


def learned_map(profiles: list[Profile], names: tuple[str, ...]) -> Figure:
    r"""Learned curves against the identity, and below their difference from it.

    A column is a tensor, a line one of its channels; of more than four tensors those are shown
    whose curves are farthest from the identity.

    Args:
        profiles: from the map.
        names: the names of the tensors.
    """
    curves: dict[int, list[Profile]] = {}
    for profile in profiles:
        curves.setdefault(profile.tensor, []).append(profile)
    moved = {
        tensor: max(float((c.y - c.x).abs().max()) for c in found)
        for tensor, found in curves.items()
    }
    tensors = sorted(sorted(curves, key=moved.__getitem__, reverse=True)[:4])
    figure = Figure(figsize=(2.5 * len(tensors) + 0.6, 4.6))
    grid = figure.subplots(2, len(tensors), sharex=True, sharey="row", squeeze=False)
    for (above, below), tensor in zip(grid.T, tensors, strict=True):
        shades = matplotlib.colormaps["Oranges"](np.linspace(0.45, 0.9, len(curves[tensor])))
        for shade, curve in zip(shades, curves[tensor], strict=True):
            x, y = curve.x.cpu(), curve.y.cpu()
            above.plot(x, y, color=shade)
            below.plot(x, y - x, color=shade)
        above.plot(x, x, "--", color="#555555", linewidth=1)
        below.plot(x, 0 * x, "--", color="#555555", linewidth=1)
        above.set_title(names[tensor], fontsize=9)
    grid[0, 0].set_ylabel(r"$\psi(u)$")
    grid[1, 0].set_ylabel(r"$\psi(u) - u$")
    figure.supxlabel("$u$, in units of the calibrated displacement", fontsize=10)
    figure.suptitle(
        r"The learned $\psi$, up to four channels a tensor, and the identity (dashed)",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return figure


def fits(trained: list[Trained]) -> Figure:
    r"""Three new sinusoids, one row a method: before and after adaptation."""
    config = trained[0][0]
    # Many query points, sorted, are the target curve.
    family = fewshot.make_task(config.task, shots=config.shots, queries=200, seed=config.seed)
    batch = family.sample("test", 0, 3)
    last = config.horizon[1]
    steps = sorted({0, 1, last})
    shades = {0: "#bbbbbb", 1: "#e69f00", last: _COLOURS["mirror"]}
    figure = Figure(figsize=(9, 2.1 * len(trained) + 0.8))
    grid = figure.subplots(len(trained), 3, sharex=True, sharey="col", squeeze=False)
    x = torch.linspace(-5, 5, 200)[:, None].expand(3, 200, 1)
    for row, one in zip(grid, trained, strict=True):
        curves = {step: _predict(one, batch, x, step) for step in steps}
        for i, axes in enumerate(row):
            order = batch.query_x[i, :, 0].argsort()
            axes.plot(
                batch.query_x[i, order, 0],
                batch.query_y[i, order, 0],
                color="#333333",
                linewidth=1,
                label="target",
            )
            for step, curve in curves.items():
                axes.plot(
                    x[i, :, 0],
                    curve[i, :, 0],
                    color=shades[step],
                    label=f"after {counted(step, 'step')}" if step else "before",
                )
            axes.plot(
                batch.support_x[i, :, 0],
                batch.support_y[i, :, 0],
                "o",
                color="#333333",
                markersize=4,
                label="support",
            )
        row[0].set_ylabel(one[0].label)
    for i, axes in enumerate(grid[0]):
        axes.set_title(f"new task {i + 1}")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def episode(trained: list[Trained]) -> Figure:
    r"""One new task: its support images, and per method the queries, framed by right or wrong.

    Rows are classes, of which eight images each are shown; the frame of a query is green where the
    adapted model names its class. The title has the share of those that are.
    """
    config, family, _ = trained[0]
    batch = family.sample("test", 0, 1)
    step = config.horizon[1]
    shown = _first(batch.support_y[0])
    panels = [("support", _mosaic(batch.support_x[0, shown], batch.support_y[0, shown], None))]
    shown = _first(batch.query_y[0])
    x, y = batch.query_x[0, shown], batch.query_y[0, shown]
    for one in trained:
        logits = _predict(one, batch, batch.query_x, step)[0]
        right = ((logits.argmax(-1) == batch.query_y[0]) & logits.isfinite().all(-1))[shown]
        title = f"{one[0].label}: {100 * float(right.float().mean()):.0f}%"
        panels.append((title, _mosaic(x, y, right)))
    widths = [image.shape[1] / panels[1][1].shape[1] for _, image in panels]
    height = 4.0 * panels[1][1].shape[0] / panels[1][1].shape[1]
    figure = Figure(figsize=(4.0 * sum(widths), height + 0.7))
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.03)
    grid = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)
    for axes, (title, image) in zip(grid[0], panels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    title = (
        f"{config.task}: a new task, a class per row\n"
        f"queries after {counted(step, 'adaptation step')}, framed green: right, orange: wrong"
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def _predict(trained: Trained, batch: Episodes, x: Tensor, steps: int) -> Tensor:
    r"""Predictions on ``x`` ``(tasks, n, ...)`` after ``steps`` on the batch's support sets.

    NaN where a task diverged: no curve, and no query right.
    """
    config, task, learner = trained
    batch = batch.to(config.device)
    try:
        with torch.no_grad():
            adapted = learner.adapt_batch(
                task.loss_fn,
                batch.support_x,
                batch.support_y,
                steps=steps,
                guard=GUARDS[config.guard],
            )
            return adapted(x.to(config.device)).cpu()
    except NonFiniteLossError:
        return torch.full((*x.shape[:2], task.output_size), math.nan)


def _literal(text: str) -> str:
    r"""A text as it is: what is between dollars, matplotlib would take for mathematics."""
    return text.replace("$", r"\$")


def _log(axes: Axes) -> None:
    r"""A log y axis that writes 0.02, not 2 x 10^-2, and not at every tick."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Where it has to pass over powers of ten, the locator would have no multiples of them, and no
    # ticks at all.
    subs = (1, 2, 5) if high < 1e6 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _first(labels: Tensor, most: int = 8) -> Tensor:
    r"""The indices of the first ``most`` of each class, class by class."""
    return torch.cat([(labels == label).nonzero()[:most, 0] for label in labels.unique()])


def _mosaic(images: Tensor, labels: Tensor, right: Tensor | None) -> np.ndarray:
    r"""Images ``(n, channels, h, w)`` as one picture, a row per class, framed."""
    low, high = images.min(), images.max()
    grey = ((images - low) / (high - low).clamp(min=1e-6) * 255).byte()
    if grey.shape[1] == 1 and grey.float().mean() < 128:
        grey = 255 - grey  # ink dark on white, however the data has it
    pixels = grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    rows = []
    for label in labels.unique():
        cells = []
        for i in (labels == label).nonzero()[:, 0].tolist():
            frame = (205, 205, 205) if right is None else _RIGHT if right[i] else _WRONG
            cell = np.full((pixels.shape[1] + 4, pixels.shape[2] + 4, 3), frame, np.uint8)
            cell[2:-2, 2:-2] = pixels[i]
            cells.append(np.pad(cell, ((1, 1), (1, 1), (0, 0)), constant_values=255))
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)
