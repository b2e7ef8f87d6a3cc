"""The data of a run: known by its content wherever it lies, and found again where it has moved."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import noise
from runs_cases import handled_by

from mirror_opt.cli import main
from mirror_opt.fewshot import ImageFolder
from mirror_opt.runs import checkpoint, compare, results
from mirror_opt.runs.compare import open_comparison

SMALL = "--ways 2 --filters 2 --iterations 2 --tasks-per-batch 2 --train-steps 1 --threads 1"
FOLDER = f"--task folder --queries 2 --adapt-steps 0,1 --test-tasks 2 {SMALL}".split()


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def rows(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def data(image_folder, tmp_path):
    """A data set, and another in a folder of the same name."""
    one, other = tmp_path / "one" / "data", tmp_path / "other" / "data"
    rng = np.random.default_rng(1)
    shutil.copytree(image_folder, one)
    shutil.copytree(image_folder, other)
    for path in other.glob("test/*/*.png"):
        path.write_bytes(noise(rng, 16, 16, 3))
    return one, other


def test_results_are_those_of_one_data_set_however_it_is_named(data, tmp_path, monkeypatch):
    one, other = data
    out = tmp_path / "run"
    run("train", "--method", "fomaml", *FOLDER, "--data-dir", one, "--out", out)
    first = rows(out)
    monkeypatch.chdir(tmp_path)
    copied = shutil.copytree(one, tmp_path / "elsewhere")
    for spelling in ("one/data", one / ".." / "data", copied):
        run("evaluate", "--out", out, "--data-dir", spelling)
    assert [(row["data"], row["mean"]) for row in rows(out)] == [
        (row["data"], row["mean"]) for row in first
    ]
    run("evaluate", "--out", out, "--data-dir", other)
    assert [row["mean"] for row in rows(out)[:2]] == [row["mean"] for row in first]
    assert len({row["data"] for row in rows(out)}) == 2
    assert len(rows(out)) == 4


def test_data_named_by_the_environment_is_known_too(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for place, count in zip(data, (2, 4), strict=True):
        monkeypatch.setenv("MIRROR_OPT_DATA", str(place))
        command = ["evaluate"] if out.exists() else ["train", "--method", "fomaml", *FOLDER]
        run(*command, "--out", out)
        assert len(rows(out)) == count
    assert None not in {row["data"] for row in rows(out)}


def test_a_comparison_goes_on_where_its_data_has_moved(data, tmp_path, monkeypatch):
    where, out = data[0], tmp_path / "compared"
    command = ["compare", "--methods", "fomaml,anil", *FOLDER, "--data-dir", str(where), "--out"]
    run(*command, tmp_path / "whole")
    before = rows(tmp_path / "whole")
    sample, drawn = ImageFolder.sample, []

    def interrupted(self, split, index, tasks):
        drawn.append(split)
        # Two for calibration before anything is written, and of each method one more and two for
        # training.
        if drawn.count("train") == 7:
            signal.raise_signal(signal.SIGINT)
        return sample(self, split, index, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "sample", interrupted)
        with handled_by(signal.default_int_handler):
            assert main([*command, str(out)]) == 130
    states = [checkpoint.load(out / name / "checkpoint.pt") for name in ("fomaml", "anil")]
    assert [state["iteration"] for state in states] == [2, 1]
    moved = shutil.move(where, tmp_path / "moved")
    for options in (["--data-dir", moved], ["--data-dir", moved], []):
        run("compare", "--resume", "--out", out, *options)
        assert [(row["method"], row["adapt_steps"], row["mean"]) for row in rows(out)] == [
            (row["method"], row["adapt_steps"], row["mean"]) for row in before
        ]
        for folder in (out, out / "fomaml", out / "anil"):
            assert (folder / "episodes.png").exists()
            (folder / "episodes.png").unlink()


def test_a_finished_run_is_resumed_where_its_data_has_moved(data, tmp_path):
    where, out = data[0], tmp_path / "run"
    run("train", "--method", "fomaml", *FOLDER, "--data-dir", where, "--out", out)
    before = rows(out)
    moved = shutil.move(where, tmp_path / "moved")
    run("train", "--resume", "--out", out, "--data-dir", moved)
    assert rows(out) == before
    run("evaluate", "--out", out)
    run("plot", "--out", out)


def test_nothing_goes_on_with_other_data(data, tmp_path, capsys):
    one, other = data
    commands = {"train": ["--method", "fomaml"], "compare": ["--methods", "fomaml,anil"]}
    for command, methods in commands.items():
        out = tmp_path / command
        run(command, *methods, *FOLDER, "--data-dir", one, "--out", out)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main([command, "--resume", "--out", str(out), "--data-dir", str(other)]) == 2
        first = out / "checkpoint.pt" if command == "train" else out / "fomaml" / "checkpoint.pt"
        said = capsys.readouterr().err
        assert f"{first}: trained on other data than that of {other}; pass --data-dir" in said
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        run(command, "--resume", "--out", out)


def test_options_of_the_task_are_changed_in_part(omniglot_folder, tmp_path):
    out = tmp_path / "run"
    options = f"--task omniglot --queries 1 --adapt-steps 0,1 --test-tasks 2 {SMALL}".split()
    options += ["--task-options", "split=background,rotations=false", "--method", "fomaml"]
    run("train", *options, "--data-dir", omniglot_folder, "--out", out)
    run("evaluate", "--out", out, "--task-options", "validation=3")
    split = {"split": "background", "rotations": False}
    assert [row["task_options"] for row in rows(out)] == [
        *[split | {"validation": 0}] * 2,
        *[split | {"validation": 3}] * 2,
    ]
    assert list(results.lines(rows(out))) == [
        "fomaml, task options validation=0",
        "fomaml, task options validation=3",
    ]


def test_a_comparison_resumed_returns_its_own_rows(tmp_path):
    given = dict(task="sinusoid", iterations=2, test_tasks=2, adapt_steps="0,1")
    made = compare(open_comparison(tmp_path, given, ("fomaml", "anil")), tmp_path)
    run("evaluate", "--out", tmp_path, "--adapt-steps", "2")
    assert compare(open_comparison(tmp_path, {}, resume=True), tmp_path) == made
    assert len(rows(tmp_path)) == 6
