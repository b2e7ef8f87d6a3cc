r"""Meta-training: the outer loop, its schedule, and going on after an interruption.

Everything an iteration needs is a pure function of the config and the iteration's number (the
tasks, the trained horizon, the rates) or is in the checkpoint (parameters, Adam's moments), so a
resumed run takes the very steps that an uninterrupted one takes.
"""

import contextlib
import dataclasses
import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mirror_opt.errors import InputError
from mirror_opt.fewshot import TaskFamily
from mirror_opt.meta import MetaLearner, NonFiniteLossError
from mirror_opt.newton import NewtonError
from mirror_opt.runs import checkpoint, results
from mirror_opt.runs.config import RunConfig, build
from mirror_opt.runs.directory import (
    CHECKPOINT,
    CONFIG,
    HISTORY,
    RESULTS,
    check_free,
    clear,
    read_configs,
    write_json,
)
from mirror_opt.runs.evaluate import evaluate
from mirror_opt.runs.lock import writing
from mirror_opt.runs.recovery import Recovery

__all__ = ["check_data", "check_save_every", "decay", "horizon", "open_run", "prepare", "train"]

_log = logging.getLogger(__name__)

_CLIP = 10.0  # the meta-gradient's norm is cut to this
_BETAS = (0.9, 0.99)
_TAIL, _FLOOR = 0.75, 0.05  # constant rates, then a linear decay from here down to this factor


def decay(iteration: int, iterations: int) -> float:
    r"""The factor on every outer rate: 1, then linear over the last quarter to a twentieth.

    Example:
        >>> [round(decay(i, 101), 3) for i in (0, 75, 100)]
        [1.0, 1.0, 0.05]
    """
    if iterations == 1:
        return 1.0
    done = iteration / (iterations - 1)
    return 1.0 - (1.0 - _FLOOR) * max(0.0, done - _TAIL) / (1.0 - _TAIL)


def horizon(seed: int, iteration: int, bounds: tuple[int, int]) -> int:
    r"""The number of inner steps of an iteration: uniform on ``bounds``, both included.

    A pure function of its arguments, so that every method sees the same sequence.
    """
    return random.Random(f"horizon {seed} {iteration}").randint(*bounds)


