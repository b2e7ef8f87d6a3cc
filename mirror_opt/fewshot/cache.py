r"""Where decoded images are kept between runs.

Every file in the cache can be made again, so a damaged one is replaced, never trusted: its name
carries a digest of all that decides its content, and it ends with the digest of all bytes before.
Files are plain ``.npy`` and ``.npz`` arrays but for that, which readers of them pass over, and are
read without pickle.
"""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from mirror_opt.errors import InputError
from mirror_opt.files import atomic_write

__all__ = ["cache_dir", "cached_array", "cached_arrays", "digest"]


def cache_dir() -> Path:
    r"""The folder of the cache: ``MIRROR_OPT_CACHE``, or else ``~/.cache/mirror_opt``."""
    named = os.environ.get("MIRROR_OPT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mirror_opt"


def digest(*parts: Any) -> str:
    r"""Sixteen hexadecimal digits that name ``parts``, which JSON must be able to hold.

    Example:
        >>> digest("glyphs", 1) == digest("glyphs", 1)
        True
    """
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached_array(name: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    r"""The array of the cache file ``name`` (``.npy``), built and written if it is not there.

    It is mapped into memory, read-only: a large data set is read once, for its digest, and takes
    the memory of the pages that are used.

    Raises:
        InputError: the cache folder cannot be read or written.
    """

    def load(path: Path) -> np.ndarray:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def save(file: BinaryIO, array: np.ndarray) -> None:
        np.save(file, array, allow_pickle=False)

    return _cached(name, load, save, build)


def cached_arrays(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    r"""The arrays of the cache file ``name`` (``.npz``), built and written if it is not there.

    Raises:
        InputError: the cache folder cannot be read or written.
    """

    def load(path: Path) -> dict[str, np.ndarray]:
        # Opened here, because np.load leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    def save(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    return _cached(name, load, save, build)


def _is_whole(path: Path) -> bool:
    r"""Whether a file ends with the digest of what is before."""
    data = np.memmap(path, mode="r")
    size = sha256().digest_size
    return sha256(data[:-size].data).digest() == data[-size:].tobytes()


_Content = TypeVar("_Content")


def _cached(
    name: str,
    load: Callable[[Path], _Content],
    save: Callable[[BinaryIO, _Content], None],
    build: Callable[[], _Content],
) -> _Content:
    path = cache_dir() / name
    try:
        try:
            if _is_whole(path):
                return load(path)
        except Exception:
            pass  # absent, or unreadable, which can raise anything: built again
        with atomic_write(path) as file:  # opened first: a folder of no use shows before the work
            save(file, build())
            file.flush()
            file.write(sha256(np.memmap(file.name, mode="r").data).digest())
        return load(path)
    except OSError as error:
        raise InputError(
            f"cannot use the cache file {path}: {error.strerror or error}; "
            "set MIRROR_OPT_CACHE to a folder that can be written and has room"
        ) from error
