"""Few-shot studies: search the meta learning rates on validation tasks, then train over seeds.

    python bench/fewshot.py STUDY search     # every method, the same grid, one seed, val tasks
    python bench/fewshot.py STUDY confirm    # the best pairs of each method at two more such seeds
    python bench/fewshot.py STUDY final      # every method at its best rates, all seeds, test tasks

Rows go to bench/results/fewshot-STUDY.json, each with its stage, variant and rates; what is there
already is not run again, so a study can be interrupted and gone on with. ``--only`` restricts to
some variants and ``--worker i/n`` to a share of the runs. `bench/report.py` draws tables and
pictures from the rows.
"""

import argparse
import itertools
import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results import add_rows, read_rows, revision

from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.directory import HISTORY, read_json
from mirror_opt.runs.train import train

Rates = tuple[float, float]  # of the init and of the map

SEARCH_SEEDS = (100, 101, 102)  # none of the final ones; the whole grid sees the first only
FINALISTS = 3  # pairs of rates that see the others


@dataclass(frozen=True)
class Study:
    """One table: the setting, and the grid on which every variant's rates are searched."""

    title: str
    setting: dict[str, Any]
    init_lrs: tuple[float, ...]
    map_lrs: tuple[float, ...]
    alone: tuple[float, ...] = ()  # rates of the init where there are none of a map; else init_lrs
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search: dict[str, Any] = field(default_factory=dict)  # what differs while searching
    beside: str | None = None  # a study of the same tasks that this one's results are held against

    @property
    def steps(self) -> int:
        """After how many adaptation steps methods are compared: the most that they trained for."""
        return int(str(self.setting["train_steps"]).rpartition("-")[2])


VARIANTS: dict[str, dict[str, Any]] = {
    "maml": {"method": "maml"},
    "meta-sgd": {"method": "meta-sgd"},
    "meta-curvature": {"method": "meta-curvature"},
    "mirror": {"method": "mirror", "map_options": {"terms": 1}},
    "mirror, psi linear": {"method": "mirror", "map_options": {"terms": 1, "units": 0}},
    "mirror, normalised": {"method": "mirror", "map_options": {"terms": 1, "normalized": True}},
    "mirror, normalised, psi linear": {
        "method": "mirror",
        "map_options": {"terms": 1, "units": 0, "normalized": True},
    },
    "mirror, normalised, 4 terms": {
        "method": "mirror",
        "map_options": {"terms": 4, "normalized": True},
    },
    "mirror, 4 terms": {"method": "mirror", "map_options": {"terms": 4}},
}

