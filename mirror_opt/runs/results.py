r"""Result rows: what was measured, with what, as one JSON list; and the table that is printed."""

import datetime
import json
import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirror_opt.errors import InputError
from mirror_opt.fewshot import TaskFamily
from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.directory import read_json, write_json
from mirror_opt.runs.options import counted, fits, shown

__all__ = [
    "ROW",
    "find",
    "label",
    "lines",
    "merge",
    "read",
    "rows",
    "setting",
    "stored",
    "table",
    "versions",
]

_REMEDY = "restore it, or remove it and evaluate again"

# The columns of a row and the types of their values.
ROW = {
    "method": str,
    "task": str,
    "ways": int | None,
    "shots": int,
    "queries": int,
    "filters": int | None,
    "train_steps": int | str,
    "adapt_steps": int,
    "split": str,
    "metric": str,
    "mean": float | None,
    "ci95": float | None,
    "test_tasks": int,
    "iterations": int,
    "seconds": float,
    "seed": int,
    "map": str | None,
    "map_options": dict[str, Any],
    "learn_lr": bool,
    "task_options": dict[str, Any],
    "data": str | None,
    "guard": str,
    "mirror_opt": str,
    "torch": str,
    "python": str,
    "device": str,
    "date": str,
}
# What is measured, as against its outcome and its circumstances: a row measured again replaces
# the one with the same key.
_KEY = (
    "method",
    "map",
    "map_options",
    "learn_lr",
    "task",
    "task_options",
    "data",
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
# What a label says of a row already, and what runs along a line of a table or a picture.
_NAMED = ("method", "map", "adapt_steps")


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
    task: TaskFamily,
    trace: dict[int, torch.Tensor],
    iterations: int,
    seconds: float,
    split: str = "test",
) -> list[dict[str, Any]]:
    r"""One row per adaptation step of ``trace``.

    Args:
        config: the run.
        task: its task family.
        trace: the metric per task, ``(test_tasks,)``, by number of adaptation steps.
        iterations: how many meta-iterations were made.
        seconds: how long they took, all sittings together.
        split: whose tasks they were.

    Returns:
        Rows with the keys :data:`ROW`; ``ci95`` is :math:`1.96\, s / \sqrt{n}` over the tasks.
        A mean that is not finite (a task diverged) is None, and so is its interval.
    """
    measured = _measured(config, task, iterations, split)
    found = versions(config.device)
    made = []
    for step, values in trace.items():
        values = values.double()
        mean = float(values.mean())
        finite = math.isfinite(mean)
        row = {
            **measured,
            "adapt_steps": step,
            "mean": mean if finite else None,
            "ci95": 1.96 * float(values.std()) / math.sqrt(len(values)) if finite else None,
            "test_tasks": len(values),
            "seconds": round(seconds, 2),
            **found,
        }
        made.append({name: row[name] for name in ROW})
    return made


def _measured(config: RunConfig, task: TaskFamily, iterations: int, split: str) -> dict[str, Any]:
    r"""What rows of a run have in common, of :data:`_KEY`."""
    from_config = (name for name in _KEY if name in config.to_dict())
    return {
        **{name: getattr(config, name) for name in from_config},
        "data": task.fingerprint,
        "metric": task.metric,
        "iterations": iterations,
        "split": split,
    }


def find(
    path: str | Path, config: RunConfig, task: TaskFamily, split: str = "test"
) -> list[dict[str, Any]]:
    r"""The rows of the finished run ``config`` in the file at ``path``, if it has all of them.

    Rows of an earlier iteration, or measured otherwise, are not meant. Empty where a step lacks.
    """
    measured = _measured(config, task, config.iterations, split)
    wanted = [_key(measured | {"adapt_steps": step}) for step in config.adapt_steps]
    there = {_key(row): row for row in stored(path)}
    return [there[key] for key in wanted] if all(key in there for key in wanted) else []


