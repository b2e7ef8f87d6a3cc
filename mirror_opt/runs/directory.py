r"""A run's directory: the names of its files, and reading and writing them."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from mirror_opt.errors import InputError
from mirror_opt.files import atomic_write, leftovers

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "HISTORY",
    "MOST",
    "PLOTS",
    "RESULTS",
    "check_free",
    "clear",
    "read_configs",
    "read_json",
    "sweep",
    "write_bytes",
    "write_json",
]

CONFIG = "config.json"
RESULTS = "results.json"
HISTORY = "history.json"
CHECKPOINT = "checkpoint.pt"
MOST = 2**63 - 1  # the largest whole number that is read back, of 64 bits as torch's are
_REMEDY = "restore it or train again"
PLOTS = ("adaptation.png", "training.png", "map.png", "episodes.png", "fits.png")
# The config goes last: a directory half cleared is still known to hold a run.
_FILES = (CHECKPOINT, RESULTS, HISTORY, *PLOTS, CONFIG)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    r"""Writes ``data`` to ``path`` atomically, making the parent directory where it is missing.

    Raises:
        OSError: as ``files.atomic_write``.
    """
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    r"""Writes ``value`` as strict JSON (no NaN), atomically; a list gets one line per element."""
    if isinstance(value, list):
        lines = ",\n".join(json.dumps(element, allow_nan=False) for element in value)
        text = f"[\n{lines}\n]\n"
    else:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: str | os.PathLike, kind: type, remedy: str = _REMEDY) -> Any:
    r"""Reads a JSON file whose top level is of the type ``kind`` (``dict`` or ``list``).

    Args:
        path: the file.
        kind: the type.
        remedy: what to do about a file that is damaged, in messages.

    Raises:
        InputError: the file is absent, cannot be read, is no JSON, or holds something else.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for a writer
            raise OSError(errno.EINVAL, "Not a regular file")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_counted)
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
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text} is out of range")
    return value


def _counted(text: str) -> int:
    if abs(value := int(text)) > MOST:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return value


def read_configs(out: str | os.PathLike) -> dict[str, dict[str, Any]]:
    r"""The configs in ``out``, by the directory in it that is the run's: a method, or ``""``.

    A run of one method has its config under ``""``, a comparison has one for each method. What is
    in a config, ``RunConfig.from_dict`` checks.

    Raises:
        InputError: the file is absent, cannot be read, or holds something else.
    """
    path = Path(out) / CONFIG
    found = read_json(path, dict)
    configs = found.get("methods", {"": found})
    if not (configs and isinstance(configs, dict) and all(map(_is_dict, configs.values()))):
        raise InputError(f"{path}: its methods are not a config for each; {_REMEDY}")
    return configs


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def check_free(out: str | os.PathLike, *, overwrite: bool = False) -> None:
    r"""Raises InputError if ``out`` holds a run, or another's file under a name that a run uses.

    Args:
        out: the directory.
        overwrite: a run may be there.
    """
    # A link that leads nowhere is there too.
    held = [name for name in _FILES if os.path.lexists(Path(out) / name)]
    if CONFIG in held:
        if not _is_run(out):
            raise InputError(f"{out}: holds a {CONFIG} of something else; pass another --out")
        if not overwrite:
            raise InputError(
                f"{out}: holds a run already; pass --resume to go on with it, --overwrite to "
                "replace it, or another --out"
            )
    elif held:
        raise InputError(
            f"{Path(out) / held[0]}: belongs to no run there, and a run would replace it; "
            "move it away, or pass another --out"
        )


def clear(out: str | os.PathLike) -> None:
    r"""Removes a run's own files from ``out`` and nothing else.

    Raises:
        InputError: files of such names are there that are not a run's; nothing is removed.
    """
    check_free(out, overwrite=True)
    for name in _FILES:
        (Path(out) / name).unlink(missing_ok=True)


def sweep(out: str | os.PathLike) -> None:
    r"""Removes what killed writers left of a run's files; no other may be writing in ``out``."""
    for name in (CHECKPOINT, RESULTS, HISTORY, CONFIG):  # pictures, another may be drawing
        for path in leftovers(Path(out) / name):
            path.unlink(missing_ok=True)


def _is_run(out: str | os.PathLike) -> bool:
    try:
        configs = read_configs(out)
    except InputError:
        return False
    return all({"task", "method"} <= config.keys() for config in configs.values())
