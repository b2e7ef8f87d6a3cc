r"""One writer in a run's directory at a time."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mirror_opt.errors import InputError
from mirror_opt.runs.directory import sweep

try:
    import fcntl
except ImportError:  # not there on Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "writing"]

LOCK = ".mirror-opt.lock"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # not there on Windows


@contextlib.contextmanager
def writing(out: str | os.PathLike) -> Iterator[None]:
    r"""Holds ``out``, made where it is missing, against other processes that would write there.

    The system lets go of it when the process ends, however it ends; a lock file that a killed one
    left behind holds nothing. What one left of a half-written file is removed.

    Raises:
        InputError: another process holds it, or what has the lock's name there is no file.
        OSError: ``out`` cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    try:
        file = _locked(out)
    except OSError as error:
        error.filename = str(out)  # the lock is nothing that a person knows of
        raise
    try:
        sweep(out)
        yield
    finally:
        # Removed while it is held: one who opens it from here on finds it gone, and makes another.
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()
        os.close(file)


def _locked(out: Path) -> int:
    r"""The open lock file, held."""
    while True:
        _check_own(out / LOCK)
        file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            _hold(file, out)
            os.write(file, f"{os.getpid()}\n".encode())  # a full disk shows here
            if _is_at(file, out / LOCK):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # that of a writer who has removed it since


def _check_own(path: Path) -> None:
    # Through a link another's file would be written to, and a pipe would wait for a reader.
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise InputError(
            f"{path}: no file, where that of a lock belongs; move it away, or pass another --out"
        )


def _hold(file: int, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{out}: another run is writing there; wait until it ends, or pass another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # else a file system without locks


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
