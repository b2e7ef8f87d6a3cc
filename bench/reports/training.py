"""Real training."""

import statistics

import numpy as np
from results import read_rows
from training import SETTINGS, best_rate

from reports.frame import PENDING, canvas, circumstances, part, picture, save, table

RIVALS = {"SGD": "#000000", "projected SGD": "#000000", "AdamW": "#999999"}


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


@picture
def draw_training() -> None:
    shown = [problem for problem in SETTINGS if trained(problem)]
    if not shown:
        return
    figure, panels = canvas(2, len(shown))
    for problem, (by_steps, by_seconds) in zip(shown, panels.reshape(-1, 2), strict=True):
        setting = SETTINGS[problem]
        ours = iter(["#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"])
        found = trained(problem)
        for optimizer in setting.optimizers:
            colour = RIVALS.get(optimizer) or next(ours)
            rows = found.get(optimizer, [])
            if not rows or any(r["final"] is None for r in rows):
                continue
            steps, metric, seconds = np.mean([r["curve"] for r in rows], axis=0).T
            by_steps.plot(steps, metric, color=colour)
            by_seconds.plot(seconds, metric, color=colour, label=optimizer)
        for axes, unit in ((by_steps, "steps"), (by_seconds, "seconds")):
            axes.set_yscale("log")
            axes.set_xlabel(unit)
            axes.set_ylabel(setting.metric)
            axes.set_title(problem)
        by_seconds.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "training")
