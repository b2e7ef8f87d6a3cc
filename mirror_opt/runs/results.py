r"""Result rows: what was measured, with what, as one JSON list; and the table that is printed."""

import datetime
import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirror_opt.errors import InputError
from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.directory import read_json, write_json
from mirror_opt.runs.options import counted

__all__ = ["ROW", "label", "merge", "read", "rows", "setting", "table", "versions"]

ROW = (
    "method",
    "task",
    "ways",
    "shots",
    "queries",
    "filters",
    "train_steps",
    "adapt_steps",
    "split",
    "metric",
    "mean",
    "ci95",
    "test_tasks",
    "iterations",
    "seconds",
    "seed",
    "map",
    "guard",
    "mirror_opt",
    "torch",
    "python",
    "device",
    "date",
)
# What is measured, as against its outcome and its circumstances: a row measured again replaces
# the one with the same key.
_KEY = (
    "method",
    "map",
    "task",
    "ways",
    "shots",
    "queries",
    "filters",
    "train_steps",
    "adapt_steps",
    "split",
    "metric",
    "test_tasks",
    "iterations",
    "seed",
    "guard",
)


def versions(device: str) -> dict[str, str]:
    r"""Package, torch and Python versions, the device's name, and the time (UTC)."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "mirror_opt": version("mirror_opt"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "date": now.isoformat(timespec="seconds"),
    }


def rows(
    config: RunConfig,
    metric: str,
    trace: dict[int, torch.Tensor],
    iterations: int,
    seconds: float,
    split: str = "test",
) -> list[dict[str, Any]]:
    r"""One row per adaptation step of ``trace``.

    Args:
        config: the run.
        metric: ``"accuracy"`` or ``"mse"``.
        trace: the metric per task, ``(test_tasks,)``, by number of adaptation steps.
        iterations: how many meta-iterations were made.
        seconds: how long they took, all sittings together.
        split: whose tasks they were.

    Returns:
        Rows with the keys :data:`ROW`; ``ci95`` is :math:`1.96\, s / \sqrt{n}` over the tasks.
        A mean that is not finite (a task diverged) is None, and so is its interval.
    """
    found = versions(config.device)
    made = []
    for step, values in trace.items():
        values = values.double()
        mean = float(values.mean())
        finite = math.isfinite(mean)
        ci95 = 1.96 * float(values.std()) / math.sqrt(len(values)) if finite else None
        row = {
            "method": config.method,
            "task": config.task,
            "ways": config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "filters": config.filters,
            "train_steps": config.train_steps,
            "adapt_steps": step,
            "split": split,
            "metric": metric,
            "mean": mean if finite else None,
            "ci95": ci95,
            "test_tasks": len(values),
            "iterations": iterations,
            "seconds": round(seconds, 2),
            "seed": config.seed,
            "map": config.map,
            "guard": config.guard,
            **found,
        }
        made.append(row)
    return made


def read(path: str | Path) -> list[dict[str, Any]]:
    r"""The rows of a results file.

    Raises:
        InputError: absent, no JSON list, or a row lacks a key.
    """
    found = read_json(path, list)
    for row in found:
        missing = set(ROW) - set(row) if isinstance(row, dict) else set(ROW)
        if missing:
            raise InputError(
                f"{path}: a row lacks {', '.join(sorted(missing))}; restore it or evaluate again"
            )
    return found


def merge(path: str | Path, new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Adds rows to the file at ``path``; those measured again replace the old. Returns all."""
    old = read(path) if Path(path).exists() else []
    by_key = {tuple(row[name] for name in _KEY): row for row in (*old, *new)}
    merged = list(by_key.values())
    write_json(path, merged)
    return merged


def label(row: dict[str, Any]) -> str:
    r"""How tables and pictures call a row's method."""
    return f"{row['method']} ({row['map']})" if row["map"] else row["method"]


def setting(row: dict[str, Any]) -> str:
    r"""What a row was measured on, as titles say it."""
    ways = f"{row['ways']}-way " if row["ways"] else ""
    trained = counted(row["train_steps"], "step")
    return f"{row['task']}, {ways}{row['shots']}-shot, trained at {trained}"


def table(found: list[dict[str, Any]]) -> str:
    r"""A text table, methods by adaptation steps, of mean ± ci95.

    Accuracies are in percent. Rows of one method under two guards become two lines.
    """
    first = found[0]
    percent = first["metric"] == "accuracy"
    steps = sorted({row["adapt_steps"] for row in found})
    guards = {row["guard"] for row in found}
    lines: dict[str, dict[int, str]] = {}
    for row in found:
        name = label(row) + (f", guard {row['guard']}" if len(guards) > 1 else "")
        lines.setdefault(name, {})[row["adapt_steps"]] = _cell(row, percent)
    width = max(len(name) for name in (*lines, "adaptation steps"))
    cell = max(len(text) for line in lines.values() for text in line.values())
    head = "  ".join([f"{'adaptation steps':{width}}", *(f"{step:>{cell}}" for step in steps)])
    body = [
        "  ".join([f"{name:{width}}", *(f"{line.get(step, ''):>{cell}}" for step in steps)])
        for name, line in lines.items()
    ]
    metric = "query accuracy in %" if percent else "query MSE"
    title = f"{setting(first)}: {metric}, mean ± 95% interval over {first['test_tasks']} tasks"
    return "\n".join([title, head, *body])


def _cell(row: dict[str, Any], percent: bool) -> str:
    if row["mean"] is None:
        return "diverged"
    if percent:
        return f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}"
    return f"{row['mean']:.3g} ± {row['ci95']:.2g}"
