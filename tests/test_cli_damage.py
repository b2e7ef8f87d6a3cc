"""Damaged, absent and unfinished files of a run: one line that names them."""

import importlib
import json
import shutil
import signal

import pytest
from cli_cases import IMAGES, SMALL, fails, run
from runs_cases import InterruptedFamily, handled_by

from mirror_opt import fewshot

evaluate_module = importlib.import_module("mirror_opt.runs.evaluate")
train_module = importlib.import_module("mirror_opt.runs.train")  # its package has the function


def test_a_checkpoint_of_another_run(trained, tmp_path, capsys):
    other = tmp_path / "other"
    assert run("train", "--task", "glyphs", "--method", "maml", *IMAGES, "--out", other) == 0
    capsys.readouterr()
    shutil.copy(trained / "checkpoint.pt", other / "checkpoint.pt")
    assert str(other / "checkpoint.pt") in fails(capsys, "train", "--out", other, "--resume")
    before = (other / "results.json").read_bytes()
    for command in ("evaluate", "plot"):
        line = fails(capsys, command, "--out", other)
        assert f"{other / 'checkpoint.pt'}: of another run than {other / 'config.json'}" in line
    assert (other / "results.json").read_bytes() == before


def test_damaged_and_absent_checkpoints(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "copy")
    path = out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    for command in (("evaluate",), ("plot",), ("train", "--resume")):
        assert f"{path}: damaged" in fails(capsys, *command, "--out", out)
    path.unlink()
    assert f"{path}: no checkpoint there" in fails(capsys, "evaluate", "--out", out)
    assert "no such file" in fails(capsys, "evaluate", "--out", tmp_path / "nothing")


def changed(source, target, name, change):
    """A copy of a run with one of its JSON files changed, and that file."""
    path = shutil.copytree(source, target) / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [("adapt_steps", 3), ("method", ["maml"]), ("iterations", "2"), ("map_options", {"terms": []})],
)
def test_a_config_of_wrong_types(trained, tmp_path, capsys, field, value):
    path = changed(
        trained, tmp_path / "run", "config.json", lambda config: config.update({field: value})
    )
    line = fails(capsys, "train", "--out", path.parent, "--resume")
    assert f"{path}: --{field.replace('_', '-')} " in line


@pytest.mark.parametrize("methods", [["maml"], {}, {"maml": 3}, {"maml": {"task": 3}}])
def test_a_comparison_of_wrong_types(compared, tmp_path, capsys, methods):
    path = changed(
        compared, tmp_path / "run", "config.json", lambda config: config.update(methods=methods)
    )
    commands = [("compare", "--resume")]
    if methods != {"maml": {"task": 3}}:  # what is in a config, these have in the checkpoint too
        commands += [("evaluate",), ("plot",)]
    for command in commands:
        assert f"{path}: " in fails(capsys, *command, "--out", path.parent)


@pytest.mark.parametrize("text", ["[{", "{}", "[3]", '[{"method": "maml"}]'])
def test_damaged_results(trained, compared, tmp_path, capsys, monkeypatch, text):
    for number, (source, command) in enumerate([(trained, "train"), (compared, "compare")]):
        out = shutil.copytree(source, tmp_path / str(number))
        (out / "results.json").write_text(text)
        with monkeypatch.context() as patch:  # told before any work is done
            patch.setattr(evaluate_module, "evaluate", None)
            patch.setattr(train_module, "_loop", None)
            for options in (("evaluate",), (command, "--resume")):
                line = fails(capsys, *options, "--out", out)
                assert f"{out / 'results.json'}: " in line
                assert line.endswith("; restore it, or remove it and evaluate again")
        (out / "results.json").unlink()
        assert run("evaluate", "--out", out) == 0
        capsys.readouterr()


@pytest.mark.parametrize("number", ["NaN", "1e400", "-Infinity", "1" + 400 * "0"])
def test_numbers_that_no_result_can_be(trained, tmp_path, capsys, number):
    out = shutil.copytree(trained, tmp_path / "run")
    path = out / "results.json"
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([row]).replace(json.dumps(row["mean"]), number))
    for command in ("evaluate", "plot"):
        assert f"{path}: not valid JSON" in fails(capsys, command, "--out", out)


def test_a_text_that_is_not_unicode(trained, tmp_path, capsys):
    path = changed(
        trained, tmp_path / "run", "results.json", lambda rows: rows[0].update(task="\ud800")
    )
    for command in ("evaluate", "plot"):
        line = fails(capsys, command, "--out", path.parent)
        assert f"{path}: a row has a text that is not Unicode; restore it" in line


def test_a_run_that_is_not_finished(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "run")
    for name in ("results.json", "history.json", *(path.name for path in out.glob("*.png"))):
        (out / name).unlink()
    assert run("plot", "--out", out) == 0
    names = ["training.png", "map.png", "episodes.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    (out / "checkpoint.pt").unlink()
    for command in ("plot", "evaluate"):
        line = fails(capsys, command, "--out", out)
        assert line.endswith(
            f"{out / 'checkpoint.pt'}: no checkpoint there, the run is not trained yet; "
            f"go on with: mirror-opt train --out {out} --resume"
        )


def test_a_run_that_was_stopped_is_told_from_a_finished_one(tmp_path, monkeypatch, caplog):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        make = fewshot.make_task
        patch.setattr(fewshot, "make_task", lambda *a, **k: InterruptedFamily(make(*a, **k), 1))
        options = ["--task", "sinusoid", "--method", "maml", *SMALL, "--iterations", "4"]
        with handled_by(signal.default_int_handler):
            assert run("train", *options, "--out", out) == 130
    assert run("evaluate", "--out", out) == 0
    assert "maml: the run was stopped after 2 of 4 iterations" in caplog.text
    assert run("train", "--resume", "--out", out) == 0
    caplog.clear()
    assert run("evaluate", "--out", out) == 0
    assert not caplog.text


def test_a_comparison_that_is_not_finished(compared, tmp_path, capsys):
    out = shutil.copytree(compared, tmp_path / "run")
    (out / "anil" / "checkpoint.pt").unlink()
    rows = (out / "results.json").read_bytes()
    for command in ("plot", "evaluate"):
        line = fails(capsys, command, "--out", out)
        assert line.endswith(
            f"anil is not trained yet; go on with: mirror-opt compare --out {out} --resume"
        )
    assert (out / "results.json").read_bytes() == rows
