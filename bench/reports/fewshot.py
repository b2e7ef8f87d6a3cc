"""Tables and pictures of the few-shot studies."""

import math
import statistics
from collections.abc import Iterator

from fewshot import SEARCH_SEEDS, STUDIES, VARIANTS, best_rates, searched, told
from results import read_rows

from mirror_opt.runs.options import counted
from reports.frame import COLOURS, PENDING, canvas, circumstances, part, picture, save, table


def finals(study: str) -> list[dict]:
    """The results at the rates that the search found, as far as it has been run."""
    rows = [r for r in read_rows(f"fewshot-{study}") if r["stage"] == "final"]
    best = {variant: best_rates(study, variant) for variant in {r["variant"] for r in rows}}
    return [r for r in rows if (r["init_lr"], r["map_lr"]) == best[r["variant"]]]


def over_seeds(rows: list[dict]) -> tuple[float | None, float, int]:
    """Mean and standard deviation over the seeds, and their number; None where one diverged."""
    means = [r["mean"] for r in rows]
    if any(m is None for m in means):
        return None, 0.0, len(means)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return statistics.mean(means), spread, len(means)


def study_table(study: str) -> str:
    rows = finals(study)
    if not rows:
        return PENDING
    percent = rows[0]["metric"] == "accuracy"
    steps = sorted({r["adapt_steps"] for r in rows})
    body = []
    for variant in VARIANTS:
        mine = [r for r in rows if r["variant"] == variant]
        if not mine:
            continue
        cells = []
        for step in steps:
            mean, spread, count = over_seeds([r for r in mine if r["adapt_steps"] == step])
            if mean is None:
                cells.append("diverged")
            else:
                cell = f"{100 * mean:.1f}" if percent else f"{mean:.3g}"
                if count > 1:
                    cell += f" ± {100 * spread:.1f}" if percent else f" ± {spread:.1g}"
                cells.append(cell)
        seeds = len({r["seed"] for r in mine})
        rates = f"{mine[0]['init_lr']:g}" + (f", {mine[0]['map_lr']:g}" * (variant != "maml"))
        body.append([variant, rates, *cells, str(seeds)])
    first = rows[0]
    what = "Query accuracy in %" if percent else "Query MSE"
    ways = f"{first['ways']}-way " if first["ways"] else ""
    learned = ", the rate of each inner step learned" if first.get("learn_lr") else ""
    title = (
        f"{STUDIES[study].title}, {ways}{first['shots']}-shot, inner steps in training: "
        f"{first['train_steps']}, meta-iterations: {first['iterations']}{learned}. {what} on "
        f"{first['test_tasks']} new tasks after each number of adaptation steps, mean ± standard "
        "deviation over seeds. Past the trained steps the guard is on."
    )
    head = ["method", "rates (init, map)", *[str(s) for s in steps], "seeds"]
    parts = [title, table(head, body), paired(study, rows), circumstances(rows)]
    return "\n\n".join(part for part in parts if part)


def paired(study: str, rows: list[dict]) -> str:
    """Learned maps against their rivals at the trained step, seed by seed: on the same tasks."""
    percent = rows[0]["metric"] == "accuracy"
    steps = STUDIES[study].steps
    what = "mean ± standard error" if percent else "geometric mean, and one standard error"
    told = []
    for variant in ("mirror", "mirror, normalised"):
        mine, found = after(rows, variant, steps), []
        for theirs, name in rivals(study, rows, variant):
            pairs = [(mean, theirs[seed]) for seed, mean in mine.items() if seed in theirs]
            if len(pairs) < 2:
                continue
            values = [100 * (a - b) if percent else math.log(a / b) for a, b in pairs]
            mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
            if percent:
                found.append(f"{mean:+.2f} ± {error:.2f} points against {name}")
            else:
                low, high = math.exp(mean - error), math.exp(mean + error)
                found.append(f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f}) times that of {name}")
        if found:
            told.append(f"`{variant}`: {'; '.join(found)}.")
    if not told:
        return ""
    return f"At the trained number of steps, paired over seeds ({what}): {' '.join(told)}"


