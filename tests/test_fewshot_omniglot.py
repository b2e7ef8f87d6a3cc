import threading
import zipfile
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import encode
from PIL import Image

from mirror_opt.errors import InputError
from mirror_opt.fewshot import Omniglot, omniglot

SMALL = {"ways": 5, "shots": 1, "queries": 1}


def characters(family, split):
    return {name.split(" turned")[0] for name in family.classes(split)}


def test_standard_split(omniglot_folder):
    family = Omniglot(**SMALL, data_dir=omniglot_folder)
    assert family.splits == ("train", "test")
    assert {s: len(family.classes(s)) for s in family.splits} == {"train": 4800, "test": 1692}
    assert len(characters(family, "train")) == 1200
    assert len(characters(family, "test")) == 423
    assert not characters(family, "train") & characters(family, "test")
    with pytest.raises(InputError, match=r"no split 'val' .* pass validation=N"):
        family.sample("val", 0, 1)


def test_validation_characters_come_out_of_the_training_ones(omniglot_folder):
    whole = Omniglot(**SMALL, data_dir=omniglot_folder)
    family = Omniglot(**SMALL, data_dir=omniglot_folder, validation=100, rotations=False)
    sizes = {s: len(family.classes(s)) for s in family.splits}
    assert sizes == {"train": 1100, "val": 100, "test": 423}
    assert family.classes("train") + family.classes("val") == whole.classes("train")[:1200]
    assert family.classes("test") == whole.classes("test")[:423]


def test_background_split(omniglot_folder):
    family = Omniglot(**SMALL, data_dir=omniglot_folder, split="background", rotations=False)
    assert len(family.classes("train")) == 964
    assert len(family.classes("test")) == 659
    assert all(name.startswith("background-") for name in family.classes("train"))
    assert all(name.startswith("evaluation-") for name in family.classes("test"))


def test_a_seed_changes_the_tasks_but_not_the_split(omniglot_folder):
    one, other = (Omniglot(**SMALL, data_dir=omniglot_folder, seed=seed) for seed in (0, 1))
    assert one.classes("test") == other.classes("test")
    assert not torch.equal(one.sample("test", 0, 1).query_x, other.sample("test", 0, 1).query_x)


def test_folders_are_read_as_the_zip_files_are(omniglot_folder, tmp_path):
    for path in omniglot_folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path)
    one, other = (Omniglot(**SMALL, data_dir=place) for place in (omniglot_folder, tmp_path))
    for x, y in zip(one.sample("test", 0, 4), other.sample("test", 0, 4), strict=True):
        assert torch.equal(x, y)
    assert one.fingerprint == other.fingerprint


def test_ink_is_one(tmp_path):
    page = np.full((105, 105), 255, dtype=np.uint8)
    page[:50] = 0
    drawing = encode(np.asarray(Image.fromarray(page).convert("1")))
    for part in ("images_background", "images_evaluation"):
        for c in range(2):
            folder = tmp_path / part / "Alphabet" / f"character{c:02}"
            folder.mkdir(parents=True)
            for name in ("a.png", "b.png"):
                (folder / name).write_bytes(drawing)
    options = {"ways": 2, "shots": 1, "queries": 1, "data_dir": tmp_path}
    family = Omniglot(**options, split="background", rotations=False)
    x = family.sample("train", 0, 1).support_x[0, 0, 0]
    assert x.shape == (28, 28)
    assert x[:9].min() == 1
    assert x[17:].max() == 0  # past the ringing of the edge
    with pytest.raises(InputError, match="found 4 characters of Omniglot, but split 'standard'"):
        Omniglot(**options)


