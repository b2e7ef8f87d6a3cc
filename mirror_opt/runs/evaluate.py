r"""Evaluation: a learner on tasks unseen in training, after each number of adaptation steps."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mirror_opt import fewshot
from mirror_opt.errors import InputError
from mirror_opt.fewshot import TaskFamily
from mirror_opt.meta import MetaLearner
from mirror_opt.runs import checkpoint, results
from mirror_opt.runs.config import GUARDS, RunConfig, build
from mirror_opt.runs.directory import CHECKPOINT, CONFIG, RESULTS, read_configs
from mirror_opt.runs.lock import writing
from mirror_opt.runs.options import option, pairs, resume_command

__all__ = ["OVERRIDES", "evaluate", "evaluate_run", "load_run", "method_dirs"]

_log = logging.getLogger(__name__)

# What may change between training a learner and evaluating it.
OVERRIDES = (
    "adapt_steps",
    "test_tasks",
    "guard",
    "device",
    "data_dir",
    "threads",
    "task",
    "task_options",
    "shots",
    "queries",
)

# The size of a batch is part of which tasks are drawn: one constant, whatever the meta-batch.
_BATCH = 25


def evaluate(
    learner: MetaLearner, task: TaskFamily, config: RunConfig, *, split: str = "test"
) -> dict[int, torch.Tensor]:
    r"""The task family's metric on the query sets of ``config.test_tasks`` tasks.

    Args:
        learner: adapts to each task's support set.
        task: where the tasks come from.
        config: gives ``adapt_steps``, ``test_tasks``, ``guard`` and ``device``.
        split: ``"test"``, or ``"val"`` to choose between settings.

    Returns:
        For each number of adaptation steps a float tensor ``(test_tasks,)`` on the CPU.
    """
    parts: dict[int, list[torch.Tensor]] = {step: [] for step in config.adapt_steps}
    with tqdm(
        total=config.test_tasks,
        desc=f"{config.label}: {split}",
        unit="task",
        disable=None,
        leave=False,
    ) as bar:
        for index, start in enumerate(range(0, config.test_tasks, _BATCH)):
            count = min(_BATCH, config.test_tasks - start)
            batch = task.sample(split, index, count).to(config.device)
            found = learner.evaluate(
                task.loss_fn,
                task.metric_fn,
                *batch,
                adapt_steps=config.adapt_steps,
                guard=GUARDS[config.guard],
            )
            for step, values in found.metrics.items():
                parts[step].append(values.cpu())
            bar.update(count)
    return {step: torch.cat(values) for step, values in parts.items()}


def load_run(
    out: str | os.PathLike, given: dict[str, Any] | None = None
) -> tuple[RunConfig, TaskFamily, MetaLearner, dict[str, Any]]:
    r"""The config, task family, trained learner and checkpoint of the run in ``out``.

    Args:
        out: the run's directory.
        given: options to change, of :data:`OVERRIDES`.

    Raises:
        InputError: no such run, an option that only training can change, or a checkpoint that
            does not fit the model.
    """
    path = Path(out) / CHECKPOINT
    state = checkpoint.load(path)
    stored = RunConfig.from_dict(state["config"], path)
    _check_own(Path(out), stored)
    given = dict(given or {})
    for name in given:
        if name not in OVERRIDES:
            raise InputError(
                f"{option(name)}: part of how the run in {out} was trained; drop it, or train anew"
            )
    values = dict(vars(stored))
    values["device"] = "auto"  # a run may be evaluated where its own device is not
    own, other = stored.task, given.get("task", stored.task)
    models = {name: family.model for name, family in fewshot.TASKS.items()}
    if models.get(other, models[own]) is not models[own]:
        raise InputError(
            f"--task {other}: the run in {out} has a network for {own}, which cannot read these "
            f"tasks; drop --task, or train on {other}"
        )
    if other != own:
        values |= {"data_dir": None, "task_options": {}}
    if "task_options" in given:  # in part
        given["task_options"] = values["task_options"] | pairs(given["task_options"])
    config = RunConfig.create(**values | given)
    task, learner = build(config)
    checkpoint.restore(path, learner, state["learner"], "model")
    return config, task, learner, state


def _check_own(out: Path, stored: RunConfig) -> None:
    r"""Raises InputError if the checkpoint in ``out`` is of another run than the config there."""
    # The config of a comparison lies above the directories of its methods.
    for place, name in ((out, ""), (out.parent, out.name)):
        if (place / CONFIG).exists() and name in (configs := read_configs(place)):
            config = RunConfig.from_dict(configs[name], place / CONFIG)
            try:
                stored.check_same(vars(config), out / CHECKPOINT)
            except InputError as error:
                raise InputError(
                    f"{out / CHECKPOINT}: of another run than {place / CONFIG}; bring back the one "
                    f"that it was trained with ({str(error).partition(';')[0]})"
                ) from None
            return


def method_dirs(out: str | os.PathLike) -> list[Path]:
    r"""``[out]`` for a run of one method, the methods' directories for a comparison.

    Raises:
        InputError: no run there, or one of them has no checkpoint yet.
    """
    out = Path(out)
    methods = list(read_configs(out))
    for method in methods:
        if not (out / method / CHECKPOINT).exists():
            what, command = (method, "compare") if method else ("the run", "train")
            raise InputError(
                f"{out / method / CHECKPOINT}: no checkpoint there, {what} is not trained yet; "
                f"go on with: {resume_command(command, out)}"
            )
    return [out / method for method in methods]


def evaluate_run(out: str | os.PathLike, given: dict[str, Any]) -> list[dict[str, Any]]:
    r"""Evaluates the checkpoint(s) in ``out`` and adds the rows to its ``results.json``.

    Args:
        out: the directory of a run, or of a comparison (every method of it is evaluated).
        given: options to change, of :data:`OVERRIDES`.

    Returns:
        The new rows.

    Raises:
        InputError: no such run, one that cannot be evaluated so, or another is writing there.
        OSError: ``out`` cannot be written.
    """
    # What is damaged or does not fit shows before the work is done, and what cannot be written.
    loaded = [load_run(directory, given) for directory in method_dirs(out)]
    with writing(out):
        results.stored(Path(out) / RESULTS)
        new = []
        for config, task, learner, state in loaded:
            if state["iteration"] < config.iterations:
                _log.warning(
                    "%s: the run was stopped after %d of %d iterations",
                    config.label,
                    state["iteration"],
                    config.iterations,
                )
            trace = evaluate(learner, task, config)
            new += results.rows(config, task, trace, state["iteration"], state["seconds"])
        results.merge(Path(out) / RESULTS, new)
    return new
