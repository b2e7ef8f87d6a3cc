"""Is every map a valid distance?"""

from results import read_rows
from validity import missing, valid

from reports.frame import PENDING, circumstances, part, table


@part("validity-summary")
def validity_summary() -> str:
    rows = read_rows("validity")
    if not rows:
        return PENDING
    trained = [r for r in rows if r["trained"]]
    pending = len(missing())
    return (
        f"{sum(map(valid, rows))} of {len(rows)} checks passed ({len(trained)} of them after "
        f"training): largest relative error of a round trip "
        f"{max(r['round_trip_float32'] for r in rows):.0e}, largest asymmetry "
        f"{max(r['asymmetry'] for r in rows):.0e}, smallest eigenvalue "
        f"{min(r['eigenvalue_min'] for r in rows):.1g}."
        + f" *{pending} checks have no rows yet.*" * bool(pending)
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
