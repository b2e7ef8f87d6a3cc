r"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each."""

import os
from collections import defaultdict
from hashlib import md5, sha256
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from mirror_opt.errors import InputError, is_integer
from mirror_opt.fewshot.cache import cache_dir
from mirror_opt.fewshot.episodes import ImageSet, ImageTasks
from mirror_opt.fewshot.images import ImageFile, fingerprint, list_images, read_images
from mirror_opt.files import atomic_write

__all__ = ["CHECKSUMS", "SOURCE", "Omniglot", "download"]

SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
# The MD5 sums by which the official files are known.
CHECKSUMS = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
_PARTS = ("images_background", "images_evaluation")
_SIDE = 28
_CHARACTERS = 1623
_TRAIN_CHARACTERS = 1200


class Omniglot(ImageTasks):
    r"""Handwritten characters (Lake et al. 2015, https://doi.org/10.1126/science.aab3050) at
    28 x 28, ink 1 on ground 0.

    Two splits of the characters:

    - ``"standard"``: all 1623 in one order, the first 1200 for training, the other 423 for test,
      as in Vinyals et al. 2016 (https://arxiv.org/abs/1606.04080). Their order is not published;
      here it is that of the SHA-256 digests of ``Alphabet/characterNN``, the same everywhere.
    - ``"background"``: the 964 of the background file for training, the 659 of the evaluation
      file, other alphabets, for test.

    ``validation`` characters, the last in that order, are taken out of the training part. None
    by default: a search of hyperparameters needs some, a final run trains on all.

    Args:
        ways: The number of classes in a task.
        shots: The number of support drawings of each class.
        queries: The number of query drawings of each class.
        seed: Chooses the stream of tasks.
        data_dir: The folder with ``images_background.zip`` and ``images_evaluation.zip``, or the
            folders in them. Default: ``MIRROR_OPT_DATA`` or its subfolder ``omniglot``, or where
            ``download`` puts them.
        split: ``"standard"`` or ``"background"``.
        validation: How many training characters become validation characters.
        rotations: Whether a character turned by 90, 180 and 270 degrees is three more classes,
            in every split.
        download: Fetches the files that are not in ``data_dir``, or without one in the cache
            folder; see :func:`download`.

    Raises:
        InputError: data that is absent or cannot be read, an unknown split, a number out of
            range, or too few drawings for ``shots`` and ``queries``.
    """

    name = "omniglot"

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
        split: str = "standard",
        validation: int = 0,
        rotations: bool = True,
        download: bool = False,
    ):
        if split not in ("standard", "background"):
            raise InputError(f"split is {split!r}: pass 'standard' or 'background'")
        files = _find(data_dir, download)
        ordered = _ordered_characters(files)
        if split == "standard":
            if len(ordered) != _CHARACTERS:
                raise InputError(
                    f"found {len(ordered)} characters of Omniglot, but split 'standard' is of "
                    f"{_CHARACTERS}: put both files into the data folder whole"
                )
            train, test = ordered[:_TRAIN_CHARACTERS], ordered[_TRAIN_CHARACTERS:]
        else:
            train = [c for c in ordered if c.startswith(_PARTS[0])]
            test = [c for c in ordered if c.startswith(_PARTS[1])]
        if not isinstance(rotations, bool):
            raise InputError(f"rotations is {rotations!r}: pass True or False")
        if not is_integer(validation) or not 0 <= validation < len(train):
            raise InputError(
                f"validation is {validation}: pass how many of the {len(train)} training "
                "characters to keep for validation, or 0"
            )
        kept = len(train) - validation
        parts = {"train": train[:kept], "val": train[kept:], "test": test}
        images = read_images(list(files.values()), _SIDE, channels=1, invert=True)
        drawings = defaultdict(list)
        for index, name in enumerate(files):
            drawings[_character(name)].append(index)
        sets = {
            part: ImageSet(
                images,
                tuple(np.array(drawings[c]) for c in characters),
                tuple(_bare(c) for c in characters),
            )
            for part, characters in parts.items()
            if characters
        }
        super().__init__(
            sets, ways=ways, shots=shots, queries=queries, seed=seed, rotations=rotations
        )
        self.fingerprint = fingerprint({"": list(files.values())})

    def _absent(self, split: str) -> str:
        hint = "; pass validation=N to keep N training characters for it" if split == "val" else ""
        return super()._absent(split) + hint


