"""What the loops and compiled steps cost."""

from results import read_rows

from reports.frame import PENDING, circumstances, part, table


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
