r"""Image folder: few-shot classification of any images that lie in folders of classes."""

import csv
import json
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, combinations
from pathlib import Path

import numpy as np

from mirror_opt.errors import InputError, is_integer
from mirror_opt.fewshot.episodes import SPLITS, ImageSet, ImageTasks
from mirror_opt.fewshot.images import ImageFile, fingerprint, inspect, list_images, read_images

__all__ = ["ImageFolder"]

_Classes = dict[str, list[ImageFile]]  # the images of each class
_LARGEST_DEFAULT = 84  # pixels, the side of mini-ImageNet's images
_SPLIT_FILE = "splits.json"
_NOT_VAL = ("valid", "validation")  # what others call it, and would miss


class ImageFolder(ImageTasks):
    r"""Image classes from a folder, in one of three forms (the first that is found):

    - a split file ``splits.json``, ``{"train": ["apple", ...], "val": [...], "test": [...]}``,
      beside the class folders ``apple/*.png`` or a folder ``images`` of them;
    - a list for each split, ``train.csv``, ``val.csv`` and ``test.csv`` with the columns
      ``filename,label``, beside the images or a folder ``images`` of them (mini-ImageNet);
    - a folder for each split, ``train/apple/*.png``, ``val/...`` and ``test/...`` (CIFAR-FS).

    Any folder may be a zip file of its name (``train.zip``, ``images.zip``), read as it is.
    Train and test are needed, validation only where it is sampled. What else lies in the folder
    is not looked at. Images are resized to ``image_size`` and decoded once, into the cache; they
    are grey where the first of every training class is, else in colour.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        seed: Chooses the stream of tasks.
        data_dir: The folder. Default: ``MIRROR_OPT_DATA``.
        image_size: The side of the images in pixels. Default: the shorter side of the first
            training image, at most 84.

    Raises:
        InputError: a folder, a split or a listed image that is absent or cannot be read, a class
            without images, with too few, or in two splits, a number out of range.
    """

    name = "folder"

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
        image_size: int | None = None,
    ):
        root = _root(data_dir)
        splits = _splits(root)
        # A grey image or some among those in colour do not make the data set grey.
        side, channels = inspect([images[0] for images in splits["train"].values()])
        size = min(side, _LARGEST_DEFAULT) if image_size is None else image_size
        if not is_integer(size) or size < 1:
            raise InputError(f"image_size is {size!r}: pass the side of the images in pixels")
        sets = {split: _read(classes, size, channels) for split, classes in splits.items()}
        super().__init__(sets, ways=ways, shots=shots, queries=queries, seed=seed)
        groups = {
            f"{split}/{label}": images
            for split, classes in splits.items()
            for label, images in classes.items()
        }
        self.fingerprint = fingerprint(groups)


def _root(data_dir: str | os.PathLike | None) -> Path:
    named = os.environ.get("MIRROR_OPT_DATA") if data_dir is None else data_dir
    if not named:
        raise InputError(
            "task folder has no folder: pass it as data_dir (--data-dir) or MIRROR_OPT_DATA"
        )
    if not Path(named).is_dir():
        raise InputError(
            f"{named} is no folder: pass one with train, val and test as data_dir (--data-dir)"
        )
    return Path(named)


def _splits(root: Path) -> dict[str, _Classes]:
    for name in _NOT_VAL:
        for path in (root / name, root / f"{name}.zip", root / f"{name}.csv"):
            if path.exists():
                raise InputError(f"{path} would not be read: name it val{path.suffix}")
    if (root / _SPLIT_FILE).is_file():
        splits = _from_classes(root / _SPLIT_FILE)
    elif any((root / f"{split}.csv").is_file() for split in SPLITS):
        splits = _from_lists(root)
    else:
        splits = _from_folders(root)
    for split in ("train", "test"):
        if not splits.get(split):
            held = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
            raise InputError(
                f"no split {split!r} in {root}: it needs class folders in {split}/ or "
                f"{split}.zip, or {split}.csv, or {_SPLIT_FILE}; it holds {held}"
            )
    splits = {split: splits[split] for split in SPLITS if splits.get(split)}
    for one, other in combinations(splits, 2):
        if shared := sorted(splits[one].keys() & splits[other].keys()):
            raise InputError(
                f"class {shared[0]!r} in {root} is in both {one} and {other}: leave it in one"
            )
    return splits


