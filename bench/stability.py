"""Taking more steps than were trained: every method, with and without the guard, 1 to 100 steps.

    python bench/stability.py

Sinusoid, trained at one inner step, 3000 meta-iterations, four seeds, at the rates that the study
``bench/fewshot.py sinusoid`` found at five; rows of other rates are replaced. Rows in
bench/results/stability.json: the query metric after each number of steps, whether every task
stayed finite, the largest relative rise of a support loss in one guarded step, and the share of
tasks whose direction goes uphill (<g, phi_new - phi> > 0).
"""

import argparse
import tempfile

import torch
from fewshot import STUDIES, VARIANTS, best_rates
from results import add_rows, matches, read_rows, revision

from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.evaluate import load_run
from mirror_opt.runs.results import versions
from mirror_opt.runs.train import train

NAME = "stability"
SEEDS = (0, 1, 2, 3)
STEPS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
TASKS = 500
# Rates are searched for the variants of the few-shot study; the last two share MAML's.
SEARCHED = ("maml", "meta-sgd", "meta-curvature", "mirror")
CASES = {
    **{name: (VARIANTS[name], name) for name in SEARCHED},
    "fomaml": ({"method": "fomaml"}, "maml"),
    "anil": ({"method": "anil"}, "maml"),
}
GUARDS = {"none": False, "past the trained steps": "auto", "every step": True}


def largest_rise(losses: torch.Tensor) -> float:
    """The largest (L_{k+1} - L_k) / L_k over tasks and steps; 0 when no loss rises."""
    rise = losses.diff(dim=1) / losses[:, :-1].clamp(min=1e-12)
    return float(rise.max().clamp(min=0))


def measure(variant: str, seed: int, options: dict, rates: dict) -> list[dict]:
    setting = {**STUDIES["sinusoid"].setting, "train_steps": 1, "threads": 1}
    config = RunConfig.create(**{**setting, **options, **rates, "seed": seed, "test_tasks": 2})
    with tempfile.TemporaryDirectory() as out:
        train(config, out)
        config, task, learner, _ = load_run(out)
    batch = task.sample("test", 0, TASKS)
    rows = []
    for guard, value in GUARDS.items():
        # A step's own loss is known before the next: one more shows what the last one did.
        steps = (*STEPS, STEPS[-1] + 1)
        result = learner.evaluate(
            task.loss_fn, task.metric_fn, *batch, adapt_steps=steps, guard=value
        )
        uphill = (result.slopes > 0).float().mean(0)
        trusted = {"none": None, "past the trained steps": 1, "every step": 0}[guard]
        losses = result.losses if trusted is None else result.losses[:, trusted:]
        for step in STEPS:
            metric = result.metrics[step]
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "guard": guard,
                    "train_steps": 1,
                    "adapt_steps": step,
                    "metric": "mse",
                    "mean": float(metric.mean()) if bool(metric.isfinite().all()) else None,
                    "median": float(metric.nanmedian()),
                    "finite": float(metric.isfinite().float().mean()),
                    "uphill": float(uphill[step - 1]),
                    "largest_rise": largest_rise(losses) if trusted is not None else None,
                    "rejected": None
                    if result.accepted is None
                    else float(1 - result.accepted.float().mean()),
                    "test_tasks": TASKS,
                    **rates,
                    "iterations": config.iterations,
                    "revision": revision(),
                    **versions("cpu"),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", default="0/1", help="i/n: every n-th run, from the i-th")
    worker, workers = (int(x) for x in parser.parse_args().worker.split("/"))
    todo = [(variant, seed) for seed in SEEDS for variant in CASES]
    for variant, seed in todo[worker::workers]:
        options, source = CASES[variant]
        rates = dict(zip(("init_lr", "map_lr"), best_rates("sinusoid", source), strict=True))
        mine = {"variant": variant, "seed": seed}
        if any(matches(r, mine | rates) for r in read_rows(NAME)):
            continue
        rows = measure(variant, seed, options, rates)
        add_rows(NAME, rows, instead_of=mine)
        last = {r["guard"]: r["mean"] for r in rows if r["adapt_steps"] == STEPS[-1]}
        print(variant, seed, last, flush=True)


if __name__ == "__main__":
    main()
