"""Ways of doing the same, timed in turn in one process."""

import statistics
import time
from collections.abc import Callable
from operator import truediv
from typing import Any

import torch
from results import revision
from torch._inductor import config as inductor

from mirror_opt.runs.results import versions


def in_turn(
    ways: dict[Any, Callable[[], Any]], repeats: int, base: Callable[[Any], Any]
) -> dict[Any, dict[str, Any]]:
    """What a row of each way says: medians over rounds, the first call apart.

    Args:
        base: the way that a way is compared with. A round runs all of them, so its ratios are free
            of the machine's drift.
    """
    if repeats < 2:
        raise SystemExit(f"--repeats {repeats}: pass 2 or more")
    inductor.force_disable_caches = True  # the first call compiles, whatever has run before

    def seconds(way: Callable[[], Any]) -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    first = {name: seconds(way) for name, way in ways.items()}
    taken: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            taken[name].append(seconds(way))
    rows = {}
    for name, (_, *mine) in taken.items():  # round 0 warms up: with a state, some compile again
        cuts = statistics.quantiles(mine, n=5)
        rows[name] = {
            "seconds": statistics.median(mine),
            "p20": cuts[0],
            "p80": cuts[3],
            "ratio": statistics.median(map(truediv, mine, taken[base(name)][1:])),
            "first": first[name],
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "revision": revision(),
            **versions("cpu"),
        }
    return rows
