"""Taking more steps than were trained."""

import statistics

from fewshot import VARIANTS
from results import read_rows

from reports.fewshot import over_seeds
from reports.frame import COLOURS, PENDING, canvas, circumstances, part, picture, save, table

GUARDED = "past the trained steps"
DIVERGED = 1e3  # a query MSE; before adaptation it is about 4


@part("stability")
def stability() -> str:
    rows = read_rows("stability")
    if not rows:
        return PENDING
    body = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        mine = [r for r in rows if r["variant"] == variant]

        def cell(guard: str, step: int, mine: list[dict] = mine) -> str:
            found = [r for r in mine if r["guard"] == guard and r["adapt_steps"] == step]
            mean, _, seeds = over_seeds(found)
            bad = sum(r["mean"] is None or r["mean"] > DIVERGED for r in found)
            return f"diverged on {bad} of {seeds} seeds" if bad else f"{mean:.3g}"

        last = max(r["adapt_steps"] for r in mine)
        uphill = max(r["uphill"] for r in mine if r["guard"] == "past the trained steps")
        rise = max(r["largest_rise"] for r in mine if r["largest_rise"] is not None)
        body.append(
            [
                variant,
                f"{mine[0]['init_lr']:g}, {mine[0]['map_lr']:g}",
                cell("none", 10),
                cell("none", last),
                cell("past the trained steps", 10),
                cell("past the trained steps", last),
                f"{100 * uphill:.0f} %",
                f"{rise:.0e}" if rise else "0",
            ]
        )
    head = [
        "method",
        "rates (init, map)",
        "10 steps",
        "100 steps",
        "10 steps, guarded",
        "100 steps, guarded",
        "tasks going uphill, at worst",
        "largest relative rise, guarded",
    ]
    seeds = len({r["seed"] for r in rows})
    title = (
        f"Sinusoid, trained at one inner step: query MSE, mean over {seeds} seeds and "
        f"{rows[0]['test_tasks']} tasks each. A seed counts as diverged where its mean is above "
        f"{DIVERGED:g} or not finite, for which one task is enough. The meta learning rates are "
        "those found for training at five inner steps, and MAML's for first-order MAML and ANIL, "
        "which the picture leaves out."
    )
    picture = "![Stability](docs/images/stability.png)"
    return f"{picture}\n\n{title}\n\n{table(head, body)}\n\n{circumstances(rows)}"


@picture
def draw_stability() -> None:
    rows = read_rows("stability")
    if not rows:
        return
    figure, (left, right) = canvas(2)
    shown = [v for v in VARIANTS if any(r["variant"] == v for r in rows)]
    ceiling = 10.0
    floor = ceiling
    for variant in shown:
        for guard, style in (("none", ":"), ("past the trained steps", "-")):
            mine = [r for r in rows if (r["variant"], r["guard"]) == (variant, guard)]
            steps = sorted({r["adapt_steps"] for r in mine})
            # The worst seed: a method is as safe as its worst.
            worst = [
                max(
                    ceiling * 10 if r["mean"] is None else r["mean"]
                    for r in mine
                    if r["adapt_steps"] == s
                )
                for s in steps
            ]
            floor = min(floor, *worst)
            left.plot(
                steps, worst, style, color=COLOURS[variant], label=variant if style == "-" else None
            )
        mine = [r for r in rows if (r["variant"], r["guard"]) == (variant, GUARDED)]
        steps = sorted({r["adapt_steps"] for r in mine})
        share = [
            100 * statistics.mean(r["uphill"] for r in mine if r["adapt_steps"] == s) for s in steps
        ]
        right.plot(steps, share, marker="o", markersize=4, color=COLOURS[variant], label=variant)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(floor / 2, ceiling)
    left.set_xlabel("adaptation steps (trained at 1)")
    left.set_ylabel("query MSE, worst seed")
    left.set_title("dotted: no guard, solid: guarded")
    left.legend(frameon=False)
    right.set_xscale("log")
    right.set_xlabel("adaptation steps (trained at 1)")
    right.set_ylabel("tasks whose direction goes uphill, %")
    right.set_title("a valid map never goes uphill")
    save(figure, "stability")
