"""Damage to a run's checkpoint, bit by bit, and files that would run code."""

import errno
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from runs_cases import RECOVERY

from mirror_opt.errors import InputError
from mirror_opt.runs import checkpoint

STATE = {
    "config": {"task": "sinusoid", "horizon": (5, 10), "data_dir": None},
    "data": None,
    "iteration": 2,
    "learner": OrderedDict(weight=torch.arange(6.0).view(2, 3).bfloat16()),
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    "recovery": RECOVERY,
    "losses": torch.tensor([2.0, float("nan")], dtype=torch.float64),
    "seconds": 0.5,
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def refusal(path: Path) -> str:
    """What is said of a file that cannot be loaded."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def flipped(data: bytes, at: int) -> bytes:
    """With one bit of the byte at this place changed, at every place another."""
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def places(data: bytes) -> list[int]:
    """Some bytes of the records, and all of the directory, which tells where everything is."""
    directory = data.index(b"PK\1\2")
    return [*range(0, directory, 5), *range(directory, len(data))]


def test_the_file_is_an_archive_that_torch_opens(path):
    whole = {"format": "mirror_opt.run", "version": checkpoint.VERSION, **STATE}
    assert repr(checkpoint.load(path)) == repr(whole)
    assert repr(torch.load(path, weights_only=True)) == repr(whole)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"mirror_opt.run sha256 ")


def test_no_flipped_bit_goes_unnoticed(path):
    data = path.read_bytes()
    for at in places(data):
        path.write_bytes(flipped(data, at))
        assert "damaged" in refusal(path)
    path.write_bytes(data)
    assert checkpoint.load(path)["iteration"] == 2


def test_no_cut_and_no_addition_goes_unnoticed(path):
    data = path.read_bytes()
    for keep in [*range(0, len(data), 13), *range(len(data) - 120, len(data))]:
        path.write_bytes(data[:keep])
        assert "damaged" in refusal(path)
    for changed in (data + b"\0", data + data, data[1:], b"\0" + data, bytes(len(data))):
        path.write_bytes(changed)
        assert "damaged" in refusal(path)


def test_another_version_is_named(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    assert "version 1, this mirror_opt reads 2; use the mirror_opt that wrote it" in refusal(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"version": torch.tensor([1, 1])},
        {"version": "1"},
        {"version": None},
        {"format": torch.ones(2)},
        {"format": "mirror_opt.dataset"},
        {"losses": [2.0, 1.0]},
        {"iteration": "2"},
        {"recovery": None},
        {"recovery": {}},
        {"recovery": STATE["recovery"] | {"rate": math.nan}},
        {"recovery": STATE["recovery"] | {"rate": 0.0}},
        {"recovery": STATE["recovery"] | {"means": (1.0,)}},
        {"recovery": STATE["recovery"] | {"variances": (math.inf, 1.0)}},
        {"recovery": STATE["recovery"] | {"kept": [(1, (0.0, 0.0), (0.0, 0.0), {})]}},
        {"iteration": -1},
        {"iteration": 3},
        {"losses": STATE["losses"][:, None]},
        {"losses": STATE["losses"].cfloat()},
        {"losses": STATE["losses"].to_sparse()},
        {"losses": STATE["losses"] + math.inf},
        {"seconds": math.nan},
        {"seconds": -1.0},
    ],
    ids=str,
)
def test_fields_that_no_run_saves_are_refused(path, changed):
    checkpoint.save(path, {**STATE, **changed})
    assert "damaged" in refusal(path)


def test_a_file_without_its_digest_is_refused(path):
    torch.save({"format": "mirror_opt.run", "version": checkpoint.VERSION, **STATE}, path)
    assert "damaged" in refusal(path)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("how", ["sealed", "torch", "legacy", "pickle"])
def test_code_in_a_file_does_not_run(path, tmp_path, how):
    marker = tmp_path / "ran"
    content = {**STATE, "recovery": {"kept": [Payload(marker)]}}
    whole = {"format": "mirror_opt.run", "version": checkpoint.VERSION, **content}
    if how == "sealed":  # its digest is right
        checkpoint.save(path, content)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(whole))
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=how == "torch")
    assert "damaged" in refusal(path)
    assert not marker.exists()
    # It would have run.
    pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_file_that_cannot_be_read_is_named(path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # without a name, as read() raises it

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        checkpoint.load(path)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
