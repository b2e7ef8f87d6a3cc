r"""Checkpoints: a versioned dict of plain tensors and values, saved atomically, loaded strictly.

The file is a torch file, which ``torch.load(path, weights_only=True)`` opens too. It ends with a
seal: the SHA-256 of all bytes before, so that no change to any of them goes unnoticed.
"""

import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any

import torch

from mirror_opt.errors import InputError
from mirror_opt.runs.directory import write_bytes
from mirror_opt.runs.recovery import is_state

__all__ = ["VERSION", "load", "restore", "save"]

VERSION = 1
_FORMAT = "mirror_opt.run"
_SEAL = b"mirror_opt.run sha256 "
_DIGITS = 64  # of the digest in hexadecimal, which follows
_FIELDS = {
    "config": dict,
    "data": str | None,
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
        state: ``config`` (dict), ``data`` (the fingerprint of the task family, or None),
            ``iteration`` (int), ``learner``, ``optimizer`` and ``recovery`` (state dicts),
            ``losses`` (float64, ``(iteration,)``), ``seconds`` (float).

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    # Serialised in memory first: torch.save onto a full disk raises a RuntimeError about file
    # positions, a plain write says what happened.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": VERSION, **state}, buffer)
    write_bytes(path, _sealed(buffer.getvalue()))


def load(path: str | os.PathLike) -> dict[str, Any]:
    r"""Loads what :func:`save` wrote, onto the CPU, without running any pickled code.

    Raises:
        InputError: the file is absent, truncated, altered, of another version, or no
            checkpoint of this package.
        OSError: the file cannot be read; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint there; train first, or pass another --out")
    broken = f"{path}: damaged, or no checkpoint of mirror-opt; restore it or train again"
    try:
        data = path.read_bytes()
    except OSError as error:
        error.filename = str(path)  # read() does not say which file it was
        raise
    body, digest = data[:-_DIGITS], data[-_DIGITS:]
    if not body.endswith(_SEAL) or digest != _digest(body):
        raise InputError(broken)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # which ones bytes of any kind can lead to, torch does not say
        raise InputError(broken) from error
    if not isinstance(state, dict) or type(state.get("version")) is not int:
        raise InputError(broken)
    if not isinstance(state.get("format"), str) or state["format"] != _FORMAT:
        raise InputError(broken)
    if state["version"] != VERSION:
        raise InputError(
            f"{path}: checkpoint version {state['version']}, this mirror_opt reads "
            f"{VERSION}; use the mirror_opt that wrote it, or train again"
        )
    if any(not isinstance(state.get(k, ...), kind) for k, kind in _FIELDS.items()):
        raise InputError(broken)
    losses = state["losses"]
    sound = (
        (losses.layout, losses.dtype) == (torch.strided, torch.float64)
        and losses.shape == (state["iteration"],)
        and not losses.isinf().any()
        and 0 <= state["seconds"] < math.inf
        and is_state(state["recovery"])
    )
    if not sound:
        raise InputError(broken)
    return state


def _sealed(archive: bytes) -> bytes:
    r"""A zip archive without a comment, with the seal as its comment."""
    # An archive ends with the length of its comment, in two bytes, and the comment.
    length = len(_SEAL) + _DIGITS
    body = archive[:-2] + length.to_bytes(2, "little") + _SEAL
    return body + _digest(body)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


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