def _from_folders(root: Path) -> dict[str, _Classes]:
    splits: dict[str, _Classes] = defaultdict(lambda: defaultdict(list))
    for name, file in list_images(root, SPLITS, whole=True).items():
        split, _, rest = name.partition("/")
        if label := rest.rpartition("/")[0]:
            splits[split][label].append(file)
    return splits


def _from_classes(path: Path) -> dict[str, _Classes]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        named = {split: _labels(listed.get(split, [])) for split in SPLITS}
        if unknown := sorted(listed.keys() - set(SPLITS)):
            raise ValueError(f"it has {unknown[0]!r}")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read {path}: {error}; write a JSON object with a list of classes for each "
            f"of {', '.join(SPLITS)}"
        ) from error
    for split, labels in named.items():
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise InputError(f"{path} names class {repeated[0]!r} in {split} twice: leave one")
    folders: _Classes = defaultdict(list)
    for name, file in _list_named(path.parent, chain.from_iterable(named.values())).items():
        folders[name.rpartition("/")[0]].append(file)
    splits: dict[str, _Classes] = {split: {} for split in SPLITS}
    for split, labels in named.items():
        for label in labels:
            images = folders.get(f"images/{label}") or folders.get(label)
            if not images:
                raise InputError(
                    f"{path} names class {label!r}, but there is no image in "
                    f"{path.parent / 'images' / label} or {path.parent / label}"
                )
            splits[split][label] = images
    return splits


def _labels(listed: object) -> list[str]:
    # A text, and the names of an object, could be gone through too.
    if not isinstance(listed, list):
        raise TypeError(f"{reprlib.repr(listed)} is no list")
    return [str(label) for label in listed]


def _from_lists(root: Path) -> dict[str, _Classes]:
    paths = {split: root / f"{split}.csv" for split in SPLITS}
    rows = {split: _rows(path) for split, path in paths.items() if path.is_file()}
    files = _list_named(root, (name for name, _ in chain.from_iterable(rows.values())))
    splits: dict[str, _Classes] = {}
    listed: set[str] = set()
    for split in rows:
        path = paths[split]
        classes: _Classes = defaultdict(list)
        for line, (name, label) in enumerate(rows[split], start=2):
            file = files.get(f"images/{name}") or files.get(name)
            if file is None:
                raise InputError(
                    f"{path}, line {line}: no image {name!r} in {root / 'images'} or {root}"
                )
            if name in listed:
                raise InputError(f"{path}, line {line}: {name!r} is listed twice: leave one")
            listed.add(name)
            classes[label].append(file)
        splits[split] = classes
    return splits


def _list_named(root: Path, names: Iterable[str]) -> dict[str, ImageFile]:
    r"""The images in ``images`` and in whatever folders of ``root`` the names start with."""
    return list_images(root, {"images", *(name.partition("/")[0] for name in names)})


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            read = csv.DictReader(file)
            rows = [(row.get("filename") or "", row.get("label") or "") for row in read]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}; write it again as UTF-8 text") from error
    for line, row in enumerate(rows, start=2):
        if not all(row):
            raise InputError(
                f"{path}, line {line}: no filename or no label; write both, under the first "
                "line filename,label"
            )
    return rows


def _read(classes: _Classes, size: int, channels: int) -> ImageSet:
    files = [file for images in classes.values() for file in images]
    ends = np.cumsum([len(images) for images in classes.values()])
    members = tuple(np.split(np.arange(len(files)), ends[:-1]))
    return ImageSet(read_images(files, size, channels), members, tuple(classes))