_OMNIGLOT = {
    "task": "omniglot",
    "ways": 5,
    "shots": 1,
    "queries": 5,
    "filters": 32,
    "lr": 0.1,
    "tasks_per_batch": 4,
    "test_tasks": 600,
    "adapt_steps": (0, 1, 2, 3, 5, 10),
}
_VALIDATION = {
    "test_tasks": 200,
    "adapt_steps": (1, 5),
    "task_options": {"validation": 100},
}
_SINUSOID = {
    "task": "sinusoid",
    "shots": 10,
    "queries": 10,
    "lr": 0.01,
    "tasks_per_batch": 25,
    "train_steps": 5,
    "test_tasks": 500,
    "adapt_steps": (0, 1, 2, 3, 5, 10),
}
STUDIES = {
    "sinusoid": Study(
        "Sinusoid",
        {**_SINUSOID, "iterations": 3000},
        init_lrs=(3e-3, 1e-2, 2e-2),
        map_lrs=(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "sinusoid-1000": Study(
        "Sinusoid",
        {**_SINUSOID, "iterations": 1000},
        init_lrs=(3e-3, 1e-2, 2e-2),
        map_lrs=(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "sinusoid-rates": Study(
        "Sinusoid",
        {**_SINUSOID, "iterations": 3000, "learn_lr": True},
        init_lrs=(1e-3, 3e-3, 1e-2, 2e-2),
        map_lrs=(3e-3, 1e-2, 3e-2, 1e-1),
        beside="sinusoid",
    ),
    "omniglot-1": Study(
        "Omniglot",
        {**_OMNIGLOT, "iterations": 250, "train_steps": 1},
        init_lrs=(1e-3, 3e-3, 1e-2),
        map_lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        search=_VALIDATION,
    ),
    "omniglot-5": Study(
        "Omniglot",
        {**_OMNIGLOT, "iterations": 300, "train_steps": 5},
        init_lrs=(3e-3,),
        alone=(3e-4, 1e-3, 3e-3, 1e-2),
        map_lrs=(1e-3, 3e-3, 1e-2, 3e-2),
        search=_VALIDATION,
    ),
    "omniglot-1to5": Study(
        "Omniglot",
        {**_OMNIGLOT, "iterations": 300, "train_steps": "1-5"},
        init_lrs=(3e-3,),
        alone=(1e-3, 3e-3, 1e-2),
        map_lrs=(1e-3, 3e-3, 1e-2, 3e-2),
        search=_VALIDATION,
        beside="omniglot-5",
    ),
    "glyphs-1": Study(
        "Glyphs",
        {**_OMNIGLOT, "task": "glyphs", "iterations": 250, "train_steps": 1},
        init_lrs=(3e-3,),
        alone=(1e-3, 3e-3, 1e-2),
        map_lrs=(3e-3, 1e-2, 3e-2),
        search={"test_tasks": 200, "adapt_steps": (1, 5)},
    ),
    "cifar-fs-1": Study(
        "CIFAR-FS",
        {**_OMNIGLOT, "task": "folder", "iterations": 600, "train_steps": 1},
        init_lrs=(1e-3, 3e-3),
        map_lrs=(3e-3, 1e-2, 3e-2),
        seeds=(0, 1, 2),
        search={"test_tasks": 200, "adapt_steps": (1, 5), "iterations": 250},
    ),
}


def grid(name: str, variant: str) -> list[Rates]:
    """The pairs of rates that a study searches for a variant."""
    study = STUDIES[name]
    if variant == "maml":
        return [(init_lr, study.map_lrs[0]) for init_lr in study.alone or study.init_lrs]
    return list(itertools.product(study.init_lrs, study.map_lrs))


def choices(name: str, stage: str, variant: str) -> tuple[list[Rates], tuple[int, ...]]:
    """The pairs of rates of a stage, and the seeds that each is run with."""
    if stage == "search":
        return grid(name, variant), SEARCH_SEEDS[:1]
    if stage == "confirm":
        return finalists(name, variant), SEARCH_SEEDS[1:]
    return [best_rates(name, variant)], STUDIES[name].seeds


def runs(name: str, stage: str, only: list[str] | None) -> list[tuple[str, RunConfig]]:
    """(variant, config) of every run of a stage."""
    study = STUDIES[name]
    setting = {**study.setting, "threads": 1}
    if stage != "final":
        setting |= study.search
    found = []
    for variant, options in VARIANTS.items():
        if only and variant not in only:
            continue
        pairs, seeds = choices(name, stage, variant)
        for (init_lr, map_lr), seed in itertools.product(pairs, seeds):
            choice = {"init_lr": init_lr, "map_lr": map_lr, "seed": seed}
            found.append((variant, RunConfig.create(**{**setting, **options, **choice})))
    return found


def searched(name: str, variant: str) -> dict[Rates, dict[int, float]]:
    """What a search compares, less is better: of every pair of rates that was run, by seed.

    The validation metric after the trained number of steps, accuracy with its sign changed, and
    infinite where it diverged.
    """
    steps = STUDIES[name].steps
    found: dict[Rates, dict[int, float]] = {}
    for row in read_rows(f"fewshot-{name}"):
        if row["stage"] == "final" or (row["variant"], row["adapt_steps"]) != (variant, steps):
            continue
        sign = 1 if row["metric"] == "mse" else -1
        value = math.inf if row["mean"] is None else sign * row["mean"]
        found.setdefault((row["init_lr"], row["map_lr"]), {})[row["seed"]] = value
    if not found:
        raise SystemExit(f"{name}: search {variant!r} first")
    return found


def finalists(name: str, variant: str) -> list[Rates]:
    """The best pairs of rates with the seed that the whole grid was run with."""
    found = searched(name, variant)
    there = {told(variant, *rates) for rates in found}
    if missing := [rates for rates in grid(name, variant) if told(variant, *rates) not in there]:
        raise SystemExit(f"{name}: search the whole grid for {variant!r} first: {missing}")
    return sorted(found, key=lambda rates: found[rates][SEARCH_SEEDS[0]])[:FINALISTS]


def best_rates(name: str, variant: str) -> Rates:
    """The pair of rates with the best mean over seeds, of those that were run with the most."""
    found = searched(name, variant)
    most = max(map(len, found.values()))
    means = {rates: statistics.mean(v.values()) for rates, v in found.items() if len(v) == most}
    return min(means, key=means.__getitem__)


def told(variant: str, init_lr: float, map_lr: float) -> tuple[float, ...]:
    """The rates that say something: without parameters of a map theirs does not."""
    return (init_lr,) if variant == "maml" else (init_lr, map_lr)


def key(stage: str, variant: str, init_lr: float, map_lr: float, seed: int) -> tuple:
    """Which run it is."""
    return (stage, variant, told(variant, init_lr, map_lr), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("stage", choices=("search", "confirm", "final"))
    parser.add_argument("--only", action="append", choices=VARIANTS)
    parser.add_argument("--data-dir")
    parser.add_argument("--worker", default="0/1", help="i/n: every n-th run, from the i-th")
    arguments = parser.parse_args()
    file = f"fewshot-{arguments.study}"
    worker, workers = (int(x) for x in arguments.worker.split("/"))
    split = "test" if arguments.stage == "final" else "val"
    for i, (variant, config) in enumerate(runs(arguments.study, arguments.stage, arguments.only)):
        done = {
            key(r["stage"], r["variant"], r["init_lr"], r["map_lr"], r["seed"])
            for r in read_rows(file)
        }
        mine = key(arguments.stage, variant, config.init_lr, config.map_lr, config.seed)
        if i % workers != worker or mine in done:
            continue
        if arguments.data_dir:
            config = RunConfig(**{**vars(config), "data_dir": arguments.data_dir})
        with tempfile.TemporaryDirectory() as out:
            rows = train(config, out, split=split)
            history = read_json(Path(out) / HISTORY, dict)
        extra = {
            "stage": arguments.stage,
            "variant": variant,
            "lr": config.lr,
            "init_lr": config.init_lr,
            "map_lr": config.map_lr,
            "skipped": history["skipped"],
            "revision": revision(),
        }
        add_rows(file, [{**row, **extra} for row in rows])
        at = next(r for r in rows if r["adapt_steps"] == config.horizon[1])
        print(
            f"{arguments.study} {arguments.stage} {variant} init {config.init_lr:g} "
            f"map {config.map_lr:g} seed {config.seed}: {at['mean']} "
            f"({at['seconds']} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
