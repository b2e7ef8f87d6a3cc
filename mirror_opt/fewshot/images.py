r"""Image files, in folders or in zip files, as one listing; and their pixels as one array."""

import logging
import os
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mirror_opt.errors import InputError
from mirror_opt.fewshot.cache import cached_array, digest

__all__ = ["ImageFile", "fingerprint", "inspect", "list_images", "read_images"]

_FORMAT = 2  # of the cached arrays: change it with anything here that decides their content
# What Pillow would log of a damaged image, its exception says too.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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


def list_images(
    root: Path, tops: Collection[str] | None = None, *, whole: bool = False
) -> dict[str, ImageFile]:
    r"""The images below the folder ``root``, and those in zip files directly in it, by name.

    A zip file stands for a folder of its name: ``apple/1.png`` in ``train.zip`` and
    ``train/apple/1.png`` in ``train.zip`` are both ``train/apple/1.png``. Where a file and a
    member have one name, the file is meant. Files that are hidden or have no suffix of an image
    are passed over.

    Args:
        root: The folder.
        tops: With what a name may start: whatever else lies in ``root`` is not looked at.
            Default: anything.
        whole: Whether a folder without an image in it, below it or beside it is an error.

    Raises:
        InputError: a folder or a zip file that cannot be read, or a folder without images.
    """
    found: dict[str, ImageFile | None] = {}
    paths = _entries(root)
    for path in paths:
        if path.suffix == ".zip" and (tops is None or path.stem in tops):
            found.update(_list_zip(path))
    for path in paths:
        if tops is None or path.name in tops:
            found.update(_list_path(root, path))
    if whole and (barren := _barren(found)):
        raise InputError(
            f"there is no image in {root / barren[0]}: put some into it, or take it away"
        )
    return {name: file for name, file in sorted(found.items()) if file is not None}


def inspect(files: Sequence[ImageFile]) -> tuple[int, int]:
    r"""The shorter side of the first image in pixels, and channels: 1 if all are grey, else 3.

    Raises:
        InputError: an image that cannot be read.
    """
    archives: dict[Path, zipfile.ZipFile] = {}
    with ExitStack() as stack:
        images = [_open(file, archives, stack) for file in files]
        grey = (image.mode.split(";")[0] in ("1", "L", "LA", "I", "F") for image in images)
        return min(images[0].size), 1 if all(grey) else 3


def read_images(
    files: Sequence[ImageFile], size: int, channels: int, *, invert: bool = False
) -> np.ndarray:
    r"""The pixels of ``files``, ``(len(files), channels, size, size)`` uint8, mapped read-only
    from the cache, into which they are decoded once.

    Args:
        files: The images.
        size: The side to which every image is resized (Lanczos), whatever its proportions.
        channels: 1 for grey or 3 for colour. Pixels of 16 bits are scaled to 8, and transparent
            ones lie on white.
        invert: Whether dark becomes light.

    Raises:
        InputError: an image that cannot be read, or a cache folder that cannot be written.
    """
    content = [(file.name, *file.stamp) for file in files]
    stamp = digest(_FORMAT, PIL.__version__, size, channels, invert, content)
    return cached_array(f"images-{stamp}.npy", lambda: _decode(files, size, channels, invert))


def fingerprint(groups: Mapping[str, Sequence[ImageFile]]) -> str:
    r"""Twelve digits that name images by their groups, names and contents, wherever they lie.

    The order counts, because tasks are drawn by it. Files are read once, and their checksums kept
    in the cache; a zip file has them already.

    Raises:
        InputError: an image that cannot be read, or a cache folder that cannot be written.
    """
    files = [file for group in groups.values() for file in group]
    content = [(file.name, *file.stamp) for file in files]
    checksums = cached_array(
        f"checksums-{digest(_FORMAT, content)}.npy",
        lambda: np.array([_checksum(file) for file in files], dtype=np.uint32),
    )
    names = {name: [(file.name, file.stamp[0]) for file in group] for name, group in groups.items()}
    return digest(names, checksums.tolist())[:12]