@dataclasses.dataclass
class _Training:
    r"""What changes while training, and how it goes into a checkpoint and comes out."""

    config: RunConfig
    task: TaskFamily
    learner: MetaLearner
    optimizer: torch.optim.Optimizer
    recovery: Recovery
    losses: list[float]  # one per iteration; NaN where the iteration was skipped
    seconds: float = 0.0

    @property
    def skipped(self) -> int:
        return sum(math.isnan(loss) for loss in self.losses)

    def step(self) -> float:
        r"""One meta-iteration; returns its loss, or NaN where no parameter was moved."""
        iteration, config = len(self.losses), self.config
        batch = self.task.sample("train", iteration, config.tasks_per_batch).to(config.device)
        self.optimizer.zero_grad(set_to_none=True)
        factor = self.recovery.rate * decay(iteration, config.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * _rate(config, group["name"])
        try:
            loss = self.learner.meta_loss(
                self.task.loss_fn,
                *batch,
                steps=horizon(config.seed, iteration, config.horizon),
            )
            loss.backward()
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = float(nn.utils.clip_grad_norm_(params, _CLIP))
            value = float(loss.detach())
        except (NonFiniteLossError, NewtonError):  # the latter by backward, through a solve
            value = norm = math.nan
        if not self.recovery.admit(value, norm):
            return math.nan
        self.optimizer.step()
        return value

    def save(self, path: Path) -> None:
        checkpoint.save(
            path,
            {
                "config": self.config.to_dict(),
                "data": self.task.fingerprint,
                "iteration": len(self.losses),
                "learner": self.learner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "recovery": self.recovery.state_dict(),
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "seconds": self.seconds,
            },
        )

    def restore(self, path: Path) -> RunConfig:
        r"""Goes on from the checkpoint at ``path``; returns the config that it was saved with."""
        state = checkpoint.load(path)
        saved = RunConfig.from_dict(state["config"], path)
        saved.check_same(vars(self.config), path)
        check_data(path, state, self.config, self.task)
        checkpoint.restore(path, self.learner, state["learner"], "model")
        checkpoint.restore(path, self.optimizer, state["optimizer"], "optimizer")
        checkpoint.restore(path, self.recovery, state["recovery"], "run")
        self.losses, self.seconds = state["losses"].tolist(), state["seconds"]
        return saved


def open_run(
    out: str | os.PathLike, given: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> RunConfig:
    r"""The config to train with in ``out``, before anything is written there.

    Args:
        out: the run's directory.
        given: options of :meth:`RunConfig.create`, ``task`` among them unless a run is resumed.
        resume: go on with the run in ``out``, if there is one.
        overwrite: replace the run in ``out``, if there is one.

    Raises:
        InputError: ``out`` holds a run and neither was asked, or files of something else, an
            option differs from its own, or there is nothing to resume and no task to start.
    """
    out = Path(out)
    if resume and (out / CONFIG).exists():
        configs = read_configs(out)
        if "" not in configs:
            raise InputError(f"{out}: holds a comparison; use `mirror-opt compare --resume`")
        config = RunConfig.from_dict(configs[""], out / CONFIG)
        config.check_same(given, out)
        moved = {"data_dir": given["data_dir"]} if "data_dir" in given else {}
        return dataclasses.replace(config, **moved)
    if resume and "task" not in given:
        raise InputError(f"{out}: no run there to go on with; pass the --out of one")
    if resume:
        _log.warning("%s: no run to go on with, starting one", out)
    check_free(out, overwrite=overwrite)
    return RunConfig.create(**given)


def train(
    config: RunConfig,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    download: bool = False,
    save_every: float = 30.0,
    split: str = "test",
) -> list[dict[str, Any]]:
    r"""Meta-trains as ``config`` says, evaluates on test tasks, and writes all of it to ``out``.

    Goes on from the checkpoint in ``out`` where there is one (see :func:`open_run` for the check
    that it is the same run). The outer loop is Adam with the meta-gradient's norm cut to 10.
    An iteration whose loss or meta-gradient is not finite, or a hundred times the usual, is left
    out and counted. Where many are, or where the loss rises for good, training goes on from an
    earlier state with lower rates, which then grow back (:mod:`mirror_opt.runs.recovery`).

    Args:
        config: what to train.
        out: the directory for config, checkpoint, history and results.
        overwrite: remove a run that is there first.
        download: fetch the data where that is possible.
        save_every: seconds between checkpoints; there is always one at the end.
        split: what to evaluate on: ``"test"``, or ``"val"`` to choose between settings.

    Returns:
        The result rows, one per adaptation step.

    Raises:
        InputError: data, options or a checkpoint that cannot be used, or another run is writing
            in ``out``.
        OSError: ``out`` cannot be written.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    out = Path(out)
    check_save_every(save_every)
    task, learner = prepare(config, download=download)
    groups = learner.param_groups(
        init_lr=config.init_lr, map_lr=config.map_lr, rate_lr=config.rate_lr
    )
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    training = _Training(config, task, learner, optimizer, Recovery(learner, optimizer), [])
    with writing(out):
        _begin(training, out, overwrite)
        _loop(training, out / CHECKPOINT, save_every)
        return _end(training, out, split)


def prepare(config: RunConfig, download: bool = False) -> tuple[TaskFamily, MetaLearner]:
    r"""The task family and the learner of a run as it starts, calibrated on the first tasks.

    What cannot be made, or is too large, shows here, before anything is written.
    """
    task, learner = build(config, download=download)
    first = task.sample("train", 0, config.tasks_per_batch).to(config.device)
    learner.calibrate(task.loss_fn, first.support_x, first.support_y)
    return task, learner


def check_data(
    path: str | os.PathLike, state: dict[str, Any], config: RunConfig, task: TaskFamily
) -> None:
    r"""Raises InputError unless the checkpoint ``state`` at ``path`` is of the data of ``task``."""
    if state["data"] != task.fingerprint:
        where = config.data_dir or "this task"
        raise InputError(
            f"{path}: trained on other data than that of {where}; "
            "pass --data-dir with the data that it was trained on, or train anew with --out"
        )


def check_save_every(seconds: float) -> None:
    r"""Raises InputError unless ``seconds`` can be a time between checkpoints."""
    if not seconds >= 0:  # NaN neither
        raise InputError(f"--save-every {seconds}: pass a number of seconds, at least 0")


def _begin(training: _Training, out: Path, overwrite: bool) -> None:
    r"""Goes on from the checkpoint in ``out``, or makes ``out`` that of a new run."""
    config = training.config
    if (out / CHECKPOINT).exists() and not overwrite:
        results.stored(out / RESULTS)  # a damaged file shows before the work is done
        if training.restore(out / CHECKPOINT).data_dir != config.data_dir:
            write_json(out / CONFIG, config.to_dict())
            training.save(out / CHECKPOINT)  # where the data is now, evaluating looks for it too
    else:
        clear(out)  # results without their checkpoint would pass for those of the new run
        write_json(out / CONFIG, config.to_dict())


def _loop(training: _Training, path: Path, save_every: float) -> None:
    config = training.config
    if len(training.losses) == config.iterations:
        return
    smooth = None
    with (
        _interrupts() as interrupted,
        tqdm(
            total=config.iterations,
            initial=len(training.losses),
            desc=config.label,
            unit="it",
            disable=None,
        ) as bar,
    ):
        tick = saved = time.monotonic()
        while len(training.losses) < config.iterations:
            loss = training.step()
            training.losses.append(loss)
            now = time.monotonic()
            training.seconds, tick = training.seconds + now - tick, now
            if not math.isnan(loss):
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
                bar.set_postfix_str(f"query loss {smooth:.3f}", refresh=False)
            bar.update()
            if interrupted:
                training.save(path)
                raise KeyboardInterrupt
            if now - saved >= save_every:
                training.save(path)
                saved = tick = time.monotonic()
    training.save(path)


def _end(training: _Training, out: Path, split: str) -> list[dict[str, Any]]:
    r"""Writes the history, and the rows of the run unless they are there; returns them."""
    config, task = training.config, training.task
    if training.skipped:
        _log.warning(
            "%s: %d of %d iterations were left out: not finite, or far from the usual; the "
            "outer rates are at %.3g of those given%s",
            config.label,
            training.skipped,
            config.iterations,
            training.recovery.rate,
            _advice(training.skipped, config.iterations),
        )
    losses = [None if math.isnan(loss) else loss for loss in training.losses]
    history = {"loss": losses, "skipped": training.skipped, "rate": training.recovery.rate}
    write_json(out / HISTORY, history)
    if found := results.find(out / RESULTS, config, task, split):
        return found
    trace = evaluate(training.learner, task, config, split=split)
    found = results.rows(config, task, trace, config.iterations, training.seconds, split)
    results.merge(out / RESULTS, found)
    return found


def _advice(skipped: int, iterations: int) -> str:
    if 2 * skipped <= iterations:
        return ""
    learned = "nothing" if skipped == iterations else "little"
    return f"; {learned} was learned: lower --lr, the inner step size, or --init-lr and --map-lr"


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    r"""Collects the first Ctrl-C or SIGTERM in a list, so that an iteration ends before the run
    stops.

    A second one acts at once: the checkpoint is then the last one saved. One that is ignored, as
    Ctrl-C is by what a script starts in the background, stays so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers, and only it is interrupted
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handle(before)

    def handle(handlers: Mapping[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is one that Python has not set, and could not set again.
    before = {n: old for n, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    handle(dict.fromkeys(before, note))
    try:
        yield received
    finally:
        handle(before)


def _rate(config: RunConfig, group: str) -> float:
    return {"init": config.init_lr, "map": config.map_lr, "rate": config.rate_lr}[group]
