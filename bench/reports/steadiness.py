"""How much the rate that a map is learned at matters to what is learned, on images."""

import statistics

from fewshot import searched
from results import read_rows

from reports.frame import PENDING, part, table

STUDIES = ("omniglot-1", "omniglot-5", "omniglot-1to5", "glyphs-1", "cifar-fs-1")
VARIANTS = ("meta-curvature", "mirror", "mirror, normalised")
INIT = 3e-3  # the rate of the init, which every study has searched
RATES = (1e-3, 3e-3, 1e-2)  # of the map


def line(study: str, variant: str) -> list[str] | None:
    """The accuracy in % at each of the rates, and by how much rates and seeds move it.

    Means over the seeds that all the rates were run with; None where fewer than two were run.
    """
    if not any(row["variant"] == variant for row in read_rows(f"fewshot-{study}")):
        return None
    found = searched(study, variant)
    runs = {rate: found[INIT, rate] for rate in RATES if (INIT, rate) in found}
    if len(runs) < 2:
        return None
    seeds = set.intersection(*map(set, runs.values()))
    means = {
        rate: -100 * statistics.mean(run[seed] for seed in seeds) for rate, run in runs.items()
    }
    cells = [f"{means[rate]:.1f}" if rate in means else "" for rate in RATES]
    over_rates = f"{max(means.values()) - min(means.values()):.1f}"
    spreads = (max(run.values()) - min(run.values()) for run in runs.values())
    over_seeds = f"{100 * max(spreads):.1f}" * (len(seeds) > 1)
    return [f"`{study}`", variant, *cells, over_rates, over_seeds, str(len(seeds))]


@part("steadiness")
def steadiness() -> str:
    lines = [found for s in STUDIES for v in VARIANTS if (found := line(s, v)) is not None]
    if not lines:
        return PENDING
    head = ["study", "method", *[f"map rate {rate:g}" for rate in RATES]]
    title = (
        "Query accuracy in % on validation tasks at the trained number of steps, with a rate of "
        f"{INIT:g} for the init, and by how many points it moves over the rates of the map, and "
        "over seeds at one rate."
    )
    return f"{title}\n\n{table([*head, 'over rates', 'over seeds, at most', 'seeds'], lines)}"
