"""Writing a file whole or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["atomic_write", "leftovers"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    r"""Opens a binary file that appears at ``path`` only when it was written to the end.

    The bytes go to a temporary file in the same folder (made where it is missing), which is flushed
    to the disk and renamed over ``path``. A reader finds the old content or the new one and never a
    part; after an exception ``path`` is what it was and no temporary file stays. Several processes
    may write the same file at once. What a killed one leaves behind, :func:`leftovers` finds.

    Raises:
        OSError: the folder cannot be written, or the disk is full; names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # write() does not say which file met the full disk, and a temporary name tells nobody.
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and error.filename in (None, str(temporary))
        ):
            error.filename = str(path)
        raise


def leftovers(path: str | os.PathLike) -> list[Path]:
    r"""The temporary files of writers of ``path``: of killed ones, where none writes now."""
    path = Path(path)
    names = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{32}")
    return [other for other in path.parent.iterdir() if names.fullmatch(other.name)]
