"""The command line: what it does, and one line and status 2 for input that it cannot use."""

import json
import os
import shutil

import pytest
from cli_cases import IMAGES, SMALL, fails, run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--task sudoku", "--task sudoku: unknown; choose from sinusoid, glyphs"),
        ("", "--task: missing"),
        ("--task sinusoid --method adam", "--method adam: unknown; choose from maml, fomaml"),
        ("--task sinusoid --map flat", "--map flat: unknown; choose from "),
        ("--task sinusoid --map negative-entropy", "--map negative-entropy: for positive paramet"),
        ("--task sinusoid --method maml --map kronecker", "--map kronecker: --method maml has"),
        ("--task sinusoid --map-options terms", "'terms': pass options as name=value"),
        ("--task sinusoid --map-options colour=3", "colour"),
        ("--task sinusoid --map-options terms=0", "--map-options terms=0: pass an integer"),
        ("--task sinusoid --ways 5", "no option ways"),
        ("--task sinusoid --filters 8", "--filters 8: task sinusoid has no option filters"),
        ("--task sinusoid --shots 0", "--shots 0: must be a whole number, from 1"),
        ("--task sinusoid --queries -1", "--queries -1: must be a whole number, from 1"),
        ("--task glyphs --ways 1", "--ways 1: must be a whole number, from 2"),
        ("--task glyphs --filters 0", "--filters 0: must be a whole number, from 1"),
        ("--resume", "no run there to go on with; pass the --out of one"),
        ("--task sinusoid --task-options split=background", "no option split"),
        ("--task sinusoid --task-options queries=9", "option of its own; pass --queries"),
        ("--task sinusoid --task-options seed=1", "option of its own; pass --seed"),
        ("--task sinusoid --task-options name=x", "task sinusoid has no option name"),
        ("--task omniglot --task-options validation=abc", "validation='abc': must be a whole"),
        ("--task omniglot --task-options rotations=no", "rotations='no': must be true or false"),
        ("--task sinusoid --map-options params=1", "map kronecker has no option params"),
        ("--task sinusoid --map-options name=x", "map kronecker has no option name"),
        ("--task sinusoid --map-options terms=abc", "terms='abc': must be a whole number"),
        ("--task sinusoid --map-options eps=abc", "eps='abc': must be a number"),
        ("--task sinusoid --map euclidean --map-options a=1", "no option a; pass no --map-options"),
        ("--task sinusoid --rate-lr 0.1", "--rate-lr 0.1: the inner rates are not learned; pass"),
        ("--task glyphs --ways 100000", "--ways 100000, but split 'train' of glyphs has"),
        ("--task omniglot --data-dir /nowhere", "with download (--download of train and compare)"),
        ("--task folder --data-dir /nowhere", "/nowhere"),
        ("--task sinusoid --adapt-steps 1,,5", "--adapt-steps 1,,5: pass step counts"),
        ("--task sinusoid --adapt-steps=-1", "--adapt-steps -1: pass step counts"),
        ("--task sinusoid --train-steps 5-1", "--train-steps 5-1: pass a number"),
        ("--task sinusoid --train-steps 0", "--train-steps 0: pass a number"),
        ("--task sinusoid --iterations 0", "--iterations 0: must be a whole number"),
        ("--task sinusoid --test-tasks 1", "--test-tasks 1: must be a whole number, from 2 to"),
        (f"--task sinusoid --iterations {2**63}", f"--iterations {2**63}: must be a whole number"),
        (f"--task sinusoid --test-tasks {10**19}", f"--test-tasks {10**19}: must be a whole n"),
        (f"--task sinusoid --seed {2**63}", f"--seed {2**63}: must be a whole number, from 0"),
        (f"--task sinusoid --adapt-steps 1,{2**63}", f"--adapt-steps 1,{2**63}: pass step counts"),
        (f"--task sinusoid --train-steps 1-{2**63}", f"--train-steps 1-{2**63}: pass a number"),
        ("--task sinusoid --tasks-per-batch 1000001", "must be a whole number, from 1 to 1000000"),
        ("--task sinusoid --download", "--download: task sinusoid has nothing to download; drop"),
        ("--task sinusoid --lr nan", "--lr nan: must be a number from 0 to"),
        ("--task sinusoid --learn-lr --rate-lr 1e300", "--rate-lr 1e+300: must be a number from"),
        ("--task sinusoid --threads 3000000000", "--threads 3000000000: must be a whole number"),
        ("--task sinusoid --save-every nan", "--save-every nan: pass a number of seconds"),
        ("--task sinusoid --save-every -1", "--save-every -1.0: pass a number of seconds"),
        ("--task sinusoid --lr 0", "--lr 0"),
        ("--task sinusoid --guard maybe", "--guard maybe: unknown; choose from auto, on, off"),
        ("--task sinusoid --device tpu", "--device tpu: unknown"),
        ("--task sinusoid --device cuda:99", "--device cuda:99"),
        ("--task sinusoid --seed -1", "--seed -1"),
        ("--task sinusoid --iterations ten", "invalid int value: 'ten'"),
        ("--task sinusoid --iteration 10", "unrecognized arguments: --iteration 10"),
    ],
)
def test_wrong_input_to_train(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("MIRROR_OPT_DATA", raising=False)
    out = tmp_path / "out"
    assert says in fails(capsys, "train", *arguments.split(), "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "compare"])
def test_files_of_something_else_are_left(tmp_path, capsys, command):
    options = (command, "--task", "sinusoid", *SMALL, "--out", tmp_path)
    for name in ("map.png", "config.json"):
        (tmp_path / name).write_text("mine")
        for mode in ([], ["--overwrite"]):
            assert name in fails(capsys, *options, *mode)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "plot"])
