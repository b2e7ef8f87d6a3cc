r"""Glyphs: few-shot classification of characters, drawn from the fonts that matplotlib ships.

A class is a character, or several that look alike; an example is one of twelve faces of DejaVu
under a small random affine map. The bitmaps are drawn once and kept in the cache.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from torch.nn import functional as F

from mirror_opt.fewshot.cache import cached_arrays, digest
from mirror_opt.fewshot.episodes import SPLITS, ImageSet, ImageTasks

__all__ = ["FACES", "Glyphs"]

_FAMILIES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
}
FACES = tuple(f"{family}{style}.ttf" for family, styles in _FAMILIES.items() for style in styles)

_FORMAT = 1  # of the cached file: change it with anything below that decides its content
_SIDE = 28  # pixels of a bitmap
_EM = 18  # pixels of the font size
_BOX = 20  # pixels that a character may span, so that the affine map does not push it out
_SCALE = 4  # drawn this many times larger and averaged: hinting moves nothing that is seen
_ALIKE = 255 // 7  # largest difference of a pixel between two bitmaps that look alike
_ROTATION = np.pi / 18
_STRETCH = 0.1
_SHEAR = 0.1
_TRANSLATION = 1.5  # pixels
_SHARES = {"train": 0.64, "val": 0.16, "test": 0.20}  # of the classes, as in mini-ImageNet


class Glyphs(ImageTasks):
    r"""Characters at 28 x 28, ink 1 on ground 0, from the 12 faces of DejaVu Sans, Sans Mono and
    Serif that matplotlib ships.

    The characters are those that all faces have and that leave ink, each centred. Those that
    look alike (in some face no pixel differs by more than a seventh of full ink: Latin A, Greek
    Alpha, Cyrillic A) are one class, drawn as the first of them. All characters that decompose
    to one base letter, in either case, and all that look alike with one of them are in one
    split, so nothing of a test class is seen in training. The splits hold about 64, 16 and 20%
    of the classes and do not depend on ``seed``.

    An example is a face under a random affine map: rotation up to 10 degrees, scale 0.9 to 1.1,
    shear up to 0.1, translation up to 1.5 pixels. No face of the support set is in the query
    set: the support set has ``min(shots, 6)`` faces of a class and the query set the others,
    and faces come again, under another map, where there are more examples than faces.

    The classes and the splits are the same everywhere. The pixels come from the FreeType inside
    pillow, whose versions differ by a grey level in a pixel here and there; so the version is
    part of the name of the cached file.

    Args:
        ways: The number of classes in a task.
        shots: The number of support examples of each class.
        queries: The number of query examples of each class.
        seed: Chooses the stream of tasks.

    Raises:
        InputError: a number out of range, more ways than classes, a cache folder that cannot be
            written.
    """

    name = "glyphs"

    def __init__(self, *, ways: int = 5, shots: int = 1, queries: int = 15, seed: int = 0):
        sets = _load()
        super().__init__(sets, ways=ways, shots=shots, queries=queries, seed=seed)

    def _images_needed(self) -> int:
        return len(FACES)

    def _pick(self, members: np.ndarray, rng: Generator) -> np.ndarray:
        faces = rng.permutation(members)
        held = min(self.shots, len(faces) // 2)
        return np.concatenate(
            [np.resize(faces[:held], self.shots), np.resize(faces[held:], self.queries)]
        )

    def _augment(self, x: Tensor, rngs: Sequence[Generator]) -> Tensor:
        count = x.shape[1] * x.shape[2]
        maps = np.concatenate([_random_affine(rng, count) for rng in rngs])
        # The grid is written out, where affine_grid would multiply matrices, so that the bits of
        # a task do not depend on how many tasks are drawn with it.
        a, b, right, c, d, down = torch.from_numpy(maps)[..., None, None].unbind(1)
        centres = (2 * torch.arange(_SIDE) + 1) / _SIDE - 1
        u, v = centres[None, :], centres[:, None]
        grid = torch.stack([a * u + b * v + right, c * u + d * v + down], dim=-1)
        return F.grid_sample(x.flatten(0, 2), grid, align_corners=False).view_as(x)


def _random_affine(rng: Generator, count: int) -> np.ndarray:
    r"""Maps from a place in the output to the place in the bitmap that it shows, with the image
    spanning [-1, 1]: the rows of 2 x 3 matrices, ``(count, 6)`` float32."""
    angle, scale, shear, right, down = rng.uniform(-1, 1, size=(5, count))
    angle, scale, shear = _ROTATION * angle, 1 + _STRETCH * scale, _SHEAR * shear
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    shift = 2 * _TRANSLATION / _SIDE
    rows = [cos, shear * cos - sin, shift * right, sin, shear * sin + cos, shift * down]
    return np.stack(rows, axis=1).astype(np.float32)


def _load() -> dict[str, ImageSet]:
    folder = _font_folder()
    fonts = sha256(b"".join((folder / face).read_bytes() for face in FACES)).hexdigest()
    stamp = digest(_FORMAT, fonts, PIL.__version__, features.version("freetype2"))
    arrays = cached_arrays(f"glyphs-{stamp}.npz", lambda: _render(folder))
    images = arrays["images"].reshape(-1, 1, _SIDE, _SIDE)
    sets = {}
    for split in SPLITS:
        classes = np.flatnonzero(arrays["splits"] == split)
        faces = np.arange(len(FACES))
        members = tuple(len(FACES) * c + faces for c in classes)
        sets[split] = ImageSet(images, members, tuple(str(arrays["names"][c]) for c in classes))
    return sets


def _font_folder() -> Path:
    # Imported here: only the drawing of glyphs needs matplotlib's files, not its machinery.
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf"


def _render(folder: Path) -> dict[str, np.ndarray]:
    r"""All classes: ``images (classes, faces, 28, 28)`` uint8, the characters of each in
    ``names``, and its split in ``splits``."""
    characters = _characters(folder)
    images = np.stack([_draw_face(folder / face, characters) for face in FACES], axis=1)
    inked: np.ndarray = np.all(images.any(axis=(2, 3)), axis=1)
    images = images[inked]
    characters = [c for c, keep in zip(characters, inked, strict=True) if keep]
    alike = _alike(images)
    classes = _components(len(characters), alike)
    related = _components(len(characters), [*alike, *_chains(_base_letter(c) for c in characters)])
    names = ["".join(characters[i] for i in members) for members in classes]
    split = _deal([[characters[i] for i in members] for members in related], names)
    return {
        "images": images[[members[0] for members in classes]],
        "names": np.array(names),
        "splits": np.array([split[name[0]] for name in names]),
    }


def _characters(folder: Path) -> list[str]:
    from matplotlib.ft2font import FT2Font

    charts = [set(FT2Font(str(folder / face)).get_charmap()) for face in FACES]
    return [chr(code) for code in sorted(set.intersection(*charts))]


def _draw_face(path: Path, characters: Sequence[str]) -> np.ndarray:
    r"""Each character's bitmap, ``(characters, 28, 28)`` uint8, zero where it leaves no ink."""
    em, side, box = _SCALE * _EM, _SCALE * _SIDE, _SCALE * _BOX
    # The basic layout, because the other depends on libraries that a system may lack.
    font = ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)
    bitmaps = np.zeros((len(characters), _SIDE, _SIDE), dtype=np.uint8)
    for bitmap, character in zip(bitmaps, characters, strict=True):
        # Room on all sides: combining marks are drawn left of and above their origin.
        page = Image.new("L", (6 * em, 6 * em))
        ImageDraw.Draw(page).text((2 * em, 2 * em), character, font=font, fill=255)
        if (bounds := page.getbbox()) is None:
            continue
        ink = page.crop(bounds)
        if (excess := max(ink.size) / box) > 1:
            ink = ink.resize([max(1, round(n / excess)) for n in ink.size], Image.Resampling.BOX)
        tile = Image.new("L", (side, side))
        tile.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        bitmap[:] = np.asarray(tile.reduce(_SCALE))
    return bitmaps


