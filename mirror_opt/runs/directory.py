r"""A run's directory: the names of its files, and reading and writing them."""

import json
import os
from pathlib import Path
from typing import Any

from mirror_opt.errors import InputError
from mirror_opt.files import atomic_write

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "HISTORY",
    "PLOTS",
    "RESULTS",
    "check_free",
    "clear",
    "read_json",
    "write_bytes",
    "write_json",
]

CONFIG = "config.json"
RESULTS = "results.json"
HISTORY = "history.json"
CHECKPOINT = "checkpoint.pt"
PLOTS = ("adaptation.png", "training.png", "map.png", "episodes.png", "fits.png")


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    r"""Writes ``data`` to ``path`` atomically, making the parent directory where it is missing.

    Raises:
        OSError: as ``files.atomic_write``.
    """
    with atomic_write(path, shared=False) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    r"""Writes ``value`` as strict JSON (no NaN), atomically; a list gets one line per element."""
    if isinstance(value, list):
        lines = ",\n".join(json.dumps(element, allow_nan=False) for element in value)
        text = f"[\n{lines}\n]\n"
    else:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: str | os.PathLike, kind: type) -> Any:
    r"""Reads a JSON file whose top level is of the type ``kind`` (``dict`` or ``list``).

    Raises:
        InputError: the file is absent, is no JSON, or holds something else.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass the --out of a run that exists") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore it or train again") from None
    if not isinstance(value, kind):
        raise InputError(
            f"{path}: holds a JSON {type(value).__name__} where a {kind.__name__} belongs; "
            "restore it or train again"
        )
    return value


def check_free(out: str | os.PathLike) -> None:
    r"""Raises InputError if ``out`` holds a run's config, checkpoint or results."""
    if any((Path(out) / name).exists() for name in (CONFIG, CHECKPOINT, RESULTS)):
        raise InputError(
            f"{out}: holds a run already; pass --resume to go on with it, --overwrite to "
            "replace it, or another --out"
        )


def clear(out: str | os.PathLike) -> None:
    r"""Removes a run's own files from ``out`` and nothing else."""
    # The config goes last: a directory half cleared is still known to hold a run.
    for name in (CHECKPOINT, RESULTS, HISTORY, *PLOTS, CONFIG):
        (Path(out) / name).unlink(missing_ok=True)
