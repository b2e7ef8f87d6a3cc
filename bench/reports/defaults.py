"""The default outer rates: of all pairs that every study has searched, the one that loses least.

A pair loses in a study what its validation metric is behind that of the method's best pair: points
of accuracy, or the factor on the error. The worst study counts, so that the defaults are steady.
"""

import math

from fewshot import STUDIES
from results import read_rows

from mirror_opt import meta
from reports.frame import PENDING, part, table

Rates = tuple[float, float]  # of the init and of the map

METHODS = ("maml", "meta-sgd", "meta-curvature", "mirror")
COUNTED = [name for name, study in STUDIES.items() if study.beside is None]
KINDS = {  # a task of the kind, as ``meta.defaults`` takes it, and the studies of it
    "sinusoid": [name for name in COUNTED if name.startswith("sinusoid")],
    "omniglot": [name for name in COUNTED if not name.startswith("sinusoid")],
}


def behind(study: str, method: str) -> dict[Rates, float]:
    """How far each pair of rates is behind the best: in points, or as the log of a factor."""
    found: dict[Rates, float] = {}
    for row in read_rows(f"fewshot-{study}"):
        trained = row["stage"] == "search" and row["adapt_steps"] == STUDIES[study].steps
        if not trained or row["variant"] != method:
            continue
        mean = math.nan if row["mean"] is None else row["mean"]
        value = -100 * mean if row["metric"] == "accuracy" else math.log(mean)
        # Without parameters of a map the second rate is none.
        rates = (row["init_lr"], 0.0 if method == "maml" else row["map_lr"])
        found[rates] = math.inf if math.isnan(value) else value
    return {rates: value - min(found.values()) for rates, value in found.items()}


def steadiest(kind: str, method: str) -> tuple[Rates, float] | None:
    """The pair that is least behind in its worst study, and how far; None without rows."""
    studies = [behind(study, method) for study in KINDS[kind]]
    if not all(studies):
        return None
    common = set.intersection(*map(set, studies))
    worst = {rates: max(study[rates] for study in studies) for rates in common}
    rates = min(sorted(worst), key=worst.__getitem__)
    return rates, worst[rates]


def check() -> None:
    """Raises AssertionError where ``meta.defaults`` is not what the rows say."""
    for kind in KINDS:
        for method in METHODS:
            found = steadiest(kind, method)
            assert found is not None, f"{kind}, {method}: no rows"
            given = meta.defaults(method, kind)
            (init_lr, map_lr), _ = found
            assert given.init_lr == init_lr, f"{kind}, {method}: init {init_lr}, not {given}"
            assert map_lr in (0, given.map_lr), f"{kind}, {method}: map {map_lr}, not {given}"


@part("defaults")
def defaults() -> str:
    body = []
    for kind in KINDS:
        for method in METHODS:
            found = steadiest(kind, method)
            if found is None:
                return PENDING
            (init_lr, map_lr), worst = found
            lost = f"{math.exp(worst):.2f} times" if kind == "sinusoid" else f"{worst:.1f} points"
            body.append(
                [
                    "sinusoid" if kind == "sinusoid" else "images",
                    method,
                    f"{init_lr:g}" + f", {map_lr:g}" * bool(map_lr),
                    lost,
                ]
            )
    head = ["tasks", "method", "steadiest rates (init, map)", "behind the best, at worst"]
    return table(head, body)
