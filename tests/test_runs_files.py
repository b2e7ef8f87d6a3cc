"""A run's files: written whole or not at all; refused, with their name, when they are damaged."""

import errno
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from runs_cases import RECOVERY

from mirror_opt.errors import InputError
from mirror_opt.files import atomic_write
from mirror_opt.runs import checkpoint, directory
from mirror_opt.runs.lock import LOCK, writing

STATE = {
    "config": {"task": "sinusoid"},
    "data": None,
    "iteration": 2,
    "learner": {"weight": torch.arange(6.0).view(2, 3)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    "recovery": RECOVERY,
    "losses": torch.tensor([2.0, 1.0], dtype=torch.float64),
    "seconds": 0.5,
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_checkpoint_round_trip(path):
    state = checkpoint.load(path)
    assert state["version"] == checkpoint.VERSION
    assert state["iteration"] == 2
    assert torch.equal(state["learner"]["weight"], STATE["learner"]["weight"])
    assert torch.equal(state["losses"], STATE["losses"])
    assert state["optimizer"]["param_groups"] == [{"lr": 0.1}]


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoint(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(path, "damaged")


def test_one_flipped_bit_in_a_tensor(path):
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        # 24 bytes of float32: the weight of STATE.
        entry = next(info for info in archive.infolist() if info.file_size == 24)
    header = entry.header_offset
    start = (
        header
        + 30
        + sum(int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28))
    )
    assert bytes(data[start : start + 24]) == STATE["learner"]["weight"].numpy().tobytes()
    data[start + 7] ^= 1
    path.write_bytes(data)
    refused(path, "damaged")


def test_checkpoint_that_would_run_code(path):
    torch.save({"format": "mirror_opt.run", "version": checkpoint.VERSION, "run": os.system}, path)
    refused(path, "damaged")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"weight": torch.zeros(2)},
        {"format": "mirror_opt.run", "version": checkpoint.VERSION, **STATE, "losses": None},
        {"format": "mirror_opt.run", "version": checkpoint.VERSION, "config": {}},
    ],
)
def test_file_of_something_else(path, content):
    torch.save(content, path)
    refused(path, "damaged, or no checkpoint")


def test_absent_checkpoint(tmp_path):
    refused(tmp_path / "checkpoint.pt", "no checkpoint there")


def test_state_of_another_model():
    with pytest.raises(InputError, match=r"a\.pt: a checkpoint of another model") as caught:
        checkpoint.restore("a.pt", torch.nn.Linear(2, 3), {"weight": torch.zeros(4, 4)}, "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    target = tmp_path / "results.json"
    directory.write_json(target, ["old"])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space") as caught:
            directory.write_json(target, ["new"])
    assert caught.value.filename == str(target)
    assert json.loads(target.read_text()) == ["old"]
    assert os.listdir(tmp_path) == ["results.json"]


def test_each_writer_has_a_temporary_file_of_its_own(tmp_path):
    path = tmp_path / "results.json"
    with atomic_write(path) as first:
        directory.write_json(path, [1, {"b": None}])
        first.write(b"[2]")
        assert directory.read_json(path, list) == [1, {"b": None}]
    assert directory.read_json(path, list) == [2]
    assert os.listdir(tmp_path) == ["results.json"]


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "run"
    with writing(out):
        with pytest.raises(InputError, match=f"{out}: another run is writing there"), writing(out):
            pass
        directory.check_free(out)  # it holds no run yet
    assert os.listdir(out) == []
    with writing(out):
        pass


def test_what_a_killed_writer_leaves(tmp_path):
    # The write fails as where the process is killed: nothing is cleaned up.
    code = (
        "import os, sys; from mirror_opt.runs import checkpoint, lock\n"
        "with lock.writing(sys.argv[1]):\n"
        "    os.fsync = lambda _: os._exit(9)\n"
        "    checkpoint.save(sys.argv[1] + '/checkpoint.pt', {})"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 9
    names = sorted(os.listdir(tmp_path))
    assert names[1:] == [LOCK]
    assert names[0].startswith(".checkpoint.pt.")
    with writing(tmp_path):
        assert os.listdir(tmp_path) == [LOCK]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_has_the_name_of_the_lock_is_left(tmp_path, kind):
    mine, lock = tmp_path / "mine", tmp_path / LOCK
    mine.write_text("mine")
    {"link": lambda: lock.symlink_to(mine), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[
        kind
    ]()
    with pytest.raises(InputError, match=f"{lock}: no file, where that of a l"), writing(tmp_path):
        pass
    assert mine.read_text() == "mine"
    assert os.path.lexists(lock)


def test_another_s_file_called_lock_is_left(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with writing(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_json(tmp_path / "a.json", [float("nan")])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2", "{}", "nonsense", "[" * 100_000])
def test_bad_json_names_the_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json"):
        directory.read_json(tmp_path / "a.json", list)


def test_json_that_cannot_be_read_names_the_file(tmp_path):
    for make in (os.mkdir, os.mkfifo):
        make(tmp_path / "a.json")
        with pytest.raises(InputError, match=r"a\.json: cannot be read \(Not a regular file\)"):
            directory.read_json(tmp_path / "a.json", list)
        (tmp_path / "a.json").rename(tmp_path / make.__name__)


@pytest.mark.parametrize(
    "methods", [[], {}, {"maml": 3}, {"maml": {}, "anil": None}, ["maml"], None]
)
def test_configs_of_a_wrong_form(tmp_path, methods):
    (tmp_path / "config.json").write_text(json.dumps({"methods": methods}))
    with pytest.raises(InputError, match=r"config\.json: its .*; restore it or train again"):
        directory.read_configs(tmp_path)


def test_configs_by_the_directory_of_their_run(tmp_path):
    run, methods = {"task": "sinusoid"}, {"maml": {"task": "sinusoid"}, "anil": {}}
    directory.write_json(tmp_path / "config.json", run)
    assert directory.read_configs(tmp_path) == {"": run}
    directory.write_json(tmp_path / "config.json", {"methods": methods})
    assert directory.read_configs(tmp_path) == methods


def test_a_failed_write_names_the_file_that_was_to_be(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        directory.write_json(tmp_path / "a.json", [])
    assert caught.value.filename == str(tmp_path / "a.json")


def test_what_fails_beside_a_write_keeps_its_own_message(tmp_path):
    with pytest.raises(TimeoutError, match=r"^timed out$"), atomic_write(tmp_path / "a.zip"):
        raise TimeoutError("timed out")


def test_clear_removes_a_runs_files_and_nothing_else(tmp_path):
    directory.write_json(tmp_path / "config.json", {"task": "sinusoid", "method": "maml"})
    for name in ("checkpoint.pt", "notes.txt", "map.png"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match="holds a run already; pass --resume"):
        directory.check_free(tmp_path)
    directory.clear(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    directory.check_free(tmp_path)


@pytest.mark.parametrize("name", ["map.png", "episodes.png", "history.json", "checkpoint.pt"])
def test_files_that_are_no_run_s_are_left(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    for refuses in (directory.check_free, directory.clear):
        with pytest.raises(InputError, match=rf"{name}: belongs to no run there, .* move it away"):
            refuses(tmp_path)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("text", ["x", "[]", '{"name": "page"}', '{"methods": {"maml": {}}}'])
def test_a_config_of_something_else_is_left(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds a config\.json of something else; pass ano"):
            directory.check_free(tmp_path, overwrite=overwrite)
    with pytest.raises(InputError, match="something else"):
        directory.clear(tmp_path)
    assert (tmp_path / "config.json").read_text() == text
