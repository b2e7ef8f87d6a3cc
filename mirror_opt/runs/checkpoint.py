r"""Checkpoints: a versioned dict of plain tensors and values, saved atomically, loaded strictly."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mirror_opt.errors import InputError
from mirror_opt.runs.directory import write_bytes

__all__ = ["VERSION", "load", "restore", "save"]

VERSION = 2
_FORMAT = "mirror_opt.run"
_FIELDS = {
    "config": dict,
    "iteration": int,
    "learner": dict,
    "optimizer": dict,
    "recovery": dict,
    "losses": torch.Tensor,
    "seconds": float,
}


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    r"""Saves ``state`` to ``path``: the whole of it, or (on any failure) the file of before.

    Args:
        path: the file to write.
        state: ``config`` (dict), ``iteration`` (int), ``learner``, ``optimizer`` and
            ``recovery`` (state dicts), ``losses`` (float64, ``(iteration,)``), ``seconds`` (float).

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    # Serialised in memory first: torch.save onto a full disk raises a RuntimeError about file
    # positions, a plain write says what happened.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": VERSION, **state}, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: str | os.PathLike) -> dict[str, Any]:
    r"""Loads what :func:`save` wrote, onto the CPU, without running any pickled code.

    Raises:
        InputError: the file is absent, truncated, altered, of another version, or no
            checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint there; train first, or pass another --out")
    broken = f"{path}: damaged, or no checkpoint of mirror-opt; restore it or train again"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not compare the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        NotImplementedError,
    ):
        raise InputError(broken) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(broken)
    if state.get("version") != VERSION:
        raise InputError(
            f"{path}: checkpoint version {state.get('version')!r}, this mirror_opt reads "
            f"{VERSION}; use the mirror_opt that wrote it, or train again"
        )
    if any(not isinstance(state.get(name), kind) for name, kind in _FIELDS.items()):
        raise InputError(broken)
    return state


def restore(path: str | os.PathLike, target: Any, state: dict[str, Any], what: str) -> None:
    r"""``target.load_state_dict(state)``, where a state that does not fit names the file.

    Raises:
        InputError: ``state`` is of another model, map or method than ``target``.
    """
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
        raise InputError(
            f"{path}: a checkpoint of another {what} ({detail.rstrip('. ')}); "
            "pass the options it was trained with"
        ) from None
