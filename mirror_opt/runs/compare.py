r"""Comparison: several methods, the same initialisation, tasks and budget, one table."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from mirror_opt import meta
from mirror_opt.errors import InputError
from mirror_opt.runs import checkpoint, results
from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.directory import (
    CHECKPOINT,
    CONFIG,
    RESULTS,
    check_free,
    clear,
    read_configs,
    write_json,
)
from mirror_opt.runs.lock import writing
from mirror_opt.runs.options import option
from mirror_opt.runs.train import check_data, check_save_every, prepare, train

__all__ = ["METHODS", "compare", "open_comparison"]

_log = logging.getLogger(__name__)

METHODS = ("maml", "meta-curvature", "mirror")

# Options of one method only; given to a comparison, they are for that method.
_MIRROR_ONLY = ("map", "map_options")


def open_comparison(
    out: str | os.PathLike,
    given: dict[str, Any],
    methods: tuple[str, ...] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> list[RunConfig]:
    r"""One config per method, before anything is written.

    Args:
        out: the comparison's directory.
        given: options of :meth:`RunConfig.create`, for every method (the map's for ``mirror``).
        methods: names, each once; None for :data:`METHODS`, or those of the comparison resumed.
        resume: go on with the comparison in ``out``, if there is one.
        overwrite: replace the comparison in ``out``, if there is one.

    Raises:
        InputError: ``out`` holds a run and neither was asked, or one of its own where a method's
            would be, an option differs from its own, or an option or a method that cannot be.
    """
    out = Path(out)
    if resume and (out / CONFIG).exists():
        stored = read_configs(out)
        if "" in stored:
            raise InputError(f"{out}: holds a run of one method; use `mirror-opt train --resume`")
        if methods is not None and set(methods) != set(stored):
            raise InputError(
                f"--methods {','.join(methods)}: the comparison in {out} has "
                f"{','.join(stored)}; drop --methods to resume it, or pass another --out"
            )
        configs = [RunConfig.from_dict(one, out / CONFIG) for one in stored.values()]
        for config in configs:
            config.check_same(_for(config.method, given), out)
        moved = {"data_dir": given["data_dir"]} if "data_dir" in given else {}
        return [dataclasses.replace(config, **moved) for config in configs]
    if resume and "task" not in given:
        raise InputError(f"{out}: no comparison there to go on with; pass the --out of one")
    if resume:
        _log.warning("%s: no comparison to go on with, starting one", out)
    methods = METHODS if methods is None else methods
    for name in methods:
        if name not in meta.METHODS:
            raise InputError(
                f"--methods {','.join(methods)}: {name!r} is unknown; choose from "
                f"{', '.join(meta.METHODS)}"
            )
    check_free(out, overwrite=overwrite)
    there = _methods_in(out)
    for name in methods:
        if name not in there and (out / name / CONFIG).exists():
            raise InputError(
                f"{out / name}: holds a run that is no part of a comparison in {out}; "
                "pass another --out"
            )
    for name in {*there, *methods}:
        check_free(out / name, overwrite=True)
    if not methods or len(set(methods)) != len(methods):
        raise InputError(f"--methods {','.join(methods)}: pass one or more names, each once")
    for name in _MIRROR_ONLY:
        if name in given and "mirror" not in methods:
            raise InputError(
                f"{option(name)}: none of --methods takes a map; add mirror to --methods"
            )
    return [RunConfig.create(method=name, **_for(name, given)) for name in methods]


def compare(
    configs: list[RunConfig],
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    download: bool = False,
    save_every: float = 30.0,
) -> list[dict[str, Any]]:
    r"""Trains every config in ``out/<method>`` and merges the rows into ``out/results.json``.

    A method that is finished is not trained again; one that was interrupted goes on.

    Args:
        configs: one per method, from :func:`open_comparison`.
        out, overwrite, download, save_every: as for :func:`mirror_opt.runs.train.train`.

    Returns:
        The rows of all methods.
    """
    out = Path(out)
    check_save_every(save_every)
    for config in configs:  # a mistake in the last method shows before the first is trained
        task, _ = prepare(config, download=download)
        path = out / config.method / CHECKPOINT
        if path.exists() and not overwrite:
            check_data(path, checkpoint.load(path), config, task)
    with writing(out):
        if not overwrite:  # and a damaged file before the work is done
            for directory in (out, *(out / config.method for config in configs)):
                results.stored(directory / RESULTS)
        if overwrite:
            for name in {*_methods_in(out), *(config.method for config in configs)}:
                clear(out / name)
            clear(out)
        write_json(out / CONFIG, {"methods": {c.method: c.to_dict() for c in configs}})
        rows = []
        for config in configs:
            rows += train(config, out / config.method, save_every=save_every)
        results.merge(out / RESULTS, rows)
    return rows


def _methods_in(out: Path) -> list[str]:
    r"""The methods of the comparison in ``out``; none where there is no comparison."""
    found = read_configs(out) if (out / CONFIG).exists() else {}
    return [name for name in meta.METHODS if name in found]


def _for(method: str, given: dict[str, Any]) -> dict[str, Any]:
    if method == "mirror":
        return given
    return {name: value for name, value in given.items() if name not in _MIRROR_ONLY}
