r"""What there is to choose from: the maps, and what this machine has."""

import os
from pathlib import Path

import torch

from mirror_opt import backends, fewshot, maps, meta
from mirror_opt.errors import InputError
from mirror_opt.fewshot.cache import cache_dir
from mirror_opt.runs import results
from mirror_opt.runs.options import check_further, shown

__all__ = ["of_maps", "of_what_is_here"]


def of_maps() -> str:
    r"""Every registered map with its properties, and the options that it takes."""
    table = [("name", "domain", "mu", "ell", "grad h", "inverse", "summary")]
    for name, cls in maps.REGISTRY.items():
        # On points of a simplex, where every map is defined.
        mirror_map = maps.create(name, [torch.full((2, 2), 0.5)])
        properties = ("-", "-", "-", "-")
        if cls.is_dgf:
            properties = (
                "yes" if bool(mirror_map.strong_convexity() > 0) else "none",
                "yes" if bool(mirror_map.smoothness().isfinite()) else "none",
                "closed" if mirror_map.forward_is_closed else "Newton",
                "closed" if mirror_map.inverse_is_closed else "Newton",
            )
        table.append((name, cls.domain, *properties, cls.summary))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines += ["", "options of a map, as --map-options name=value,... has them, and their defaults:"]
    for name, cls in maps.REGISTRY.items():
        if options := check_further("map_options", {}, cls, f"map {name}"):
            lines.append(f"{name:{widths[0]}}  {shown(options)}")
    return "\n".join(lines)


def of_what_is_here() -> str:
    r"""Versions, devices, tasks, methods, maps, folders, and every backend or why it is not."""
    data = os.environ.get("MIRROR_OPT_DATA", "none (pass --data-dir, or set MIRROR_OPT_DATA)")
    absent = "MIRROR_OPT_DATA" in os.environ and not Path(data).is_dir()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = results.versions("cpu")
    facts = {
        "mirror_opt": found["mirror_opt"],
        "torch": found["torch"],
        "python": found["python"],
        "threads": torch.get_num_threads(),
        "cuda": ", ".join(cuda) or "none",
        "tasks": ", ".join(fewshot.TASKS),
        "methods": ", ".join(meta.METHODS),
        "maps": ", ".join(maps.REGISTRY),
        "data": f"{data} (absent)" if absent else data,
        "cache": cache_dir(),
    }
    try:
        rows = backends.status()
    except InputError as error:  # of the environment, which names one that is not there
        facts["backend"] = error
        with backends.use_backend("auto"):
            rows = backends.status()
    for row in rows:
        state = row.runs_on or f"not available: {row.reason}"
        facts[f"backend {row.name}"] = f"{state} (chosen)" if row.chosen else state
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items())