def test_no_directory(capsys, command):
    assert "argument --out: pass a directory (see:" in fails(capsys, command, "--out", "")


def test_wrong_input_to_compare(tmp_path, capsys):
    out = tmp_path / "out"
    command = ("compare", "--task", "sinusoid", "--out", out, "--methods")
    for methods, name in (("maml,sgd", "sgd"), ("maml,", "")):
        line = fails(capsys, *command, methods)
        assert f"--methods {methods}: {name!r} is unknown; choose from maml, " in line
    assert "each once" in fails(capsys, *command, "maml, maml")  # blanks are no part of a name
    line = fails(capsys, *command, "maml", "--save-every", "nan")
    assert "--save-every nan: pass a number of seconds" in line
    line = fails(capsys, "compare", "--resume", "--out", out)
    assert f"{out}: no comparison there to go on with; pass the --out of one" in line
    assert "each once" in fails(capsys, *command, "maml,maml")
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", "--task"], ["plot"], ["train", "--resume", "--overwrite"]]
)
def test_wrong_commands(capsys, arguments):
    fails(capsys, *arguments)


def test_a_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    line = fails(capsys, "train", "--task", "sinusoid", *SMALL, "--out", tmp_path / "file")
    assert line.startswith(f"mirror-opt: error: --out {tmp_path / 'file'} is not a directory; pass")
    for name in ("file/run", "link"):
        out = tmp_path / name
        line = fails(capsys, "train", "--task", "sinusoid", *SMALL, "--out", out)
        assert line.startswith(f"mirror-opt: error: {out}: ")
        assert line.endswith("; pass an --out that is a directory, or can be made one")
    assert not (tmp_path / "gone").exists()


def test_evaluate(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "copy")
    assert run("evaluate", "--out", out, "--adapt-steps", "3", "--guard", "off", "--shots", 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("glyphs, 2-way 2-shot, trained at 1 step")
    rows = json.loads((out / "results.json").read_text())
    assert [(row["adapt_steps"], row["shots"], row["guard"]) for row in rows] == [
        (0, 1, "auto"),
        (1, 1, "auto"),
        (3, 2, "off"),
    ]
    assert run("plot", "--out", out) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--filters", "3"], "unrecognized arguments: --filters 3"),
        (["--ways", "3"], "unrecognized arguments: --ways 3"),
        (["--task", "sinusoid"], "--task sinusoid: the run in {out} has a network for glyphs"),
    ],
)
def test_what_the_network_is_made_for(trained, tmp_path, capsys, arguments, says):
    out = shutil.copytree(trained, tmp_path / "copy")
    before = (out / "results.json").read_bytes()
    assert says.format(out=out) in fails(capsys, "evaluate", "--out", out, *arguments)
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "option",
    [
        ("--filters", 10**13),
        ("--filters", 10**18),
        ("--task-options", "image_size=10000000"),
        ("--task-options", "image_size=1000000000000"),
        ("--map-options", f"units={10**19}"),
    ],
)
def test_more_than_the_memory(image_folder, tmp_path, capsys, option):
    command = ["train", "--task", "folder", "--data-dir", image_folder, "--queries", "2"]
    line = fails(capsys, *command, *option, "--out", tmp_path / "run")
    assert line.startswith("mirror-opt: error: not enough memory; pass a smaller network")
    assert not (tmp_path / "run").exists()


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("mirror_opt.cli.train", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        run("train", "--task", "sinusoid", *SMALL, "--out", tmp_path / "run")


def test_every_step_shown_diverged(tmp_path):
    options = [*SMALL, "--lr", "1e30", "--guard", "off", "--adapt-steps", "1,2"]
    out = tmp_path / "run"
    assert run("train", "--task", "sinusoid", "--method", "maml", *options, "--out", out) == 0
    assert {row["mean"] for row in json.loads((out / "results.json").read_text())} == {None}
    assert (out / "adaptation.png").exists()


def test_an_option_of_another_command(capsys):
    line = fails(capsys, "evaluate", "--out", "run", "--seed", "3")
    assert line.endswith("unrecognized arguments: --seed 3 (see: mirror-opt evaluate --help)")


def test_other_data_for_a_folder_run(image_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(
            "train",
            "--task",
            "folder",
            "--method",
            "fomaml",
            "--data-dir",
            image_folder,
            *IMAGES,
            "--out",
            out,
        )
        == 0
    )
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    assert run("evaluate", "--out", out, "--data-dir", moved) == 0
    assert run("plot", "--out", out, "--data-dir", moved) == 0


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("compare", "--task", "sinusoid", "--methods", "anil", *SMALL) == 0
    assert sorted(os.listdir("runs/sinusoid-compare")) == [
        "adaptation.png",
        "anil",
        "config.json",
        "fits.png",
        "results.json",
        "training.png",
    ]