def test_where_the_data_is_looked_for(omniglot_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MIRROR_OPT_DATA", raising=False)
    with pytest.raises(InputError, match=r"no images_background.zip .* pass their folder as"):
        Omniglot(**SMALL)
    with pytest.raises(InputError, match=str(tmp_path)):
        Omniglot(**SMALL, data_dir=tmp_path)
    (tmp_path / "omniglot").symlink_to(omniglot_folder)
    assert Omniglot(**SMALL, data_dir=tmp_path).ways == 5
    monkeypatch.setenv("MIRROR_OPT_DATA", str(tmp_path))
    assert Omniglot(**SMALL).ways == 5


@pytest.mark.parametrize("validation", [-1, 1200, "many"])
def test_validation_out_of_range(omniglot_folder, validation):
    with pytest.raises(InputError, match=f"validation is {validation}: .* 1200 training"):
        Omniglot(**SMALL, data_dir=omniglot_folder, validation=validation)


def test_rotations_that_are_neither_true_nor_false(omniglot_folder):
    with pytest.raises(InputError, match="rotations is 'no': pass True or False"):
        Omniglot(**SMALL, data_dir=omniglot_folder, rotations="no")


def test_a_character_without_drawings(omniglot_folder, tmp_path):
    for path in omniglot_folder.glob("*.zip"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    empty = tmp_path / "images_evaluation" / "Greek" / "character09"
    empty.mkdir(parents=True)
    with pytest.raises(InputError, match=f"there is no image in {empty}"):
        Omniglot(**SMALL, data_dir=tmp_path)


def test_other_files_beside_the_data_are_not_looked_at(omniglot_folder, tmp_path):
    for path in omniglot_folder.glob("*.zip"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "other.zip").write_bytes(b"no archive")
    assert Omniglot(**SMALL, data_dir=tmp_path).ways == 5


def test_unknown_split(omniglot_folder):
    with pytest.raises(InputError, match="split is 'alphabet'"):
        Omniglot(**SMALL, data_dir=omniglot_folder, split="alphabet")


def test_more_drawings_than_there_are(omniglot_folder):
    with pytest.raises(InputError, match="has 2 images, but 1 shots and 15 queries need 16"):
        Omniglot(data_dir=omniglot_folder)


def test_a_zip_file_that_is_none(tmp_path):
    for part in ("images_background", "images_evaluation"):
        (tmp_path / f"{part}.zip").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"cannot read the zip file .*images_background.zip"):
        Omniglot(**SMALL, data_dir=tmp_path)


@pytest.fixture
def server(omniglot_folder, monkeypatch):
    r"""Serves the small zip files; ``server.cut`` bytes are left out of each answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = omniglot_folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - self.server.cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.cut = 0
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(omniglot, "SOURCE", f"http://127.0.0.1:{httpd.server_port}")
        sums = {p.name: md5(p.read_bytes()).hexdigest() for p in omniglot_folder.glob("*.zip")}
        monkeypatch.setattr(omniglot, "CHECKSUMS", sums)
        yield httpd
        httpd.shutdown()
        thread.join()


def test_download(server, omniglot_folder, tmp_path):
    place = tmp_path / "new" / "omniglot"
    family = Omniglot(**SMALL, data_dir=place, download=True)
    assert len(family.classes("test")) == 1692
    for path in omniglot_folder.glob("*.zip"):
        assert (place / path.name).read_bytes() == path.read_bytes()
    assert len(list(place.iterdir())) == 2
    server.cut = 1  # files that are there are not fetched again
    omniglot.download(place)


def test_download_without_a_folder_goes_to_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MIRROR_OPT_DATA", raising=False)
    monkeypatch.setenv("MIRROR_OPT_CACHE", str(tmp_path))
    Omniglot(**SMALL, download=True)
    assert (tmp_path / "omniglot" / "images_background.zip").is_file()
    assert Omniglot(**SMALL).ways == 5


def test_download_with_another_checksum(server, tmp_path):
    sums = dict.fromkeys(omniglot.CHECKSUMS, "0" * 32)
    with pytest.raises(InputError, match=r"has the MD5 sum [0-9a-f]{32} instead of 0{32}; try"):
        omniglot.download(tmp_path, checksums=sums)
    assert list(tmp_path.iterdir()) == []


def test_download_that_breaks_off(server, tmp_path):
    server.cut = 1000
    with pytest.raises(InputError, match=r"broke off after [0-9]+ of [0-9]+ bytes; try again"):
        omniglot.download(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_of_what_is_not_there(server, tmp_path):
    with pytest.raises(InputError, match=r"cannot download .*images_none.zip.* 404"):
        omniglot.download(tmp_path, checksums={"images_none.zip": "0" * 32})
    with pytest.raises(InputError, match=r"cannot download .* refused"):
        omniglot.download(tmp_path, source="http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.data
def test_the_real_omniglot(data_root):
    family = Omniglot(data_dir=data_root, shots=5, validation=100, rotations=False)
    sizes = {s: len(family.classes(s)) for s in family.splits}
    assert sizes == {"train": 1100, "val": 100, "test": 423}
    assert {len(m) for s in family._sets.values() for m in s.members} == {20}
    assert len({name.split("/")[0] for s in family.splits for name in family.classes(s)}) == 50
    background = Omniglot(data_dir=data_root, split="background")
    assert len(background.classes("train")) == 4 * 964
    assert len(background.classes("test")) == 4 * 659
    ink = family.sample("train", 0, 8).support_x.mean()
    assert 0.02 < ink < 0.25  # strokes are light on a dark ground
