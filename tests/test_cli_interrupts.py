"""Runs that are there already, and commands that are interrupted."""

import importlib
import shlex
import shutil

import pytest
from cli_cases import IMAGES, SMALL, fails, run

from mirror_opt import cli
from mirror_opt.runs.lock import writing

train_module = importlib.import_module("mirror_opt.runs.train")  # its package has the function


def test_an_existing_run_is_not_touched_unasked(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    line = fails(capsys, "train", "--task", "glyphs", "--out", trained)
    assert f"{trained}: holds a run already; pass --resume" in line
    line = fails(capsys, "train", "--lr", "7", "--out", trained, "--resume")
    assert "--lr 7.0" in line
    line = fails(capsys, "compare", "--task", "glyphs", "--out", trained, "--resume")
    assert "mirror-opt train --resume" in line
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


@pytest.mark.parametrize("shots", [10**11, 2**62])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_is_there_until_its_replacement_is_sure(
    trained, compared, tmp_path, capsys, command, shots
):
    out = shutil.copytree(trained if command == "train" else compared, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    options = ["--task", "sinusoid", "--shots", shots, "--overwrite", "--out", out]
    assert "not enough memory" in fails(capsys, command, *options)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_another_process_is_writing_there(trained, compared, tmp_path, capsys):
    for source, command in ((trained, "train"), (compared, "compare")):
        out = shutil.copytree(source, tmp_path / command)
        commands = [("evaluate",), (command, "--resume")]
        commands.append((command, "--task", "sinusoid", *SMALL, "--overwrite"))
        with writing(out):
            before = {path: path.read_bytes() for path in out.rglob("*.*")}
            for arguments in commands:
                line = fails(capsys, *arguments, "--out", out)
                assert f"{out}: another run is writing there" in line
            assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "at"),
    [("train", "evaluate.evaluate"), ("train", "plots.draw"), ("compare", "plots.draw")],
)
def test_interrupted_after_training(tmp_path, capsys, monkeypatch, command, at):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        module, name = at.split(".")
        patch.setattr({"evaluate": train_module, "plots": cli.plots}[module], name, stop)
        assert run(command, "--task", "sinusoid", *SMALL, "--out", out) == 130
    hint = f"mirror-opt {command} --out {out} --resume"
    assert capsys.readouterr().err == f"mirror-opt: interrupted; go on with: {hint}\n"
    assert run(*hint.split()[1:]) == 0
    assert (out / "fits.png").exists()
    assert (out / "results.json").exists()


def test_the_command_to_go_on_with_takes_any_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("train", "--task", "sinusoid", *SMALL, "--out=-my run")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", stop)
        assert run(*options) == 130
    hint = capsys.readouterr().err.partition("; go on with: ")[2]
    assert hint == "mirror-opt train '--out=-my run' --resume\n"
    assert run(*shlex.split(hint)[1:]) == 0


def test_interrupted_before_a_run_is_replaced(trained, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(train_module, "build", stop)
    for options in (["--out", out, "--overwrite"], ["--out", tmp_path / "new"]):
        assert run("train", "--task", "glyphs", *IMAGES, *options) == 130
        assert capsys.readouterr().err == "mirror-opt: interrupted; the run had not begun\n"
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_interrupted_evaluation_and_drawing(trained, capsys, monkeypatch, command):
    monkeypatch.setattr(cli, "evaluate_run", stop)
    monkeypatch.setattr(cli.plots, "draw", stop)
    assert run(command, "--out", trained) == 130
    assert capsys.readouterr().err == "mirror-opt: interrupted\n"
