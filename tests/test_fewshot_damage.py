"""Damaged zip files and images: an error that names the file, whatever the damage."""

import random
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import encode

from mirror_opt.errors import InputError
from mirror_opt.fewshot import ImageFolder, Omniglot
from mirror_opt.fewshot.images import inspect, list_images, read_images

METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def picture(seed, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return encode(pixels, format)


def archive(names, method=zipfile.ZIP_STORED):
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for seed, name in enumerate(names):
            file.writestr(name, picture(seed))
    return bytearray(buffer.getvalue())


def read(root):
    """All images below a folder; or the line, naming a file there, that they are refused with."""
    try:
        files = list(list_images(root, whole=True).values())
        for file in files:
            inspect([file])
        return read_images(files, 4, 3)
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    assert str(root) in line
    return line


@pytest.mark.parametrize("method", METHODS)
def test_changed_bytes_in_a_zip_file(tmp_path, method):
    names = [f"train/apple/{i}.png" for i in range(2)]
    sound = archive(names, METHODS[method])
    path = tmp_path / "train.zip"
    path.write_bytes(sound)
    expected = read(tmp_path)
    assert expected.shape == (2, 3, 4, 4)
    dice = random.Random(method)
    refused = 0
    for _ in range(150):
        damaged = bytearray(sound)
        for _ in range(dice.choice([1, 1, 3])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        if dice.random() < 0.1:
            del damaged[dice.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        found = read(tmp_path)
        refused += isinstance(found, str)
        if not isinstance(found, str) and len(found) == 2:
            assert np.array_equal(found, expected)  # the checksums see to that
    assert refused > 50


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_changed_bytes_in_an_image(tmp_path, format):
    sound = picture(0, format)
    path = tmp_path / f"1.{format.lower()}"
    dice = random.Random(format)
    refused = 0
    for _ in range(60):
        damaged = bytearray(sound)
        for _ in range(dice.choice([1, 2, 4])):
            damaged[dice.randrange(min(100, len(damaged)))] = dice.randrange(256)
        path.write_bytes(damaged)
        refused += isinstance(read(tmp_path), str)
    assert refused > 5


# Where a field lies in a member's entry of the central directory.
FLAGS, COMPRESSION, OFFSET = 8, 10, 42


def patch(data, at, value):
    """Sets a field in the first entry of the central directory."""
    data[data.index(b"PK\x01\x02") + at] = value
    return data


@pytest.fixture(params=["folder", "omniglot"])
def data(request, tmp_path):
    """(folder, zip file, names in it, what makes the tasks) of a family."""
    if request.param == "folder":
        (tmp_path / "test" / "pear").mkdir(parents=True)
        (tmp_path / "test" / "pear" / "1.png").write_bytes(picture(9))
        return tmp_path, tmp_path / "train.zip", "train/apple", ImageFolder
    (tmp_path / "images_evaluation" / "Greek" / "character01").mkdir(parents=True)
    (tmp_path / "images_evaluation" / "Greek" / "character01" / "1.png").write_bytes(picture(9))
    part = "images_background"
    return tmp_path, tmp_path / f"{part}.zip", f"{part}/Latin/character01", background


def background(**options):
    return Omniglot(split="background", rotations=False, **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: patch(data, FLAGS, 1), "is encrypted; pack the zip file again"),
        (lambda data: patch(data, COMPRESSION, 99), "compression method is not supported"),
        (lambda data: patch(data, OFFSET, 7), "cannot read the "),
        (lambda data: patch(data, 0, 0), "central directory; fetch it again"),
        (lambda data: data[:-30], "cannot read the zip file"),
        (lambda data: bytearray(), "cannot read the zip file"),
    ],
)
def test_odd_headers(data, change, says):
    root, path, place, family = data
    path.write_bytes(change(archive([f"{place}/{i}.png" for i in range(2)])))
    with pytest.raises(InputError, match=says) as caught:
        family(ways=2, shots=1, queries=1, data_dir=root)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../apple/1.png", "apple/../../1.png", "..\\apple\\1.png"])
def test_names_that_lead_out_of_a_zip_file(data, name):
    root, path, _, family = data
    path.write_bytes(archive([name]))
    with pytest.raises(InputError, match="outside of itself; pack it again") as caught:
        family(ways=2, shots=1, queries=1, data_dir=root)
    assert f"the zip file {path} has the member {name!r}" in str(caught.value)


def test_names_as_other_programs_write_them(tmp_path):
    names = ["./train/apple/1.png", "train\\apple\\2.png", "/train/apple/3.png", "apple/4.png"]
    (tmp_path / "train.zip").write_bytes(archive(names))
    found = list_images(Path(tmp_path))
    assert list(found) == [f"train/apple/{i}.png" for i in range(1, 5)]
    assert read_images(list(found.values()), 4, 3).shape == (4, 3, 4, 4)
