"""What the parts of the report share: marks, tables, pictures."""

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / "docs" / "images"
PARTS: dict[str, Callable[[], str]] = {}  # by the name in the mark
PICTURES: list[Callable[[], None]] = []
COLOURS = {
    "maml": "#56b4e9",
    "meta-sgd": "#009e73",
    "meta-curvature": "#e69f00",
    "mirror": "#d55e00",
    "mirror, psi linear": "#cc79a7",
    "mirror, 4 terms": "#0072b2",
    "mirror, normalised": "#333333",
    "mirror, normalised, psi linear": "#999999",
    "mirror, normalised, 4 terms": "#666666",
}
PENDING = "*No rows yet: run the command above.*"


def part(name: str):
    def add(function: Callable[[], str]) -> Callable[[], str]:
        PARTS[name] = function
        return function

    return add


def picture(function: Callable[[], None]) -> Callable[[], None]:
    PICTURES.append(function)
    return function


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


def canvas(columns: int = 1, rows: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * columns, 3.8 * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in axes.flat if columns * rows > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#e5e5e5", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def save(figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png")
