r"""A run's directory: the names of its files, and reading and writing them."""

import json
import math
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

    A run's config and history are held to what their readers rely on.

    Raises:
        InputError: the file is absent, cannot be read, is no JSON, or holds something else.
    """
    path = Path(path)
    remedy = "restore it or train again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass the --out of a run that exists") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, kind):
        raise InputError(
            f"{path}: holds a JSON {type(value).__name__} where a {kind.__name__} belongs; {remedy}"
        )
    if path.name == CONFIG and not _has_configs(value):
        raise InputError(f"{path}: its methods are not a config for each; {remedy}")
    if path.name == HISTORY and not _has_losses(value):
        raise InputError(f"{path}: its loss is not a list of numbers and nulls; {remedy}")
    return value


def _has_configs(config: Any) -> bool:
    r"""Whether a comparison has the configs of its methods; what is in them, RunConfig checks."""
    methods = config.get("methods", {"": {}})
    return (
        isinstance(methods, dict)
        and len(methods) > 0
        and all(isinstance(one, dict) for one in methods.values())
    )


def _has_losses(history: Any) -> bool:
    losses = history.get("loss")
    return isinstance(losses, list) and len(losses) > 0 and all(map(_is_loss, losses))


def _is_loss(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value))


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