def _alike(images: np.ndarray) -> list[tuple[int, int]]:
    r"""The pairs of characters ``(i, j)``, i < j, that look alike in some face."""
    pairs: set[tuple[int, int]] = set()
    for face in range(images.shape[1]):
        flat = images[:, face].reshape(len(images), -1).astype(np.float32)
        squares = (flat * flat).sum(axis=1)
        # Bitmaps that differ by at most d everywhere are at most d sqrt(pixels) apart: this one
        # product leaves few pairs to compare pixel by pixel.
        apart = squares[:, None] + squares[None, :] - 2 * flat @ flat.T
        near = np.argwhere(np.triu(apart <= 1.01 * _ALIKE**2 * flat.shape[1], k=1))
        for part in np.array_split(near, 1 + len(near) // 4096):
            same = np.abs(flat[part[:, 0]] - flat[part[:, 1]]).max(axis=1) <= _ALIKE
            pairs.update((int(i), int(j)) for i, j in part[same])
    return sorted(pairs)


def _base_letter(character: str) -> str:
    r"""What a character is without its marks, case and typographic form: the first letter or
    digit of its compatibility decomposition, else its first sign, else its first mark."""
    parts = [c for c in unicodedata.normalize("NFKD", character) if not c.isspace()]
    signs = [c for c in parts if not unicodedata.combining(c)]
    letters = [c for c in signs if unicodedata.category(c)[0] in "LN"]
    first = (letters or signs or parts)[0]
    return unicodedata.normalize("NFKD", first.casefold())[0]


def _chains(labels: Iterable[Hashable]) -> list[tuple[int, int]]:
    r"""Pairs that link all positions of one label: each with the position before it."""
    last: dict[Hashable, int] = {}
    pairs = []
    for position, label in enumerate(labels):
        if label in last:
            pairs.append((last[label], position))
        last[label] = position
    return pairs


def _components(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    r"""The connected components of ``0..count-1`` under ``pairs``, sorted in and among them."""
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in pairs:
        low, high = sorted((find(i), find(j)))
        root[high] = low
    members = defaultdict(list)
    for i in range(count):
        members[find(i)].append(i)
    return list(members.values())


def _deal(groups: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, str]:
    r"""The split of every character: whole groups, in an order that a hash shuffles (the same in
    every version of every library), each to the split that lacks most of its share."""
    leaders = {name[0] for name in names}
    size = {group[0]: sum(c in leaders for c in group) for group in groups}
    filled = dict.fromkeys(_SHARES, 0)
    split: dict[str, str] = {}
    for group in sorted(groups, key=lambda group: sha256(group[0].encode()).digest()):
        short = max(_SHARES, key=lambda name: _SHARES[name] * len(names) - filled[name])
        filled[short] += size[group[0]]
        split |= dict.fromkeys(group, short)
    return split
