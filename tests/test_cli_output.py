"""What the command line prints, and where there is no room for it."""

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from cli_cases import IMAGES, SMALL, fails, run

from mirror_opt import cli, fewshot, maps
from mirror_opt.runs import lock

evaluate_module = importlib.import_module("mirror_opt.runs.evaluate")
train_module = importlib.import_module("mirror_opt.runs.train")  # its package has the function


def test_no_room_in_a_directory(trained, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    new, old = tmp_path / "new", shutil.copytree(trained, tmp_path / "old")
    monkeypatch.setattr(os, "fsync", full)
    line = fails(capsys, "train", "--task", "glyphs", *IMAGES, "--out", new)
    assert f"{new / 'config.json'}: No space left" in line
    assert line.endswith("; pass an --out with room to write")
    assert run("evaluate", "--out", old) == 2
    line = capsys.readouterr().err
    assert f"{old / 'results.json'}: No space left on device; it needs room to write" in line
    line = fails(capsys, "train", "--task", "glyphs", *IMAGES, "--overwrite", "--out", old)
    assert line.endswith("; pass an --out with room to write")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_run_that_meets_a_full_disk_can_go_on(tmp_path, capsys, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code), str(out / "checkpoint.pt"))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_module.checkpoint, "save", full)
        line = fails(capsys, "train", "--task", "sinusoid", *SMALL, "--out", out)
    command = f"mirror-opt train --out {out} --resume"
    assert line.endswith(f"; free some space, then go on with: {command}")
    assert run(*command.split()[1:]) == 0


def test_a_run_that_may_not_be_written(trained, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    old = shutil.copytree(trained, tmp_path / "old")
    # Told before the work is done.
    monkeypatch.setattr(evaluate_module, "evaluate", None)
    monkeypatch.setattr(train_module, "_loop", None)
    monkeypatch.setattr(lock, "_locked", refuse)
    for command in (("evaluate",), ("train", "--resume")):
        line = fails(capsys, *command, "--out", old)
        assert line.endswith(f"{old}: Read-only file system; it has to be readable and writable")


@pytest.mark.parametrize("name", ["/elsewhere/file", None])
def test_other_failures_give_no_advice_on_room(tmp_path, capsys, monkeypatch, name):
    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied", *([] if name is None else [name]))

    monkeypatch.setattr(cli, "evaluate_run", refuse)
    monkeypatch.setattr(cli, "_maps", refuse)
    for command in (("evaluate", "--out", tmp_path), ("maps",)):
        assert fails(capsys, *command).endswith(
            "error: Permission denied" if name is None else f"error: {name}: Permission denied"
        )


def with_output_to(file, *arguments, **environment):
    command = [sys.executable, "-m", "mirror_opt", *arguments]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment
    return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, env=buffered)


@pytest.mark.parametrize("command", ["maps", "--help"])
def test_output_that_nobody_reads(command):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = with_output_to(writer, command)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_has_no_room():
    with open("/dev/full", "w") as full:
        ended = with_output_to(full, "maps")
    assert ended.returncode == 2
    assert ended.stderr == (
        "mirror-opt: error: standard output: No space left on device; "
        "send it where there is room to write\n"
    )


def test_an_encoding_without_the_sign_of_an_interval(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    ended = with_output_to(
        subprocess.PIPE, "evaluate", "--out", str(out), PYTHONIOENCODING="ascii"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "mean ? 95% interval" in ended.stdout


def test_maps(capsys):
    assert run("maps") == 0
    table, _, options = capsys.readouterr().out.partition("\n\n")
    assert "kronecker         units=4,terms=1,eps=0.02," in options
    assert "euclidean" not in options
    lines = table.splitlines()
    assert lines[0].split()[:7] == ["name", "domain", "mu", "ell", "grad", "h", "inverse"]
    assert [line.split()[0] for line in lines[1:]] == list(maps.REGISTRY)
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert shown["euclidean"][:5] == ["reals", "yes", "yes", "closed", "closed"]
    assert shown["kronecker"][:5] == ["reals", "yes", "yes", "Newton", "closed"]
    assert shown["hypentropy"][:3] == ["reals", "none", "yes"]
    assert shown["negative-entropy"][0] == "simplex"
    assert "not a DGF" in " ".join(shown["meta-curvature"])


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MIRROR_OPT_DATA", str(tmp_path / "gone"))
    assert run("info") == 0
    out = capsys.readouterr().out
    for word in (
        "mirror_opt",
        "torch",
        "python",
        "threads",
        "cache",
        "gone (absent)",
        ", ".join(fewshot.TASKS),
    ):
        assert word in out


def test_info_of_a_backend_that_was_chosen(capsys, monkeypatch):
    monkeypatch.setenv("MIRROR_OPT_BACKEND", "torch")
    assert run("info") == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "(chosen)" in line]
    assert [line.split()[:2] for line in marked] == [["backend", "torch"]]
    monkeypatch.setenv("MIRROR_OPT_BACKEND", "abacus")
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "MIRROR_OPT_BACKEND: no backend named 'abacus'" in out
    assert out.splitlines()[-1].split()[:2] == ["backend", "torch"]


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["compare", "--help"]):
        assert run(*arguments) == 0
    out = capsys.readouterr().out
    for option in ("--methods", "--ways", "--train-steps", "--adapt-steps", "--resume"):
        assert option in out


def test_help_of_evaluate_states_no_default_of_training(capsys):
    assert run("train", "--help") == 0
    assert "classes per task (default: 5)" in " ".join(capsys.readouterr().out.split())
    assert run("evaluate", "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "support examples per class, or points of a curve (default: the run's)" in out
    assert "--ways" not in out
    assert "--filters" not in out
    assert set(re.findall(r"\(default: (.*?)\)", out)) == {"the run's", "auto"}