def _checksum(file: ImageFile) -> int:
    if file.member is not None:
        return file.stamp[1]
    try:
        return zlib.crc32(file.path.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from error


def _decode(files: Sequence[ImageFile], size: int, channels: int, invert: bool) -> np.ndarray:
    pixels = np.empty((len(files), channels, size, size), dtype=np.uint8)
    archives: dict[Path, zipfile.ZipFile] = {}
    with ExitStack() as stack:
        bar = tqdm(files, desc="decoding images, once", unit="image", disable=None, leave=False)
        for row, file in zip(pixels, bar, strict=True):
            image = _open(file, archives, stack)
            try:
                image = _eight_bits(image).convert("L" if channels == 1 else "RGB")
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            except Exception as error:
                raise _unreadable(file, error) from error
            row[:] = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    return 255 - pixels if invert else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    r"""The image with 8 bits a channel, and on white where it lets through what is behind it."""
    # The 16 bits of a PNG are of mode I in some versions of Pillow, and cut off on conversion.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(
            (np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)
        )
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode} have no known range: save them as 8 or 16 bits"
        )
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image


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
    except Exception as error:  # damaged bytes can raise anything in zipfile and Pillow
        raise _unreadable(file, error) from error


def _unreadable(file: ImageFile, error: Exception) -> InputError:
    # Pillow's own message shows the buffer's address where it does not know the format.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "no known image format" if unknown else _reason(error)
    return InputError(f"cannot read the image {file}: {reason}; mend it or take it away")


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return " ".join((strerror or str(error) or type(error).__name__).split())


# The listings: names by what they stand for, an image, or (None) a folder or another file. The name
# of a folder ends with a slash.


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        _refuse_folder(error)


def _refuse_folder(error: OSError) -> NoReturn:
    raise InputError(
        f"cannot read the folder {error.filename}: {_reason(error)}; "
        "make it readable or take it away"
    ) from error


def _list_path(root: Path, top: Path) -> Iterator[tuple[str, ImageFile | None]]:
    if not top.is_dir():
        yield _list_file(root, top)
        return
    for folder, subfolders, names in os.walk(top, onerror=_refuse_folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        yield f"{Path(folder).relative_to(root).as_posix()}/", None
        for name in names:
            yield _list_file(root, Path(folder, name))


def _list_file(root: Path, path: Path) -> tuple[str, ImageFile | None]:
    name = path.relative_to(root).as_posix()
    # A link that leads nowhere may have been a folder of images.
    if _is_hidden(*name.split("/")) or not (_is_image(name) or path.is_symlink()):
        return name, None
    try:
        status = path.stat()
    except OSError as error:
        reason = _reason(error)
        raise InputError(f"cannot read {path}: {reason}; mend it or take it away") from error
    if not (_is_image(name) and stat.S_ISREG(status.st_mode)):
        return name, None
    return name, ImageFile(name, path, None, (status.st_size, status.st_mtime_ns))


def _list_zip(path: Path) -> Iterator[tuple[str, ImageFile | None]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # damaged bytes can raise anything in zipfile
        reason = _reason(error)
        raise InputError(f"cannot read the zip file {path}: {reason}; fetch it again") from error
    names = [_member_name(path, member.filename) for member in members]
    # Of folders around all images, those outside of one that is named as the zip file say nothing.
    columns = zip(*(name.split("/")[:-1] for name in names if _is_image(name)), strict=False)
    around = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    outside = around.index(path.stem) if path.stem in around else 0
    for name, member in zip(names, members, strict=True):
        name = "/".join(name.split("/")[outside:])
        if not name.startswith(f"{path.stem}/"):
            name = f"{path.stem}/{name}"
        if not _is_image(name):
            yield name, None
            continue
        if member.flag_bits & 1:
            raise InputError(f"{name} in {path} is encrypted; pack the zip file again without that")
        stamp = (member.file_size, member.CRC)
        yield name, ImageFile(name, path, member.filename, stamp)


def _member_name(path: Path, filename: str) -> str:
    parts = [part for part in filename.replace("\\", "/").split("/") if part != "."]
    if ".." in parts:
        raise InputError(
            f"the zip file {path} has the member {filename!r}, outside of itself; pack it again"
        )
    return "/".join(parts).lstrip("/")


def _barren(names: Iterable[str]) -> list[str]:
    r"""The innermost folders without an image, unless they lie beside images of a class."""
    folders: set[str] = set()
    classes: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        if folder and not _is_hidden(*folder.split("/")):
            folders.add(folder)
            if _is_image(name):
                classes.add(folder)
    outer = {parent for folder in folders for parent in _parents(folder)}
    beside = {folder for folder in classes if "/" in folder}
    return sorted(
        folder for folder in folders - classes - outer if beside.isdisjoint(_parents(folder)[:1])
    )


def _parents(folder: str) -> list[str]:
    r"""``["a/b", "a"]`` of ``"a/b/c"``."""
    parts = folder.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _is_image(name: str) -> bool:
    *folders, file = name.split("/")
    return not _is_hidden(*folders, file) and os.path.splitext(file)[1].lower() in _SUFFIXES


def _is_hidden(*parts: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)
