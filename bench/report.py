"""Draws the tables of the README and the pictures of docs/images from the rows in bench/results.

    python bench/report.py            # rewrites the marked parts of README.md, and the pictures
    python bench/report.py --check    # exit status 1 when the README is not what the rows say

A part of the README between ``<!-- rows: NAME -->`` and ``<!-- end -->`` is replaced by what the
function ``NAME`` makes of the rows. No number in it is written by hand.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from fewshot import STUDIES, VARIANTS
from results import read_rows

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PARTS: dict[str, Callable[[], str]] = {}
MARK = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {
    "maml": "#56b4e9",
    "meta-sgd": "#009e73",
    "meta-curvature": "#e69f00",
    "mirror": "#d55e00",
    "mirror, psi linear": "#cc79a7",
    "mirror, 4 terms": "#0072b2",
}
PENDING = "*No rows yet: run the command above.*"


def part(name: str):
    def add(function: Callable[[], str]) -> Callable[[], str]:
        PARTS[name] = function
        return function

    return add


def table(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def circumstances(rows: list[dict]) -> str:
    """With what and when the rows were measured."""

    def seen(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Device {seen('device')}, torch {seen('torch')}, Python {seen('python')}, {span}."


# Few-shot studies.


def finals(study: str) -> list[dict]:
    return [r for r in read_rows(f"fewshot-{study}") if r["stage"] == "final"]


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
            mean, spread, _ = over_seeds([r for r in mine if r["adapt_steps"] == step])
            if mean is None:
                cells.append("diverged")
            elif percent:
                cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f}")
            else:
                cells.append(f"{mean:.3g} ± {spread:.1g}")
        seeds = len({r["seed"] for r in mine})
        rates = f"{mine[0]['init_lr']:g}" + (f", {mine[0]['map_lr']:g}" * (variant != "maml"))
        body.append([variant, rates, *cells, str(seeds)])
    first = rows[0]
    what = "Query accuracy in %" if percent else "Query MSE"
    ways = f"{first['ways']}-way " if first["ways"] else ""
    title = (
        f"{first['task']}, {ways}{first['shots']}-shot, inner steps in training: "
        f"{first['train_steps']}, meta-iterations: {first['iterations']}. {what} on "
        f"{first['test_tasks']} new tasks after each number of adaptation steps, mean ± standard "
        "deviation over seeds."
    )
    head = ["method", "rates (init, map)", *[str(s) for s in steps], "seeds"]
    return f"{title}\n\n{table(head, body)}\n\n{circumstances(rows)}"


for _study in STUDIES:
    part(_study)(lambda study=_study: study_table(study))


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
    trained = rows[0]["train_steps"]
    axes.set_title(f"{rows[0]['task']}, trained at {trained} step{'s' * (trained != 1)}")
    axes.legend(frameon=False)
    save(figure, study)


# Stability.


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
            if mean is None:
                bad = sum(r["mean"] is None for r in found)
                return f"diverged on {bad} of {seeds} seeds"
            return f"{mean:.3g}"

        last = max(r["adapt_steps"] for r in mine)
        uphill = max(r["uphill"] for r in mine if r["guard"] == "past the trained steps")
        rise = max(r["largest_rise"] for r in mine if r["largest_rise"] is not None)
        body.append(
            [
                variant,
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
        f"{rows[0]['test_tasks']} tasks each."
    )
    picture = "![Stability](docs/images/stability.png)"
    return f"{picture}\n\n{title}\n\n{table(head, body)}\n\n{circumstances(rows)}"


def draw_stability() -> None:
    rows = read_rows("stability")
    if not rows:
        return
    figure, (left, right) = canvas(2)
    shown = [v for v in VARIANTS if any(r["variant"] == v for r in rows)]
    ceiling = 10.0
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
    left.set_ylim(top=ceiling)
    left.set_xlabel("adaptation steps (trained at 1)")
    left.set_ylabel("query MSE, worst seed")
    left.set_title("dotted: no guard, solid: guarded")
    left.legend(frameon=False)
    right.set_xscale("log")
    right.set_xlabel("adaptation steps (trained at 1)")
    right.set_ylabel("tasks whose direction goes uphill, %")
    right.set_title("a valid map never goes uphill")
    save(figure, "stability")


GUARDED = "past the trained steps"


# Cost.


@part("meta-overhead")
def meta_overhead() -> str:
    rows = read_rows("meta_overhead")
    if not rows:
        return PENDING
    last = rows[-1]["date"]
    rows = [r for r in rows if r["date"][:16] == last[:16]]
    body = [[r["name"], f"{r['seconds']:.3f}", f"{r['ratio']:.2f}"] for r in rows]
    head = ["meta-gradient of MAML", "seconds, median", "ratio to by hand"]
    return f"{table(head, body)}\n\n{circumstances(rows)}"


# The step on a CPU.

STEP_NAMES = {
    "cpp": "operator, C++",
    "MirrorDescent": "`MirrorDescent`, C++",
    "torch": "operator, plain PyTorch",
    "formula": "formula, plain PyTorch",
    "torch.compile": "formula, torch.compile",
    **{x: x for x in ("SGD, foreach", "SGD, fused", "AdamW, foreach", "AdamW, fused")},
}


def step_rows() -> dict[tuple[str, int, str], dict]:
    """The last row of each (case, K, contender)."""
    return {(r["case"], r["units"], r["contender"]): r for r in read_rows("step_cpu")}


@part("step-cpu")
def step_cpu() -> str:
    rows = step_rows()
    if not rows:
        return PENDING

    def ratio(case: str, units: int, slow: str, fast: str) -> str:
        # Of medians of one run, round by round in turn.
        a, b = (rows.get((case, units, x)) for x in (slow, fast))
        return f"{a['seconds'] / b['seconds']:.2g}" if a and b else ""

    big, conv4 = "n=4e6", "conv4-32"
    lines = [["4 million elements, K = 8", ratio(big, 8, "torch.compile", "cpp"), "3",
              "times faster than the compiled formula"],
             ["4 million elements, K = 8", ratio(big, 8, "formula", "cpp"), "60",
              "times faster than the formula in plain PyTorch"],
             ["Conv4, 18 tensors, K = 8", ratio(conv4, 8, "torch.compile", "MirrorDescent"), "1",
              "times faster than the compiled formula, the whole optimizer"]]  # fmt: skip
    for k in (4, 8):
        longer = ratio(conv4, k, "MirrorDescent", "SGD, foreach")
        what = "times the time of `SGD(foreach=True)`, the whole optimizer"
        lines.append([f"Conv4, 18 tensors, K = {k}", longer, "at most 3", what])
    cases = sorted({(r["elements"], case, k) for (case, k, _), r in rows.items()})
    cases = [(case, k) for _, case, k in cases]
    single = [x for x in cases if x[0][:2] == "n=" and (x[1] == 8 or x[0] == big)]
    worst = max(r["residual"] for r in rows.values() if "residual" in r)
    every = list(rows.values())

    def seen(key: str) -> str:
        return ", ".join(sorted({str(r[key]) for r in every}))

    return "\n\n".join(
        [
            "![Step on a CPU](docs/images/step-cpu.png)",
            table(["", "reached", "asked for", ""], lines),
            f"No residual is above {worst:.1e} of the value. Medians in ms, empty: not measured; "
            "of one tensor of n elements with coefficients for the tensor:",
            step_table(rows, single),
            "of the parameters of networks with coefficients for each channel:",
            step_table(rows, [x for x in cases if x[0][:2] != "n="]),
            f"Threads: {seen('threads')}, on cores shared with other work. {seen('processor')}, "
            f"{seen('library')}. {circumstances(every)}",
        ]
    )


def step_table(rows: dict, columns: list[tuple[str, int]]) -> str:
    body = []
    for contender, name in STEP_NAMES.items():
        cells = [rows.get((case, units, contender)) for case, units in columns]
        body.append([name, *(f"{1e3 * r['seconds']:.3g}" if r else "" for r in cells)])
    return table(["", *(f"{case}, K={units}" for case, units in columns)], body)


def draw_step_cpu() -> None:
    rows = [r for r in step_rows().values() if r["tensors"] == 1 and r["units"] == 8]
    if not rows:
        return
    figure, axes = canvas()
    shown = ("formula", "torch.compile", "MirrorDescent", "cpp", "AdamW, fused", "SGD, foreach")
    for contender, colour in zip(shown, COLOURS.values(), strict=True):
        mine = sorted((r["elements"], r["seconds"]) for r in rows if r["contender"] == contender)
        style = ":" if contender.startswith(("SGD", "AdamW")) else "-"
        x, y = zip(*((n, 1e9 * seconds / n) for n, seconds in mine), strict=True)
        label = STEP_NAMES[contender].replace("`", "")
        axes.plot(x, y, style, marker="o", markersize=4, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="nanoseconds an element")
    axes.set_title("a step, K = 8, one thread")
    axes.legend(frameon=False, fontsize="small")
    save(figure, "step-cpu")


# Pictures and pages.


def canvas(columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * columns, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, columns)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#e5e5e5", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def save(figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png")


def rewritten(text: str) -> str:
    def fill(match: re.Match) -> str:
        return match[1] + PARTS[match[2]]() + "\n" + match[3]

    return MARK.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text()
        new = rewritten(old)
        if new != old:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    if check:
        print(f"stale: {', '.join(stale)}" if stale else "all pages say what the rows say")
        return int(bool(stale))
    for study in STUDIES:
        draw_study(study)
    draw_stability()
    draw_step_cpu()
    return 0


if __name__ == "__main__":
    sys.exit(main())
