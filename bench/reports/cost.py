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
    head = ["meta-gradient of MAML", "seconds, median", "ratio to by hand, median of rounds"]
    return f"{table(head, body)}\n\n{circumstances(rows)}"


def milliseconds(row: dict) -> str:
    """The median, and in brackets the ratio to what the row is compared with."""
    return f"{1e3 * row['seconds']:.1f} ({row['ratio']:.{1 if row['ratio'] < 10 else 0}f})"


@part("compiled-step")
def compiled_step() -> str:
    rows = read_rows("compiled_step")
    if not rows:
        return PENDING
    rows = [r for r in rows if r["revision"] == rows[-1]["revision"]]
    by = {(r["name"], r["what"], r["compiled"]): r for r in rows}

    def cells(name: str, what: str) -> list[str]:
        return [milliseconds(by[name, what, compiled]) for compiled in (False, True)]

    body = [
        [name, *cells(name, "train"), *cells(name, "step")]
        for name in dict.fromkeys(r["name"] for r in rows)
    ]
    head = ["optimizer", "train step, eager", "compiled", "step alone, eager", "compiled"]
    count = rows[0]["parameters"]
    return (
        f"Milliseconds, medians, in brackets the median over rounds of the ratio within a round; "
        f"{count:,} parameters, one thread.\n\n"
        f"{table(head, body)}\n\n{circumstances(rows)}"
    )


@part("compiled-inner-step")
def compiled_inner_step() -> str:
    rows = read_rows("compiled_inner_step")
    if not rows:
        return PENDING
    rows = [r for r in rows if r["revision"] == rows[-1]["revision"]]
    by = {(r["name"], r["way"]): r for r in rows}
    heads = {"meta_loss": "`meta_loss`", "eager": "the example's, eager", "compiled": "compiled"}
    body = []
    for name in dict.fromkeys(r["name"] for r in rows):
        compiling = by[name, "compiled"]["first"]
        body.append([name, *(milliseconds(by[name, way]) for way in heads), f"{compiling:.0f}"])
    head = ["map", *heads.values(), "seconds to compile"]
    return (
        "Milliseconds, medians, in brackets the median over rounds of the ratio to `meta_loss` "
        f"within a round; {rows[0]['tasks']} tasks of "
        f"{rows[0]['steps']} inner steps, one thread.\n\n{table(head, body)}\n\n"
        f"{circumstances(rows)}"
    )