def read(path: str | Path) -> list[dict[str, Any]]:
    r"""The rows of a results file.

    Raises:
        InputError: absent, no JSON list, or a row lacks a column or has one of another type.
    """
    found = read_json(path, list, _REMEDY)
    for row in found:
        if not isinstance(row, dict):
            raise InputError(f"{path}: a row is {row!r}; {_REMEDY}")
        for name, hint in ROW.items():
            if name not in row or not fits(row[name], hint):
                what = f"has {name} {row[name]!r}" if name in row else f"lacks {name}"
                raise InputError(f"{path}: a row {what}; {_REMEDY}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which no output takes
            raise InputError(f"{path}: a row has a text that is not Unicode; {_REMEDY}") from None
        if (row["mean"] is None) != (row["ci95"] is None):
            raise InputError(
                f"{path}: a row has mean {row['mean']!r} and ci95 {row['ci95']!r}; {_REMEDY}"
            )
    return found


def stored(path: str | Path) -> list[dict[str, Any]]:
    r"""As :func:`read`; no rows where there is no file yet."""
    return read(path) if Path(path).exists() else []


def merge(path: str | Path, new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Adds rows to the file at ``path``; those measured again replace the old. Returns all."""
    merged = list({_key(row): row for row in (*stored(path), *new)}.values())
    write_json(path, merged)
    return merged


def label(row: dict[str, Any]) -> str:
    r"""How tables and pictures call a row's method."""
    return f"{row['method']} ({row['map']})" if row["map"] else row["method"]


def lines(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    r"""Rows that differ in nothing but the adaptation step, under names that tell them apart.

    Example:
        >>> from mirror_opt.fewshot import Sinusoid
        >>> made, trace = [], {0: torch.ones(2), 1: torch.zeros(2)}
        >>> for guard in ("auto", "off"):
        ...     config = RunConfig.create("sinusoid", "maml", guard=guard, device="cpu")
        ...     made += rows(config, Sinusoid(), trace, 10, 1.0)
        >>> [(name, len(line)) for name, line in lines(made).items()]
        [('maml, guard auto', 2), ('maml, guard off', 2)]
    """
    by_key: dict[tuple, list[dict[str, Any]]] = {}
    for row in found:
        by_key.setdefault(_key(row | {"adapt_steps": None}), []).append(row)
    named = {}
    for line in by_key.values():
        rivals = [other[0] for other in by_key.values() if label(other[0]) == label(line[0])]
        told = {
            name.replace("_", " "): _apart(line[0][name], [other[name] for other in rivals])
            for name in _KEY
            if name not in _NAMED and any(other[name] != line[0][name] for other in rivals)
        }
        # What a line has not is told by the others, which have it.
        texts = [f"{name} {text}" for name, text in told.items() if text]
        named[", ".join([label(line[0]), *texts])] = line
    return named


def setting(found: list[dict[str, Any]]) -> str:
    r"""What rows were measured on, as titles say it: as far as it is the same for all of them."""

    def same(name: str) -> Any:
        values = [row[name] for row in found]
        return values[0] if all(value == values[0] for value in values) else None

    ways, shots, trained = same("ways"), same("shots"), same("train_steps")
    parts = [
        same("task"),
        " ".join([f"{ways}-way"] * bool(ways) + [f"{shots}-shot"] * bool(shots)),
        trained and f"trained at {counted(trained, 'step')}",
    ]
    return ", ".join(part for part in parts if part)


def table(found: list[dict[str, Any]]) -> str:
    r"""A text table, methods by adaptation steps, of mean ± ci95; accuracies are in percent."""
    first = found[0]
    percent = first["metric"] == "accuracy"
    steps = sorted({row["adapt_steps"] for row in found})
    cells = {
        name: {row["adapt_steps"]: _cell(row, percent) for row in line}
        for name, line in lines(found).items()
    }
    width = max(len(name) for name in (*cells, "adaptation steps"))
    cell = max(len(text) for line in cells.values() for text in line.values())
    head = "  ".join([f"{'adaptation steps':{width}}", *(f"{step:>{cell}}" for step in steps)])
    body = [
        "  ".join([f"{name:{width}}", *(f"{line.get(step, ''):>{cell}}" for step in steps)])
        for name, line in cells.items()
    ]
    metric = "query accuracy in %" if percent else "query MSE"
    tasks = {row["test_tasks"] for row in found}
    over = f"{tasks.pop()} tasks" if len(tasks) == 1 else "tasks"
    title = f"{setting(found)}: {metric}, mean ± 95% interval over {over}"
    return "\n".join([title, head, *body])


def _key(row: dict[str, Any]) -> tuple:
    return tuple(json.dumps(row[name], sort_keys=True) for name in _KEY)


def _apart(value: Any, others: list[Any]) -> str:
    r"""What tells a value apart from others: of a dict, the entries that not all of them have.

    Empty for None and where there is no such entry.
    """
    if isinstance(value, dict):
        missing = object()
        value = {
            key: part
            for key, part in value.items()
            if any(other.get(key, missing) != part for other in others)
        }
    return "" if value is None else shown(value)


def _cell(row: dict[str, Any], percent: bool) -> str:
    if row["mean"] is None:
        return "diverged"
    if percent:
        return f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}"
    return f"{row['mean']:.3g} ± {row['ci95']:.2g}"
