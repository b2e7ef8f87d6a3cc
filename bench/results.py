"""Rows of the benchmarks: JSON lists in bench/results/, one file a question."""

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def read_rows(name: str) -> list[dict[str, Any]]:
    """All rows of a file; empty when it is absent."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def add_rows(
    name: str, rows: list[dict[str, Any]], instead_of: dict[str, Any] | None = None
) -> None:
    """Appends rows, one a line, and drops those that have all the values of ``instead_of``.

    Safe with several processes at once.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = [*(r for r in read_rows(name) if not matches(r, instead_of)), *rows]
        text = "[\n" + ",\n".join(json.dumps(row) for row in merged) + "\n]\n"
        temporary = RESULTS / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(RESULTS / f"{name}.json")


def matches(row: dict[str, Any], values: dict[str, Any] | None) -> bool:
    """Whether a row has all of some values; no values at all match none."""
    return values is not None and all(row.get(k) == v for k, v in values.items())


def revision() -> str:
    """The git revision that ran, with a mark when the tree had changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    here = Path(__file__).parent
    run = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    return run.stdout.strip()
