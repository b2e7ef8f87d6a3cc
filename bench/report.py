"""Draws the tables of the README and the pictures of docs/images from the rows in bench/results.

    python bench/report.py            # rewrites the marked parts of README.md, and the pictures
    python bench/report.py --check    # exit status 1 when the README is not what the rows say

A part of the README between ``<!-- rows: NAME -->`` and ``<!-- end -->`` is replaced by what the
function ``NAME`` makes of the rows. No number in it is written by hand.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from fewshot import STUDIES, VARIANTS, best_rates
from results import read_rows
from training import SETTINGS, best_rate
from validity import valid

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
    """The results at the rates that the search found, as far as it has been run."""
    rows = [r for r in read_rows(f"fewshot-{study}") if r["stage"] == "final"]
    best = {variant: best_rates(study, variant) for variant in {r["variant"] for r in rows}}
    return [r for r in rows if all(r[k] == v for k, v in best[r["variant"]].items())]


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
    parts = [title, table(head, body), paired(rows), circumstances(rows)]
    return "\n\n".join(part for part in parts if part)


def paired(rows: list[dict]) -> str:
    """mirror against its rivals at the trained step, seed by seed: all see the same tasks."""
    at = [r for r in rows if r["adapt_steps"] == r["train_steps"]]
    metrics = {(r["variant"], r["seed"]): r["mean"] for r in at}
    percent = rows[0]["metric"] == "accuracy"
    found = []
    for rival in ("meta-curvature", "mirror, psi linear"):
        pairs = [
            (mean, metrics[rival, seed])
            for (variant, seed), mean in metrics.items()
            if variant == "mirror" and metrics.get((rival, seed)) and mean is not None
        ]
        if len(pairs) < 2:
            continue
        values = [100 * (a - b) if percent else math.log(a / b) for a, b in pairs]
        mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        if percent:
            found.append(f"{mean:+.2f} ± {error:.2f} points against {rival}")
        else:
            low, high = math.exp(mean - error), math.exp(mean + error)
            found.append(f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f}) times that of {rival}")
    if not found:
        return ""
    what = "mean ± standard error" if percent else "geometric mean, and one standard error"
    return (
        f"`mirror` at the trained number of steps, paired over seeds ({what}): {'; '.join(found)}."
    )


def search_table(study: str) -> str:
    """The validation metric after the trained steps at every point of the grid that was run."""
    rows = [
        r
        for r in read_rows(f"fewshot-{study}")
        if r["stage"] == "search" and r["adapt_steps"] == r["train_steps"]
    ]
    if not rows:
        return PENDING
    percent = rows[0]["metric"] == "accuracy"
    grid = sorted({(r["init_lr"], r["map_lr"]) for r in rows})
    body = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        mine = {(r["init_lr"], r["map_lr"]): r["mean"] for r in rows if r["variant"] == variant}
        finite = [m for m in mine.values() if m is not None]
        best = max(finite) if percent else min(finite)

        def cell(at: tuple, mine: dict = mine, best: float = best) -> str:
            if at not in mine:
                return ""
            if mine[at] is None or (not percent and mine[at] > 1e3):
                return "diverged"
            text = f"{100 * mine[at]:.1f}" if percent else f"{mine[at]:.2g}"
            return f"**{text}**" if mine[at] == best else text

        body.append([variant, *[cell(at) for at in grid]])
    first = rows[0]
    what = "Query accuracy in %" if percent else "Query MSE"
    title = (
        f"{what} on {first['test_tasks']} validation tasks after {first['train_steps']} adaptation "
        f"step{'s' * (first['train_steps'] != 1)}, seed {first['seed']}; columns: rates of the "
        "init / of the map (the init's alone for MAML)."
    )
    head = ["method", *[f"{i:g} / {m:g}" for i, m in grid]]
    return f"{title}\n\n{table(head, body)}\n\n{circumstances(rows)}"


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


# Validity.


@part("validity-summary")
def validity_summary() -> str:
    rows = read_rows("validity")
    if not rows:
        return PENDING
    trained = [r for r in rows if r["trained"]]
    return (
        f"{sum(map(valid, rows))} of {len(rows)} checks passed ({len(trained)} of them after "
        f"training): largest relative error of a round trip "
        f"{max(r['round_trip_float32'] for r in rows):.0e}, largest asymmetry "
        f"{max(r['asymmetry'] for r in rows):.0e}, smallest eigenvalue "
        f"{min(r['eigenvalue_min'] for r in rows):.1g}."
    )


@part("validity")
def validity_table() -> str:
    rows = read_rows("validity")
    if not rows:
        return PENDING

    def number(x: float | None) -> str:
        return "inf" if x is None else f"{x:.3g}"

    body = []
    for r in rows:
        options = ", ".join(f"{k}={v}" for k, v in r["options"].items())
        body.append(
            [
                f"{r['map']} ({options})" if options else r["map"],
                str(r["iterations"]) if r["trained"] else "-",
                f"{r['round_trip_float32']:.0e}",
                f"{r['asymmetry']:.0e}",
                f"{number(r['eigenvalue_min'])} to {number(r['eigenvalue_max'])}",
                f"{number(r['distance_min'])} to {number(r['distance_max'])}",
                f"{number(r['mu'])} to {number(r['ell'])}",
                "yes" if valid(r) else "NO",
            ]
        )
    head = [
        "map",
        "meta-iterations",
        "round trip",
        "asymmetry",
        "eigenvalues of the Jacobian",
        "2 D_h(x, y) / norm(x - y)^2",
        "certified mu to ell",
        "valid",
    ]
    return f"{table(head, body)}\n\n{circumstances(rows)}"


# Real training.


def trained(problem: str) -> dict[str, list[dict]]:
    """The final runs of every optimizer at the rate that the search found."""
    rows = read_rows("training")
    found: dict[str, list[dict]] = {}
    for r in rows:
        if (r["stage"], r["problem"]) != ("final", problem):
            continue
        if r["lr"] == best_rate(problem, r["optimizer"], rows):
            found.setdefault(r["optimizer"], []).append(r)
    return found


@part("training")
def training_tables() -> str:
    parts = []
    for problem, setting in SETTINGS.items():
        found = trained(problem)
        if not found:
            continue
        body = []
        for optimizer in (o for o in setting.optimizers if o in found):
            rows = found[optimizer]
            finals = [r["final"] for r in rows]
            if any(f is None for f in finals):
                metric = f"diverged on {sum(f is None for f in finals)} of {len(rows)} seeds"
            else:
                spread = statistics.stdev(finals) if len(finals) > 1 else 0.0
                metric = f"{statistics.mean(finals):.3g} ± {spread:.1g}"
            seconds = statistics.median(r["seconds"] for r in rows)
            body.append([optimizer, f"{rows[0]['lr']:g}", metric, f"{seconds:.1f}"])
        rows = [r for mine in found.values() for r in mine]
        doc = (setting.make.__doc__ or "").splitlines()[0]
        seeds = len({r["seed"] for r in rows})
        head = ["optimizer", "lr", setting.metric, "seconds"]
        parts.append(
            f"**{problem}**: {doc} {rows[0]['steps']} steps, mean ± standard deviation over "
            f"{seeds} seeds.\n\n{table(head, body)}\n\n{circumstances(rows)}"
        )
    return "\n\n".join(parts) if parts else PENDING


def draw_training() -> None:
    shown = [problem for problem in SETTINGS if trained(problem)]
    if not shown:
        return
    figure, panels = canvas(len(shown))
    palette = ["#000000", "#999999", "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"]
    for problem, axes in zip(shown, panels if len(shown) > 1 else [panels], strict=True):
        setting = SETTINGS[problem]
        for colour, optimizer in zip(palette, setting.optimizers, strict=False):
            rows = trained(problem).get(optimizer, [])
            if not rows or any(r["final"] is None for r in rows):
                continue
            steps = [s for s, _ in rows[0]["curve"]]
            mean = [statistics.mean(r["curve"][i][1] for r in rows) for i in range(len(steps))]
            axes.plot(steps, mean, color=colour, label=optimizer)
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel(setting.metric)
        axes.set_title(problem)
        axes.legend(frameon=False, fontsize=8)
    save(figure, "training")


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


@part("compiled-step")
def compiled_step() -> str:
    rows = read_rows("compiled_step")
    if not rows:
        return PENDING
    rows = [r for r in rows if r["revision"] == rows[-1]["revision"]]
    by = {(r["name"], r["what"], r["compiled"]): r for r in rows}

    def cells(name: str, what: str) -> list[str]:
        return [f"{1e3 * by[name, what, compiled]['seconds']:.1f}" for compiled in (False, True)]

    body = [
        [name, *cells(name, "train"), *cells(name, "step")]
        for name in dict.fromkeys(r["name"] for r in rows)
    ]
    head = ["optimizer", "train step, eager", "compiled", "step alone, eager", "compiled"]
    count = rows[0]["parameters"]
    return (
        f"Milliseconds, medians; {count:,} parameters, one thread.\n\n"
        f"{table(head, body)}\n\n{circumstances(rows)}"
    )


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
    draw_training()
    draw_step_cpu()
    return 0


if __name__ == "__main__":
    sys.exit(main())