def rivals(study: str, rows: list[dict], variant: str) -> Iterator[tuple[dict[int, float], str]]:
    """What a variant is held against: the metric by seed, and a name for it."""
    steps = STUDIES[study].steps
    for rival in ("meta-curvature", "mirror", "mirror, psi linear"):
        if rival != variant:
            yield after(rows, rival, steps), f"`{rival}`"
    beside = STUDIES[study].beside
    if beside is not None:
        for rival in ("meta-curvature", variant):
            yield after(finals(beside), rival, steps), f"`{rival}` in the table of `{beside}`"


def after(rows: list[dict], variant: str, steps: int) -> dict[int, float]:
    """The metric of a variant after so many steps, by seed, where it is finite."""
    at = [r for r in rows if (r["variant"], r["adapt_steps"]) == (variant, steps)]
    return {r["seed"]: r["mean"] for r in at if r["mean"] is not None}


def search_table(study: str) -> str:
    """The validation metric after the trained steps at every point of the grid that was run."""
    steps = STUDIES[study].steps
    rows = [
        r
        for r in read_rows(f"fewshot-{study}")
        if r["stage"] == "search" and r["adapt_steps"] == steps
    ]
    if not rows:
        return PENDING
    percent = rows[0]["metric"] == "accuracy"
    columns = sorted({(r["init_lr"], r["map_lr"]) for r in rows})
    body, edges = [], []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        mine = {rates: seeds[SEARCH_SEEDS[0]] for rates, seeds in searched(study, variant).items()}
        best = min(mine.values())
        searched_rates = {told(variant, *rates) for rates in mine}
        if at_edge := edge(searched_rates, told(variant, *best_rates(study, variant))):
            edges.append(f"{variant} ({at_edge})")
        cells = [shown(mine[at], percent) if at in mine else "" for at in columns]
        bold = [mine.get(at) == best for at in columns]
        body.append([variant, *[f"**{c}**" if b else c for c, b in zip(cells, bold, strict=True)]])
    first = rows[0]
    what = "Query accuracy in %" if percent else "Query MSE"
    title = (
        f"{what} on {first['test_tasks']} validation tasks after "
        f"{counted(steps, 'adaptation step')}, seed {first['seed']}; columns: rates of the "
        f"init / of the map (the init's alone for MAML); {first['iterations']} meta-iterations."
    )
    head = ["method", *[f"{i:g} / {m:g}" for i, m in columns]]
    note = f"Best at an edge of what was searched: {', '.join(edges)}." if edges else ""
    parts = [title, table(head, body), confirmed(study), note, circumstances(rows)]
    return "\n\n".join(part for part in parts if part)


def confirmed(study: str) -> str:
    """The best pairs of the grid over all the seeds that they were run with."""
    rows = read_rows(f"fewshot-{study}")
    variants = dict.fromkeys(r["variant"] for r in rows if r["stage"] == "confirm")
    percent = bool(rows) and rows[0]["metric"] == "accuracy"
    body = []
    for variant in variants:
        chosen = best_rates(study, variant)
        for rates, seeds in sorted(searched(study, variant).items()):
            if len(seeds) > 1:
                cells = [shown(seeds[seed], percent) for seed in sorted(seeds)]
                mean = shown(statistics.mean(seeds.values()), percent)
                named = f"{rates[0]:g}" + f" / {rates[1]:g}" * (variant != "maml")
                body.append([variant, named, *cells, f"**{mean}**" if rates == chosen else mean])
    if not body:
        return ""
    head = ["method", "rates", *[f"seed {seed}" for seed in SEARCH_SEEDS], "mean"]
    return "The best of them with other seeds:\n\n" + table(head, body)


def shown(value: float, percent: bool) -> str:
    """A cell of a search, as ``searched`` gives it."""
    if math.isinf(value) or (not percent and value > 1e3):
        return "diverged"
    return f"{-100 * value:.1f}" if percent else f"{value:.2g}"


