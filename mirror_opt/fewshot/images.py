r"""Image files, in folders or in zip files, as one listing; and their pixels as one array."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mirror_opt.errors import InputError
from mirror_opt.fewshot.cache import cached_array, digest

__all__ = ["ImageFile", "inspect", "list_images", "read_images"]

_FORMAT = 1  # of the cached arrays: change it with anything here that decides their content
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageFile:
    r"""One image, not yet read.

    Attributes:
        name: Its place in the listing, ``"train/apple/1.png"``.
        path: The file, or the zip file that holds it.
        member: Its name in the zip file; None for a file.
        stamp: What tells one content from another: size, and checksum or time of change.
    """

    name: str
    path: Path
    member: str | None
    stamp: tuple[int, int]

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.member} in {self.path}"


def list_images(root: Path) -> dict[str, ImageFile]:
    r"""The images below the folder ``root``, and those in zip files directly in it, by name.

    A zip file stands for a folder of its name: ``apple/1.png`` in ``train.zip`` and
    ``train/apple/1.png`` in ``train.zip`` are both ``train/apple/1.png``. Where a file and a
    member have one name, the file is meant. Files that are hidden or have no suffix of an image
    are passed over.

    Raises:
        InputError: a zip file that cannot be read.
    """
    members = (file for path in sorted(root.glob("*.zip")) for file in _list_zip(path))
    files = {file.name: file for file in (*members, *_list_folder(root))}
    return dict(sorted(files.items()))


def inspect(file: ImageFile) -> tuple[int, int]:
    r"""The shorter side of an image in pixels and its channels: 1 if it is grey, else 3.

    Raises:
        InputError: an image that cannot be read.
    """
    with ExitStack() as stack:
        image = _open(file, {}, stack)
        return min(image.size), 1 if image.mode in ("1", "L", "LA", "I;16") else 3


def read_images(
    files: Sequence[ImageFile], size: int, channels: int, *, invert: bool = False
) -> np.ndarray:
    r"""The pixels of ``files``, ``(len(files), channels, size, size)`` uint8, mapped read-only
    from the cache, into which they are decoded once.

    Arguments:
        files: The images.
        size: The side to which every image is resized (Lanczos), whatever its proportions.
        channels: 1 for grey or 3 for colour.
        invert: Whether dark becomes light.

    Raises:
        InputError: an image that cannot be read, or a cache folder that cannot be written.
    """
    content = [(file.name, *file.stamp) for file in files]
    stamp = digest(_FORMAT, PIL.__version__, size, channels, invert, content)
    return cached_array(f"images-{stamp}.npy", lambda: _decode(files, size, channels, invert))


def _decode(files: Sequence[ImageFile], size: int, channels: int, invert: bool) -> np.ndarray:
    pixels = np.empty((len(files), channels, size, size), dtype=np.uint8)
    archives: dict[Path, zipfile.ZipFile] = {}
    with ExitStack() as stack:
        bar = tqdm(files, desc="decoding images, once", unit="image", disable=None, leave=False)
        for row, file in zip(pixels, bar, strict=True):
            image = _open(file, archives, stack)
            try:
                image = image.convert("L" if channels == 1 else "RGB")
            except _UNREADABLE as error:
                raise _unreadable(file, error) from error
            image = image.resize((size, size), Image.Resampling.LANCZOS)
            row[:] = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    return 255 - pixels if invert else pixels


def _open(file: ImageFile, archives: dict[Path, zipfile.ZipFile], stack: ExitStack) -> Image.Image:
    r"""The image, its header read. Zip files stay open in ``archives`` until ``stack`` closes."""
    try:
        if file.member is None:
            data = file.path.read_bytes()
        else:
            if file.path not in archives:
                archives[file.path] = stack.enter_context(zipfile.ZipFile(file.path))
            data = archives[file.path].read(file.member)
        return Image.open(BytesIO(data))
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


def _unreadable(file: ImageFile, error: Exception) -> InputError:
    # Pillow's own message shows the buffer's address where it does not know the format.
    reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
    return InputError(f"cannot read the image {file}: {reason}; mend it or take it away")


def _list_zip(path: Path) -> Iterator[ImageFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the zip file {path}: {error}; fetch it again") from error
    for member in members:
        name = member.filename
        if not name.startswith(f"{path.stem}/"):
            name = f"{path.stem}/{name}"
        if _is_image(name):
            yield ImageFile(name, path, member.filename, (member.file_size, member.CRC))


def _list_folder(root: Path) -> Iterator[ImageFile]:
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if _is_image(relative):
                status = path.stat()
                yield ImageFile(relative, path, None, (status.st_size, status.st_mtime_ns))


def _is_image(name: str) -> bool:
    *folders, file = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) for part in (*folders, file))
    return not hidden and os.path.splitext(file)[1].lower() in _SUFFIXES
