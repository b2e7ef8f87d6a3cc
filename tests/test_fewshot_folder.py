import errno
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import encode, noise
from PIL import Image

from mirror_opt.errors import InputError
from mirror_opt.fewshot import ImageFolder

SMALL = {"ways": 3, "shots": 2, "queries": 3}


def same_tasks(one, other):
    return all(
        torch.equal(x, y)
        for split in ("train", "val", "test")
        for x, y in zip(one.sample(split, 0, 3), other.sample(split, 0, 3), strict=True)
    )


@pytest.fixture
def folder(image_folder, tmp_path):
    r"""A copy of the split folders, to be changed."""
    return shutil.copytree(image_folder, tmp_path / "data")


@pytest.fixture
def flat(image_folder, tmp_path):
    r"""The same images with all class folders side by side in ``images``."""
    root = tmp_path / "data"
    for split in ("train", "val", "test"):
        shutil.copytree(image_folder / split, root / "images", dirs_exist_ok=True)
    return root


def pack(source, target, prefix=""):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(source.rglob("*.*")):
            archive.write(path, f"{prefix}{path.relative_to(source)}")


def test_split_folders(image_folder):
    family = ImageFolder(**SMALL, data_dir=image_folder)
    assert family.input_shape == (3, 16, 16)
    for split in family.splits:
        assert family.classes(split) == tuple(f"{split}-{label}" for label in range(6))


@pytest.mark.parametrize("prefix", [True, False])
def test_zip_files_of_folders(image_folder, tmp_path, prefix):
    for split in ("train", "val", "test"):
        pack(image_folder / split, tmp_path / f"{split}.zip", f"{split}/" if prefix else "")
    family = ImageFolder(**SMALL, data_dir=tmp_path)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_split_file_of_classes(flat, image_folder, zipped):
    splits = {s: [f"{s}-{label}" for label in range(6)] for s in ("train", "val", "test")}
    (flat / "splits.json").write_text(json.dumps(splits))
    if zipped:
        pack(flat / "images", flat / "images.zip")
        shutil.rmtree(flat / "images")
    family = ImageFolder(**SMALL, data_dir=flat)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


def write_lists(root, folder):
    for split in ("train", "val", "test"):
        rows = [
            f"{split}-{label}/{image}.png,{split}-{label}"
            for label in range(6)
            for image in range(8)
        ]
        (root / f"{split}.csv").write_text("filename,label\n" + "\n".join(rows) + "\n")


def test_lists_of_images(flat, image_folder):
    write_lists(flat, "images")
    family = ImageFolder(**SMALL, data_dir=flat)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


def test_pixels_are_those_of_the_files(tmp_path):
    rng = np.random.default_rng(1)
    pictures = {}
    for split in ("train", "test"):
        for label in "abc":
            (tmp_path / split / f"{split}{label}").mkdir(parents=True)
            for image in range(2):
                pixels = rng.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
                pictures[pixels.tobytes()] = f"{split}{label}"
                file = tmp_path / split / f"{split}{label}" / f"{image}.png"
                file.write_bytes(encode(pixels))
    family = ImageFolder(ways=3, shots=1, queries=1, data_dir=tmp_path)
    assert family.splits == ("train", "test")
    for split in family.splits:
        s_x, _, q_x, _ = family.sample(split, 0, 1)
        for s, q in zip(s_x[0], q_x[0], strict=True):
            found = [
                pictures.pop((x * 255).round().byte().permute(1, 2, 0).numpy().tobytes())
                for x in (s, q)
            ]
            assert found[0] == found[1]
            assert found[0].startswith(split)
    assert not pictures


def test_image_size_and_grey(folder):
    assert ImageFolder(**SMALL, data_dir=folder, image_size=20).input_shape == (3, 20, 20)
    for label in range(6):
        first = folder / "train" / f"train-{label}" / "0.png"
        first.write_bytes(noise(np.random.default_rng(0), 90, 200))
    family = ImageFolder(**SMALL, data_dir=folder)
    assert family.input_shape == (1, 84, 84)
    assert family.sample("test", 0, 1).query_x.shape == (1, 9, 1, 84, 84)


def test_a_grey_image_among_those_in_colour(folder):
    first = folder / "train" / "train-0" / "0.png"
    Image.open(first).convert("L").save(first)
    assert ImageFolder(**SMALL, data_dir=folder).input_shape == (3, 16, 16)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