def edge(found: set[tuple[float, ...]], chosen: tuple[float, ...]) -> str:
    """Which of the chosen rates are at the end of what was searched, where there is a choice."""
    ends = []
    for i, rate in enumerate(chosen):
        values = {rates[i] for rates in found}
        if len(values) > 1 and rate in (min(values), max(values)):
            ends.append(f"{('init', 'map')[i]} {'lowest' if rate == min(values) else 'highest'}")
    return " and ".join(ends)


@part("few-shot")
def summary() -> str:
    """Every study in a line: the metric after the trained number of steps."""
    names = ("maml", "meta-curvature", "mirror, psi linear", "mirror")
    body = []
    for study, settings in STUDIES.items():
        rows, cells = finals(study), []
        for name in names:
            mine = [r for r in rows if (r["variant"], r["adapt_steps"]) == (name, settings.steps)]
            mean, spread, seeds = over_seeds(mine) if mine else (None, 0.0, 0)
            if mean is None:
                cells.append("diverged" if mine else "")
            elif mine[0]["metric"] == "accuracy":
                cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f} %")
            else:
                cells.append(f"{mean:.3g} ± {spread:.1g}")
        if rows:
            learned = ", rates learned" if rows[0].get("learn_lr") else ""
            trained = f"{counted(rows[0]['train_steps'], 'step')}{learned}"
            body.append([settings.title, trained, str(rows[0]["iterations"]), *cells, str(seeds)])
    if not body:
        return PENDING
    title = (
        "Query MSE (sinusoid, 10-shot) or accuracy (5-way 1-shot) on new tasks after the most "
        "inner steps of training, mean ± standard deviation over seeds."
    )
    return f"{title}\n\n{table(['tasks', 'trained at', 'iterations', *names, 'seeds'], body)}"


for _study in STUDIES:
    part(_study)(lambda study=_study: study_table(study))
    part(f"search-{_study}")(lambda study=_study: search_table(study))


def draw_study(study: str) -> None:
    rows = finals(study)
    if not rows:
        return
    figure, axes = canvas()
    percent = rows[0]["metric"] == "accuracy"
    scale = 100 if percent else 1
    for variant in VARIANTS:
        mine = [r for r in rows if r["variant"] == variant]
        # Before adaptation every classifier guesses: that point would only flatten the rest.
        steps = sorted({r["adapt_steps"] for r in mine if r["adapt_steps"] or not percent})
        points = [over_seeds([r for r in mine if r["adapt_steps"] == s]) for s in steps]
        kept = [(s, m, d) for s, (m, d, _) in zip(steps, points, strict=True) if m is not None]
        if not kept:
            continue
        x, mean, spread = zip(*kept, strict=True)
        mean, spread = [scale * m for m in mean], [scale * d for d in spread]
        axes.plot(x, mean, marker="o", markersize=4, label=variant, color=COLOURS[variant])
        low = [m - d if percent else max(m - d, m / 3) for m, d in zip(mean, spread, strict=True)]
        axes.fill_between(
            x,
            low,
            [m + d for m, d in zip(mean, spread, strict=True)],
            color=COLOURS[variant],
            alpha=0.18,
            linewidth=0,
        )
    axes.set_xlabel("adaptation steps")
    axes.set_ylabel("query accuracy in %" if percent else "query MSE")
    if not percent:
        axes.set_yscale("log")
    trained = counted(rows[0]["train_steps"], "step")
    learned = ", rates learned" if rows[0].get("learn_lr") else ""
    axes.set_title(f"{STUDIES[study].title}, trained at {trained}{learned}")
    figure.legend(frameon=False, loc="outside right upper")
    save(figure, study)


@picture
def draw_studies() -> None:
    for study in ("sinusoid", "sinusoid-rates", "omniglot-1to5", "omniglot-5", "cifar-fs-1"):
        draw_study(study)
