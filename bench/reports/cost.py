"""What the loops and the steps cost."""

from results import read_rows

from reports.frame import COLOURS, PENDING, canvas, circumstances, part, picture, save, table


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


@picture
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
    axes.set_ylim(top=3e4)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    save(figure, "step-cpu")
