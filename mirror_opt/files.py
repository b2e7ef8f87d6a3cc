"""Writing a file whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

__all__ = ["atomic_write"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, shared: bool = True) -> Iterator[BinaryIO]:
    r"""Opens a binary file that appears at ``path`` only when it was written to the end.

    The bytes go to a temporary file in the same folder (made where it is missing), which is flushed
    to the disk and renamed over ``path``. A reader finds the old content or the new one and never a
    part; after an exception ``path`` is what it was and no temporary file stays.

    Args:
        path: the file.
        shared: several processes may write it at once, so the temporary name is unique. False: the
            name is fixed, and what a killed process left behind is replaced by the next write.

    Raises:
        OSError: the folder cannot be written, or the disk is full; names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex if shared else 'tmp'}")
    try:
        with open(temporary, "xb" if shared else "wb") as file:
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
