import unicodedata
from collections import defaultdict
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
import torch

from mirror_opt.errors import InputError
from mirror_opt.fewshot import SPLITS, Glyphs, glyphs


@pytest.fixture(scope="module")
def classes():
    r"""The characters of each class, by split."""
    family = Glyphs()
    return {split: family.classes(split) for split in SPLITS}


def test_counts(classes):
    sizes = {split: len(names) for split, names in classes.items()}
    total = sum(sizes.values())
    assert 2300 < sum(len(name) for names in classes.values() for name in names) < 2400
    assert 2000 < total < 2200
    for split, share in (("train", 0.64), ("val", 0.16), ("test", 0.20)):
        assert sizes[split] == pytest.approx(share * total, abs=0.01 * total)


def test_every_character_is_in_one_class(classes):
    characters = [c for names in classes.values() for name in names for c in name]
    assert len(characters) == len(set(characters))
    assert not any(c.isspace() for c in characters)


@pytest.mark.parametrize(
    "alike",
    [
        "A\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}",
        "o\N{GREEK SMALL LETTER OMICRON}\N{CYRILLIC SMALL LETTER O}",
        "K\N{GREEK CAPITAL LETTER KAPPA}\N{CYRILLIC CAPITAL LETTER KA}\N{KELVIN SIGN}",
        "\N{MICRO SIGN}\N{GREEK SMALL LETTER MU}",
        ".\N{MIDDLE DOT}\N{BULLET OPERATOR}",
        "_\N{EN DASH}\N{EM DASH}",
    ],
)
def test_characters_that_look_alike_are_one_class(classes, alike):
    names = [name for names in classes.values() for name in names]
    assert [set(alike) <= set(name) for name in names].count(True) == 1


@pytest.mark.parametrize("different", ["Oo", "1l", "5S", "éè", "E\N{CYRILLIC CAPITAL LETTER ZE}"])
def test_characters_that_differ_are_two_classes(classes, different):
    names = [name for names in classes.values() for name in names]
    assert len({name for name in names for c in different if c in name}) == 2


def test_no_base_letter_is_in_two_splits(classes):
    splits = defaultdict(set)
    count = defaultdict(int)
    for split, names in classes.items():
        for name in names:
            for c in name:
                for form in ("NFD", "NFKD"):
                    parts = unicodedata.normalize(form, c)
                    letters = {p.lower() for p in parts if unicodedata.category(p)[0] in "LN"}
                    if len(letters) == 1:
                        (base,) = letters
                        splits[base].add(split)
                        count[base] += form == "NFKD"
    assert count["a"] > 30
    assert count["\N{GREEK SMALL LETTER OMEGA}"] > 20
    assert [base for base, found in splits.items() if len(found) > 1] == []


def test_no_test_bitmap_looks_like_a_training_bitmap(classes):
    sets = Glyphs()._sets
    pixels = {split: s.images[np.concatenate(s.members)][:, 0] for split, s in sets.items()}
    # One face is enough to see a leak and keeps the comparison short.
    face = {split: x.reshape(-1, 12, 28 * 28)[:, 0].astype(np.int16) for split, x in pixels.items()}
    for one, other in combinations(SPLITS, 2):
        closest = min(np.abs(face[one] - x).max(axis=1).min() for x in face[other])
        assert closest > 255 // 7


def test_classes_and_splits_are_the_same_everywhere(classes):
    text = "\n".join(f"{split} {name}" for split in SPLITS for name in classes[split])
    assert sha256(text.encode()).hexdigest()[:16] == "647201a4a904f8b9"


@pytest.mark.parametrize(
    ("character", "base"),
    [
        ("É", "e"),
        ("\N{GREEK PROSGEGRAMMENI}", "\N{GREEK SMALL LETTER IOTA}"),
        ("\N{LATIN SMALL LIGATURE FI}", "f"),
        ("½", "1"),
        ("\N{KELVIN SIGN}", "k"),
        ("\N{ACUTE ACCENT}", "\N{COMBINING ACUTE ACCENT}"),
        ("+", "+"),
    ],
)
def test_base_letter(character, base):
    assert glyphs._base_letter(character) == base