def download(
    folder: str | os.PathLike,
    *,
    source: str | None = None,
    checksums: dict[str, str] | None = None,
    timeout: float = 60.0,
) -> None:
    r"""Fetches the Omniglot files that are not in ``folder`` yet and verifies each.

    A file appears in ``folder`` only when it has arrived whole and its MD5 sum is right.

    Args:
        folder: Where the files go; made if it is not there.
        source: The address of the folder that has them; default: ``SOURCE``, the official one.
        checksums: The MD5 sum of each file; default: ``CHECKSUMS``.
        timeout: Seconds to wait for an answer.

    Raises:
        InputError: a source that cannot be reached, a file that breaks off or has another
            checksum, or a folder that cannot be written.
    """
    for name, expected in (CHECKSUMS if checksums is None else checksums).items():
        path = Path(folder, name)
        if not path.exists():
            _fetch(f"{source or SOURCE}/{name}", path, expected, timeout)


def _fetch(url: str, path: Path, expected: str, timeout: float) -> None:
    remedy = f"try again, or put {path.name} into {path.parent} by hand"
    received, checksum = 0, md5(usedforsecurity=False)
    try:
        with urlopen(url, timeout=timeout) as answer, atomic_write(path) as file:
            announced = answer.headers.get("Content-Length")
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                checksum.update(chunk)
                received += len(chunk)
            if announced is not None and received != int(announced):
                raise InputError(f"{url} broke off after {received} of {announced} bytes; {remedy}")
            if checksum.hexdigest() != expected:
                raise InputError(
                    f"{url} has the MD5 sum {checksum.hexdigest()} instead of {expected}; {remedy}"
                )
    except (OSError, HTTPException) as error:
        raise InputError(f"cannot download {url} to {path}: {error}; {remedy}") from error


def _find(data_dir: str | os.PathLike | None, fetch: bool) -> dict[str, ImageFile]:
    r"""The drawings, in the first of the places to look that has both parts."""
    home = cache_dir() / "omniglot"
    if data_dir is not None:
        places = [Path(data_dir), Path(data_dir, "omniglot")]
        home = places[0]
    elif shared := os.environ.get("MIRROR_OPT_DATA"):
        places = [Path(shared), Path(shared, "omniglot"), home]
    else:
        places = [home]
    if (files := _look(places)) is None and fetch:
        download(home)
        files = _look([home])
    if files is None:
        raise InputError(
            f"no {_PARTS[0]}.zip and {_PARTS[1]}.zip in {' or '.join(map(str, places))}: pass "
            "their folder as data_dir (--data-dir) or MIRROR_OPT_DATA, or fetch them with download "
            "(--download of train and compare)"
        )
    return files


def _look(places: list[Path]) -> dict[str, ImageFile] | None:
    for place in places:
        if all((place / part).is_dir() or (place / f"{part}.zip").is_file() for part in _PARTS):
            return list_images(place, _PARTS, whole=True)
    return None


def _character(name: str) -> str:
    r"""``images_background/Greek/character01`` of a drawing's name."""
    return name.rpartition("/")[0]


def _bare(character: str) -> str:
    r"""``Greek/character01``, by which a character is known whatever file it is in."""
    return character.partition("/")[2]


def _ordered_characters(files: dict[str, ImageFile]) -> list[str]:
    characters = {_character(name) for name in files}
    return sorted(characters, key=lambda c: sha256(_bare(c).encode()).digest())
