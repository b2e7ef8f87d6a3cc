"""The command line: what it prints, and one line and status 2 for what it cannot use."""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from mirror_opt import cli, fewshot, maps
from mirror_opt.cli import main

evaluate_module = importlib.import_module("mirror_opt.runs.evaluate")
train_module = importlib.import_module("mirror_opt.runs.train")  # its package has the function

SMALL = [
    "--iterations",
    "2",
    "--tasks-per-batch",
    "2",
    "--queries",
    "2",
    "--train-steps",
    "1",
    "--adapt-steps",
    "0,1",
    "--test-tasks",
    "2",
]
IMAGES = ["--ways", "2", "--filters", "2", *SMALL]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("glyphs") / "run"
    assert (
        main(["train", "--task", "glyphs", "--method", "mirror", *IMAGES, "--out", str(out)]) == 0
    )
    return out


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("sinusoid") / "run"
    command = ["compare", "--task", "sinusoid", "--methods", "maml,anil", *SMALL]
    assert main([*command, "--out", str(out)]) == 0
    return out


def run(*arguments):
    """The exit status, argparse's own exits included."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def fails(capsys, *arguments):
    """The one line that a command refuses with."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("mirror-opt: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--task sudoku", "--task sudoku: unknown; choose from sinusoid, glyphs"),
        ("", "--task: missing"),
        ("--task sinusoid --method adam", "--method adam: unknown; choose from maml, fomaml"),
        ("--task sinusoid --map flat", "--map flat: unknown; choose from "),
        ("--task sinusoid --method maml --map kronecker", "--map kronecker: --method maml has"),
        ("--task sinusoid --map-options terms", "'terms': pass options as name=value"),
        ("--task sinusoid --map-options colour=3", "colour"),
        ("--task sinusoid --map-options terms=0", "terms"),
        ("--task sinusoid --ways 5", "no option ways"),
        ("--task sinusoid --filters 8", "--filters 8: task sinusoid has no option filters"),
        ("--task sinusoid --shots 0", "shots is 0"),
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
        ("--task glyphs --ways 100000", "ways is 100000, but split 'train' of glyphs has"),
        ("--task omniglot --data-dir /nowhere", "/nowhere"),
        ("--task folder --data-dir /nowhere", "/nowhere"),
        ("--task sinusoid --adapt-steps 1,,5", "--adapt-steps 1,,5: pass step counts"),
        ("--task sinusoid --adapt-steps=-1", "--adapt-steps -1: pass step counts"),
        ("--task sinusoid --train-steps 5-1", "--train-steps 5-1: pass a number"),
        ("--task sinusoid --train-steps 0", "--train-steps 0: pass a number"),
        ("--task sinusoid --iterations 0", "--iterations 0: must be a whole number"),
        ("--task sinusoid --test-tasks 1", "--test-tasks 1: must be a whole number, at least 2"),
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
        ("--task sinusoid --map negative-entropy", "NegativeEntropy"),
    ],
)
def test_wrong_input_to_train(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("MIRROR_OPT_DATA", raising=False)
    out = tmp_path / "out"
    assert says in fails(capsys, "train", *arguments.split(), "--out", out)
    assert not out.exists()


def test_wrong_input_to_compare(tmp_path, capsys):
    out = tmp_path / "out"
    command = ("compare", "--task", "sinusoid", "--out", out, "--methods")
    for methods, name in (("maml,sgd", "sgd"), ("maml,", "")):
        line = fails(capsys, *command, methods)
        assert f"--methods {methods}: {name!r} is unknown; choose from maml, " in line
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
    line = fails(capsys, "train", "--task", "sinusoid", *SMALL, "--out", tmp_path / "file" / "run")
    assert str(tmp_path / "file") in line


def test_an_existing_run_is_not_touched_unasked(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    line = fails(capsys, "train", "--task", "glyphs", "--out", trained)
    assert f"{trained}: holds a run already; pass --resume" in line
    line = fails(capsys, "train", "--lr", "7", "--out", trained, "--resume")
    assert "--lr 7.0" in line
    line = fails(capsys, "compare", "--task", "glyphs", "--out", trained, "--resume")
    assert "mirror-opt train --resume" in line
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


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
        (["--filters", "3"], "checkpoint.pt: a checkpoint of another model"),
        (["--ways", "3"], "checkpoint.pt: a checkpoint of another model"),
        (["--task", "sinusoid"], "--task sinusoid: the run in {out} has a network for glyphs"),
    ],
)
def test_a_checkpoint_of_another_model(trained, tmp_path, capsys, arguments, says):
    out = shutil.copytree(trained, tmp_path / "copy")
    before = (out / "results.json").read_bytes()
    assert says.format(out=out) in fails(capsys, "evaluate", "--out", out, *arguments)
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "option",
    [
        ("--filters", 10**13),
        ("--filters", 10**18),
        ("--filters", 2**63),
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


@pytest.mark.parametrize("number", ["NaN", "1e400", "-Infinity", "1" + 400 * "0"])
def test_numbers_that_no_result_can_be(trained, tmp_path, capsys, number):
    out = shutil.copytree(trained, tmp_path / "run")
    path = out / "results.json"
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([row]).replace(json.dumps(row["mean"]), number))
    for command in ("evaluate", "plot"):
        assert f"{path}: not valid JSON" in fails(capsys, command, "--out", out)


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("mirror_opt.cli.train", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        run("train", "--task", "sinusoid", *SMALL, "--out", tmp_path / "run")


def test_a_checkpoint_of_another_run(trained, tmp_path, capsys):
    other = tmp_path / "other"
    assert run("train", "--task", "glyphs", "--method", "maml", *IMAGES, "--out", other) == 0
    capsys.readouterr()
    shutil.copy(trained / "checkpoint.pt", other / "checkpoint.pt")
    assert str(other / "checkpoint.pt") in fails(capsys, "train", "--out", other, "--resume")


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


def with_output_to(file, *arguments):
    command = [sys.executable, "-m", "mirror_opt.cli", *arguments]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
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


def test_maps(capsys):
    assert run("maps") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["name", "mu", "ell", "grad", "h", "inverse"]
    assert [line.split()[0] for line in lines[1:]] == list(maps.REGISTRY)
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert shown["euclidean"][:4] == ["yes", "yes", "closed", "closed"]
    assert shown["kronecker"][:4] == ["yes", "yes", "Newton", "closed"]
    assert shown["hypentropy"][:2] == ["none", "yes"]
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
    for option in ("--ways WAYS classes per task", "--test-tasks TEST_TASKS new tasks to evaluate"):
        assert option in out
    assert "classes per task (default: the run's)" in out
    assert set(re.findall(r"\(default: (.*?)\)", out)) == {"the run's", "auto"}
