"""The compiled libraries of csrc/: where they are, and why one is missing."""

import json
from functools import cache
from pathlib import Path

import torch

__all__ = ["FROM_SOURCES", "MAX_UNITS", "load"]

MAX_UNITS = 64  # kMaxUnits

FROM_SOURCES = (
    "mirror_opt is imported from its sources, where nothing is built: start Python in another "
    "folder, or install with pip install -e"
)

_FOLDER = Path(__file__).parents[1] / "lib"


@cache
def load(name: str) -> str | None:
    """Loads ``libmirror_opt_<name>.so``; returns why that was not possible, None if it was."""
    path = _FOLDER / f"libmirror_opt_{name}.so"
    if not path.exists():
        if not _FOLDER.exists() and (_FOLDER.parents[1] / "csrc").exists():
            return FROM_SOURCES
        return _build_report().get(name, "it was not built: install with a C++ compiler at hand")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


def _build_report() -> dict[str, str]:
    """What the build wrote about the libraries that it did not make."""
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}