def test_alike_finds_every_pair_within_the_bound():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, size=(30, 2, 6, 6), dtype=np.uint8)
    images[7, 1] = images[3, 1] + 36  # everywhere as far apart as is allowed
    images[9, 0] = images[4, 0]
    images[9, 0, 0, 0] = images[4, 0, 0, 0] + 37
    brute = [
        (i, j)
        for i, j in combinations(range(30), 2)
        if (np.abs(images[i].astype(int) - images[j]).max(axis=(1, 2)) <= 36).any()
    ]
    assert glyphs._alike(images) == brute == [(3, 7)]


def test_images_are_centred_and_leave_room():
    images = Glyphs()._sets["train"].images
    assert images.dtype == np.uint8
    assert images.shape[1:] == (1, 28, 28)
    inked = np.flatnonzero(images.any(axis=(0, 1, 2)))
    assert (inked[0], inked[-1]) == (4, 23)
    assert images.max() == 255


@pytest.mark.parametrize(("shots", "queries"), [(1, 15), (5, 15), (10, 3), (6, 6)])
def test_no_face_is_in_both_support_and_query(shots, queries):
    family = Glyphs(shots=shots, queries=queries)
    faces = np.arange(12)
    for seed in range(20):
        picked = family._pick(faces, np.random.default_rng(seed))
        support, query = set(picked[:shots]), set(picked[shots:])
        assert len(picked) == shots + queries
        assert not support & query
        assert len(support) == min(shots, 6)
        assert len(query) == min(queries, 12 - len(support))


def test_examples_of_one_face_differ():
    family = Glyphs(ways=2, shots=1, queries=40)
    query = family.sample("train", 0, 1).query_x[0, :40].flatten(1)
    assert len(query.unique(dim=0)) == 40


def test_affine_maps_keep_the_ink_in_the_picture(monkeypatch):
    family = Glyphs(ways=20, shots=1, queries=11)
    moved = family.sample("train", 0, 8).query_x
    monkeypatch.setattr(Glyphs, "_augment", lambda self, x, rngs: x)
    still = family.sample("train", 0, 8).query_x
    ratio = moved.sum((-1, -2)) / still.sum((-1, -2))
    # A scale of 0.9 to 1.1 changes the ink by its square.
    assert ratio.min() > 0.9**2 * 0.95
    assert ratio.max() < 1.1**2 * 1.05
    assert not torch.equal(moved, still)


def test_the_drawing_is_the_same_again():
    folder = glyphs._font_folder()
    characters = ["A", "é", "■"]
    one = glyphs._draw_face(folder / glyphs.FACES[0], characters)
    assert np.array_equal(one, glyphs._draw_face(folder / glyphs.FACES[0], characters))
    assert one.any(axis=(1, 2)).all()


def test_more_ways_than_classes():
    with pytest.raises(InputError, match="ways is 400, but split 'val' of glyphs has"):
        Glyphs(ways=400)


def test_random_affine_maps_have_the_stated_ranges_and_reach_their_ends():
    drawn = glyphs._random_affine(np.random.default_rng(0), 20_000).astype(float)
    a, b, right, c, d, down = drawn.T
    scale = 1 / np.hypot(a, c)
    angle = np.degrees(np.arctan2(c, a))
    shear = (a * b + c * d) * scale**2  # the second column along the first
    pixels = 28 / 2 * np.stack([right, down])
    ranges = ((scale, 0.9, 1.1), (angle, -10, 10), (shear, -0.1, 0.1), (pixels, -1.5, 1.5))
    for values, low, high in ranges:
        room = 0.01 * (high - low)
        assert low - 1e-5 <= values.min() <= low + room
        assert high - room <= values.max() <= high + 1e-5


def test_the_affine_map_that_changes_nothing_shows_the_bitmap_itself(monkeypatch):
    identity = np.float32([1, 0, 0, 0, 1, 0])
    monkeypatch.setattr(glyphs, "_random_affine", lambda rng, count: np.tile(identity, (count, 1)))
    x = torch.rand(1, 2, 3, 1, 28, 28)
    torch.testing.assert_close(glyphs.Glyphs._augment(None, x, [None]), x, rtol=0, atol=1e-5)