INK = np.zeros((64, 64, 4), dtype=np.uint8)  # black, on what lets everything through
INK[:32, :, 3] = 255


@pytest.mark.parametrize(
    ("name", "image", "mean"),
    [
        ("16.png", Image.fromarray(RAMP.astype(np.uint16)), 0.5),
        ("16.tif", Image.fromarray(RAMP.astype(np.uint16)), 0.5),
        ("12-of-16.png", Image.fromarray((RAMP / 16).astype(np.uint16)), 0.5 / 16),
        ("alpha.png", Image.fromarray(INK), 0.5),
        ("grey-alpha.png", Image.fromarray(INK).convert("LA"), 0.5),
        ("palette.png", Image.fromarray(INK).convert("P"), 0.5),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_of_other_kinds(folder, name, image, mean):
    for path in folder.glob("test/*/*.png"):
        path.unlink()
        image.save(path.with_name(f"{path.stem}-{name}"))
    x = ImageFolder(**SMALL, data_dir=folder).sample("test", 0, 1).query_x
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.max().item() == pytest.approx(2 * mean, abs=0.03)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range(folder, dtype):
    path = folder / "test" / "test-0" / "wide.tif"
    Image.fromarray((RAMP / 65535).astype(dtype)).save(path)
    with pytest.raises(InputError, match=r"wide.tif: pixels of mode . have no known range"):
        ImageFolder(**SMALL, data_dir=folder).sample("test", 0, 1)


def test_other_files_are_passed_over(folder, image_folder):
    (folder / "train" / "train-0" / "notes.txt").write_text("no image")
    (folder / "train" / "train-0" / ".hidden.png").write_text("no image")
    (folder / "readme.png").write_bytes(b"in no class")
    family = ImageFolder(**SMALL, data_dir=folder)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


def test_a_changed_image_is_read_again(folder):
    before = ImageFolder(**SMALL, data_dir=folder)
    for path in folder.glob("test/*/*.png"):
        path.write_bytes(encode(np.zeros((16, 16, 3), dtype=np.uint8)))
    after = ImageFolder(**SMALL, data_dir=folder)
    assert before.sample("test", 0, 1).query_x.max() > 0
    assert after.sample("test", 0, 1).query_x.max() == 0


def test_the_fingerprint_is_of_the_content(folder, image_folder, tmp_path):
    def fingerprint(root):
        found = ImageFolder(**SMALL, data_dir=root).fingerprint
        assert len(found) == 12
        return found

    assert fingerprint(folder) == fingerprint(image_folder)
    image = folder / "val" / "val-1" / "3.png"
    (tmp_path / "zip").mkdir()
    for split in ("train", "val", "test"):
        pack(folder / split, tmp_path / "zip" / f"{split}.zip")
    assert fingerprint(tmp_path / "zip") == fingerprint(image_folder)
    os.utime(image, (0, 0))
    assert fingerprint(folder) == fingerprint(image_folder)
    first, second = (encode(np.full((16, 16, 3), grey, np.uint8), "BMP") for grey in (1, 2))
    assert len(first) == len(second)
    image.write_bytes(first)
    one = fingerprint(folder)
    image.write_bytes(second)
    assert len({one, fingerprint(folder), fingerprint(image_folder)}) == 3


def test_the_fingerprint_is_of_the_split_too(flat):
    found = set()
    for last in ("train", "test"):
        named = {
            split: [f"{split}-{label}" for label in range(5)] for split in ("train", "val", "test")
        }
        named[last].append("val-5")
        (flat / "splits.json").write_text(json.dumps(named))
        found.add(ImageFolder(**SMALL, data_dir=flat).fingerprint)
    assert len(found) == 2


def test_absent_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MIRROR_OPT_DATA", raising=False)
    with pytest.raises(InputError, match=r"pass it as data_dir \(--data-dir\) or MIRROR_OPT_DATA"):
        ImageFolder()
    with pytest.raises(InputError, match="none is no folder: pass one"):
        ImageFolder(data_dir=tmp_path / "none")


def test_folders_around_that_of_a_zip_file(image_folder, tmp_path):
    for split in ("train", "val", "test"):
        pack(image_folder / split, tmp_path / f"{split}.zip", f"set/{split}/")
    family = ImageFolder(**SMALL, data_dir=tmp_path)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


@pytest.mark.parametrize("name", ["valid", "validation"])
@pytest.mark.parametrize("suffix", ["", ".csv", ".zip"])
def test_another_name_for_val(folder, name, suffix):
    (folder / "val").rename(folder / f"{name}{suffix}")
    with pytest.raises(InputError, match=f"{name}{suffix} would not be read: name it val{suffix}"):
        ImageFolder(**SMALL, data_dir=folder)


def test_missing_split(folder):
    shutil.rmtree(folder / "val")
    family = ImageFolder(**SMALL, data_dir=folder)
    with pytest.raises(InputError, match="no split 'val' in folder: choose from train, test"):
        family.sample("val", 0, 1)
    shutil.rmtree(folder / "test")
    with pytest.raises(InputError, match=r"no split 'test' in .* test.zip, .* it holds train"):
        ImageFolder(**SMALL, data_dir=folder)


def test_a_class_in_two_splits(folder):
    shutil.copytree(folder / "train" / "train-3", folder / "test" / "train-3")
    with pytest.raises(InputError, match=r"class 'train-3' .* is in both train and test"):
        ImageFolder(**SMALL, data_dir=folder)


def test_a_class_with_too_few_images(folder):
    for image in range(5):
        (folder / "val" / "val-2" / f"{image}.png").unlink()
    message = (
        "class 'val-2' in split 'val' of folder has 3 images, but 2 shots and 3 queries need 5"
    )
    with pytest.raises(InputError, match=message):
        ImageFolder(**SMALL, data_dir=folder)


def test_more_ways_than_classes(folder):
    shutil.rmtree(folder / "val" / "val-0")
    with pytest.raises(InputError, match="ways is 6, but split 'val' of folder has 5 classes"):
        ImageFolder(ways=6, shots=1, queries=1, data_dir=folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
@pytest.mark.parametrize("label", ["train-0", "train-4"])
def test_an_unreadable_image_is_named(folder, damage, label):
    path = folder / "train" / label / "0.png"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"no image"}[damage])
    with pytest.raises(InputError, match=f"cannot read the image {path}: .*; mend it") as caught:
        ImageFolder(**SMALL, data_dir=folder)
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_in_a_zip_file_is_named(folder):
    (folder / "test" / "test-1" / "7.png").write_bytes(b"no image")
    pack(folder / "test", folder / "test.zip")
    shutil.rmtree(folder / "test")
    with pytest.raises(InputError, match=r"cannot read the image test-1/7.png in .*test.zip: no"):
        ImageFolder(**SMALL, data_dir=folder)


def test_a_damaged_zip_file(folder):
    (folder / "val.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cannot read the zip file .*val.zip"):
        ImageFolder(**SMALL, data_dir=folder)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def with_notes(folder):
    empty(folder)
    (folder / "notes.txt").write_text("no image")


@pytest.mark.parametrize("change", [empty, with_notes])
@pytest.mark.parametrize("place", ["train/train-2", "test/test-0", "val/of/a/kind"])
def test_a_class_folder_without_images_is_named(folder, place, change):
    (folder / place).mkdir(parents=True, exist_ok=True)
    change(folder / place)
    with pytest.raises(InputError, match=f"there is no image in {folder / place}: put some into"):
        ImageFolder(**SMALL, data_dir=folder)


def test_an_empty_split_folder_is_named(folder):
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    with pytest.raises(InputError, match=f"there is no image in {folder / 'test'}: put some into"):
        ImageFolder(**SMALL, data_dir=folder)


def test_a_class_without_images_in_a_zip_file_is_named(folder):
    pack(folder / "test", folder / "test.zip")
    shutil.rmtree(folder / "test")
    with zipfile.ZipFile(folder / "test.zip", "a") as archive:
        archive.writestr("test-8/", "")
    with pytest.raises(InputError, match=f"there is no image in {folder / 'test' / 'test-8'}: put"):
        ImageFolder(**SMALL, data_dir=folder)


def test_folders_of_other_things_are_passed_over(folder, image_folder):
    (folder / "lost+found").mkdir()
    (folder / "broken.zip").write_bytes(b"no archive")
    for place in ("train/train-0/notes", "train/.hidden", "test/__MACOSX"):
        (folder / place).mkdir()
        (folder / place / "notes.txt").write_text("no image")
    (folder / "train" / ".#lock").symlink_to("nowhere")
    family = ImageFolder(**SMALL, data_dir=folder)
    assert same_tasks(family, ImageFolder(**SMALL, data_dir=image_folder))


@pytest.fixture
def locked(monkeypatch):
    r"""Makes a folder unreadable, even for a superuser, whom permissions do not stop."""
    scan = os.scandir

    def lock(folder):
        def refuse(path):
            if str(path) == str(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return lock


@pytest.mark.parametrize("place", ["train", "train/train-1", "val/val-5"])
def test_an_unreadable_folder_is_named(folder, locked, place):
    locked(folder / place)
    with pytest.raises(InputError, match=f"cannot read the folder {folder / place}: Permission"):
        ImageFolder(**SMALL, data_dir=folder)


def test_an_unreadable_folder_of_listed_images_is_named(flat, locked):
    write_lists(flat, "images")
    locked(flat / "images" / "val-3")
    with pytest.raises(InputError, match=r"cannot read the folder .*images/val-3: Permission"):
        ImageFolder(**SMALL, data_dir=flat)


@pytest.mark.parametrize("name", ["train-1", "train-2/0.png", "train-9"])
def test_a_link_that_leads_nowhere_is_named(folder, name):
    path = folder / "train" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")
    with pytest.raises(InputError, match=f"cannot read {path}: No such file or directory; mend"):
        ImageFolder(**SMALL, data_dir=folder)


def test_folders_that_hold_each_other(folder):
    (folder / "train" / "train-0" / "again").symlink_to(folder / "train")
    with pytest.raises(InputError, match=r"cannot read .*/again: Too many levels"):
        ImageFolder(**SMALL, data_dir=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read .*splits.json"),
        ("[]", "write a JSON object with a list of classes for each of train, val, test"),
        ('{"train": ["train-0", "cat"]}', "names class 'cat', but there is no image in"),
        ('{"train": ["train-0"]}', "no split 'test'"),
        ('{"train": ["train-0"], "valid": []}', "cannot read .*: it has 'valid'; write a JSON"),
        ('{"train": "train-0"}', "cannot read .*: 'train-0' is no list; write a JSON object with"),
        ('{"train": {"train-0": 1}}', "cannot read .*: {'train-0': 1} is no list"),
        ('{"train": ["train-0", "train-0"]}', "names class 'train-0' in train twice: leave one"),
    ],
)
def test_bad_split_file(flat, text, message):
    (flat / "splits.json").write_text(text)
    with pytest.raises(InputError, match=message):
        ImageFolder(**SMALL, data_dir=flat)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,class\na,b\n", "train.csv, line 2: no filename or no label"),
        ("filename,label\ntrain-0/0.png\n", "train.csv, line 2: no filename or no label"),
        ("filename,label\nnone.png,a\n", "train.csv, line 2: no image 'none.png'"),
        (
            "filename,label\ntrain-0/0.png,a\ntrain-0/0.png,b\n",
            "train.csv, line 3: 'train-0/0.png' is listed twice",
        ),
        ("filename,label\ntest-0/0.png,a\n", "test.csv, line 2: 'test-0/0.png' is listed twice"),
    ],
)
def test_bad_lists(flat, text, message):
    write_lists(flat, "images")
    (flat / "train.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        ImageFolder(**SMALL, data_dir=flat)


def test_lists_with_a_byte_order_mark(flat, image_folder):
    write_lists(flat, "images")
    plain = ImageFolder(**SMALL, data_dir=flat)
    for path in flat.glob("*.csv"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert same_tasks(ImageFolder(**SMALL, data_dir=flat), plain)


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_bad_image_size(image_folder, size):
    with pytest.raises(InputError, match=f"image_size is {size}"):
        ImageFolder(**SMALL, data_dir=image_folder, image_size=size)


@pytest.mark.data
def test_the_real_cifar_fs(data_root):
    family = ImageFolder(data_dir=data_root / "cifar-fs", shots=5)
    assert {s: len(family.classes(s)) for s in family.splits} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert family.input_shape == (3, 32, 32)
    assert {len(m) for s in family._sets.values() for m in s.members} == {600}
    # The pixels are those of the file, not resized.
    chosen = family._sets["val"]
    with zipfile.ZipFile(data_root / "cifar-fs" / "val.zip") as archive:
        name = sorted(archive.namelist())[0]
        with archive.open(name) as file:
            pixels = np.asarray(Image.open(file).convert("RGB"))
    assert name.split("/")[1] == chosen.names[0]
    assert np.array_equal(chosen.images[0].transpose(1, 2, 0), pixels)
