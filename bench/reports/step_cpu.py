"""The step on a CPU: what was asked for and reached, the medians, and a picture."""

from results import read_rows

from reports.frame import COLOURS, PENDING, canvas, circumstances, part, picture, save, table

NAMES = {
    "cpp": "operator, C++",
    "MirrorDescent": "`MirrorDescent`, C++",
    "torch": "operator, plain PyTorch",
    "formula": "formula, plain PyTorch",
    "torch.compile": "formula, torch.compile",
    **{x: x for x in ("SGD, foreach", "SGD, fused", "AdamW, foreach", "AdamW, fused")},
}
BIG, CONV4 = "n=4e6", "conv4-32"
LISTS = {
    CONV4: ("Conv4, 18 tensors", "1"),
    "resnet12": ("ResNet-12, 50 tensors", ""),
    "gpt2-small": ("GPT-2 small, 148 tensors", ""),
}
SETTING = ("processor", "library", "threads")
Rows = dict[tuple[str, int, str], dict]


def settings() -> list[Rows]:
    """For each machine and number of threads, the latest first, the last row of each
    (case, K, contender)."""
    found: dict[tuple, Rows] = {}
    for r in read_rows("step_cpu"):
        mine = found.setdefault(tuple(r[k] for k in SETTING), {})
        mine[r["case"], r["units"], r["contender"]] = r
    return sorted(found.values(), key=lambda rows: max(r["date"] for r in rows.values()))[::-1]


def name_of(rows: Rows) -> str:
    r = next(iter(rows.values()))
    threads = f"{r['threads']} thread{'s' * (r['threads'] > 1)}"
    return f"{r['library'].split(', ')[-1]}, {threads}, {r['date'][:10]}"


def ratio(rows: Rows, case: str, units: int, slow: str, fast: str) -> str:
    # Of medians of one run, round by round in turn.
    a, b = (rows.get((case, units, x)) for x in (slow, fast))
    return f"{a['seconds'] / b['seconds']:.2g}" if a and b else ""


@part("step-cpu")
def claims() -> str:
    every = settings()
    if not every:
        return PENDING
    asked = [
        ("4 million elements, K = 8: times faster than the compiled formula", "3",
         (BIG, 8, "torch.compile", "cpp")),
        ("4 million elements, K = 8: times faster than the formula in plain PyTorch", "60",
         (BIG, 8, "formula", "cpp")),
        *((f"{model}, K = 8: the optimizer, times faster than the compiled formula", goal,
           (case, 8, "torch.compile", "MirrorDescent")) for case, (model, goal) in LISTS.items()),
        *((f"{LISTS[CONV4][0]}, K = {k}: the optimizer, times the time of `SGD(foreach=True)`",
           "at most 3", (CONV4, k, "MirrorDescent", "SGD, foreach")) for k in (4, 8)),
    ]  # fmt: skip
    body = [[what, goal, *(ratio(rows, *of) for rows in every)] for what, goal, of in asked]
    all_rows = [r for rows in every for r in rows.values()]
    worst = max(r["residual"] for r in all_rows if "residual" in r)
    return "\n\n".join(
        [
            "![Step on a CPU](docs/images/step-cpu.png)",
            table(["", "asked for", *map(name_of, every)], body),
            f"No residual is above {worst:.1e} of the value. All medians: "
            "[docs/step-cpu.md](docs/step-cpu.md).",
            circumstances(all_rows),
        ]
    )


@part("step-cpu-medians")
def medians() -> str:
    parts = []
    for rows in settings():
        cases = sorted({(r["elements"], case, k) for (case, k, _), r in rows.items()})
        cases = [(case, k) for _, case, k in cases]
        parts += [
            f"## {name_of(rows)}",
            "One tensor of n elements with coefficients for the tensor:",
            step_table(rows, [x for x in cases if x[0][:2] == "n="]),
            "The parameters of networks with coefficients for each channel:",
            step_table(rows, [x for x in cases if x[0][:2] != "n="]),
            f"{next(iter(rows.values()))['processor']}. {circumstances(list(rows.values()))}",
        ]
    return "\n\n".join(parts) or PENDING


def step_table(rows: Rows, columns: list[tuple[str, int]]) -> str:
    body = []
    for contender, name in NAMES.items():
        cells = [rows.get((case, units, contender)) for case, units in columns]
        body.append([name, *(f"{1e3 * r['seconds']:.3g}" if r else "" for r in cells)])
    return table(["", *(f"{case}, K={units}" for case, units in columns)], body)


@picture
def draw() -> None:
    every = settings()
    rows = [r for r in every[0].values() if r["tensors"] == 1 and r["units"] == 8] if every else []
    if not rows:
        return
    figure, axes = canvas()
    shown = ("formula", "torch.compile", "MirrorDescent", "cpp", "AdamW, fused", "SGD, foreach")
    for contender, colour in zip(shown, COLOURS.values(), strict=False):
        mine = sorted((r["elements"], r["seconds"]) for r in rows if r["contender"] == contender)
        style = ":" if contender.startswith(("SGD", "AdamW")) else "-"
        x, y = zip(*((n, 1e9 * seconds / n) for n, seconds in mine), strict=True)
        label = NAMES[contender].replace("`", "")
        axes.plot(x, y, style, marker="o", markersize=4, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="nanoseconds an element")
    axes.set_title(f"a step, K = 8; {name_of(every[0])}")
    axes.set_ylim(top=3e4)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    save(figure, "step-cpu")
