import numpy as np
import pytest

from mirror_opt.errors import InputError
from mirror_opt.fewshot.cache import cache_dir, cached_array, cached_arrays
from mirror_opt.files import atomic_write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRROR_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_place(monkeypatch, tmp_path):
    monkeypatch.delenv("MIRROR_OPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mirror_opt"


@pytest.mark.parametrize("kind", ["array", "arrays"])
def test_built_once_and_again_when_damaged(cache, kind):
    built = []

    def build():
        built.append(1)
        content = np.arange(100)
        return content if kind == "array" else {"content": content, "names": np.array(["ä", "b"])}

    def load():
        found = cached_array("a.npy", build) if kind == "array" else cached_arrays("a.npz", build)
        np.testing.assert_array_equal(found if kind == "array" else found["content"], range(100))

    load()
    load()
    assert len(built) == 1
    (file,) = cache.iterdir()
    for damage in (file.read_bytes()[:-200], b"", b"no array"):
        built.clear()
        file.unlink()
        file.write_bytes(damage)
        load()
        assert len(built) == 1
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["array", "arrays"])
def test_built_again_whatever_byte_of_the_header_is_changed(cache, kind):
    content = np.arange(100)

    def load():
        if kind == "array":
            return cached_array("a.npy", lambda: content)
        return cached_arrays("a.npz", lambda: {"content": content})

    load()
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    # The braces of the array's header, and the archive's flags and offsets.
    for at in range(10, 100) if kind == "array" else range(len(sound) - 80, len(sound)):
        file.write_bytes(sound[:at] + b"(" + sound[at + 1 :])
        found = load()  # where it cannot be read, built again
        np.testing.assert_array_equal(found if kind == "array" else found["content"], content)
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["array", "arrays"])
def test_what_another_has_written_is_not_trusted(cache, kind):
    content = np.arange(100, dtype=np.uint8)

    def load():
        if kind == "array":
            return cached_array("a", lambda: content)
        return cached_arrays("a", lambda: {"content": content})["content"]

    load()
    path = cache / "a"
    changed = bytearray(path.read_bytes())
    if kind == "array":
        changed[-40] ^= 1  # a pixel, of the last eight
    path.write_bytes(changed)
    np.testing.assert_array_equal(load(), content)
    for other in (content[:50], content + 1, content.astype(float)):
        with path.open("wb") as file:
            np.save(file, other) if kind == "array" else np.savez(file, names=other)
        np.testing.assert_array_equal(load(), content)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"new, but not all of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "file/x", "nowhere", "/proc/x"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    monkeypatch.setenv("MIRROR_OPT_CACHE", str(tmp_path / name))
    for cached in (cached_array, cached_arrays):
        with pytest.raises(InputError, match="set MIRROR_OPT_CACHE to a folder that can be writt"):
            cached("a", lambda: pytest.fail("built before the folder is known to be of use"))


def test_cached_arrays_are_mapped_and_read_only(cache):
    for _ in range(2):
        array = cached_array("x.npy", lambda: np.arange(3))
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
