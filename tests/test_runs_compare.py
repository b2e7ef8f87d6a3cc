"""Comparison: the same start, tasks and budget for all methods; finished ones are not redone."""

import json
import shutil

import pytest

from mirror_opt.errors import InputError
from mirror_opt.runs import RunConfig, checkpoint, compare, evaluate_run, results
from mirror_opt.runs.compare import METHODS, open_comparison

GIVEN = {
    "task": "sinusoid",
    "shots": 4,
    "queries": 4,
    "iterations": 3,
    "tasks_per_batch": 2,
    "train_steps": 1,
    "adapt_steps": "0,1,2",
    "test_tasks": 4,
    "map_options": "terms=1",
}


@pytest.fixture
def compared(tmp_path):
    out = tmp_path / "compared"
    configs = open_comparison(out, GIVEN, ("maml", "mirror"))
    return out, configs, compare(configs, out)


def test_rows_and_directories(compared):
    out, configs, rows = compared
    assert [(row["method"], row["adapt_steps"]) for row in rows] == [
        (method, step) for method in ("maml", "mirror") for step in (0, 1, 2)
    ]
    assert json.loads((out / "results.json").read_text()) == rows
    for config in configs:
        assert results.read(out / config.method / "results.json") == [
            row for row in rows if row["method"] == config.method
        ]
        assert checkpoint.load(out / config.method / "checkpoint.pt")["iteration"] == 3
    assert configs[0].map_options == {}
    assert configs[1].map_options.items() > {"terms": 1}.items()  # the map's defaults too


def test_only_what_is_unfinished_is_trained_again(compared):
    out, _, rows = compared
    saved = (out / "maml" / "checkpoint.pt").stat().st_mtime_ns
    for path in (out / "mirror").iterdir():
        path.unlink()
    (out / "results.json").unlink()
    configs = open_comparison(out, {}, resume=True)
    again = compare(configs, out)
    assert (out / "maml" / "checkpoint.pt").stat().st_mtime_ns == saved
    assert again[:3] == rows[:3]
    assert [row["mean"] for row in again] == [row["mean"] for row in rows]


def test_an_existing_comparison_is_not_touched_unasked(compared):
    out, _, rows = compared
    with pytest.raises(InputError, match="--resume"):
        open_comparison(out, GIVEN)
    with pytest.raises(InputError, match="--methods maml,anil: the comparison in"):
        open_comparison(out, {}, ("maml", "anil"), resume=True)
    with pytest.raises(InputError, match=r"--shots 3: .* has 4"):
        open_comparison(out, {"shots": 3}, resume=True)
    assert results.read(out / "results.json") == rows


def test_overwrite_replaces_every_method(compared):
    out, _, _ = compared
    given = GIVEN | {"seed": 1}
    del given["map_options"]
    configs = open_comparison(out, given, ("anil",), overwrite=True)
    rows = compare(configs, out, overwrite=True)
    assert {(row["method"], row["seed"]) for row in rows} == {("anil", 1)}
    assert not (out / "maml" / "checkpoint.pt").exists()


def test_a_method_trained_there_before_is_not_mixed_in(compared, tmp_path):
    out, _, _ = compared
    (out / "config.json").unlink()
    (out / "results.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="maml: holds a run that is no part of a comparison"):
            open_comparison(out, GIVEN, overwrite=overwrite)


def test_overwrite_leaves_runs_that_are_no_part_of_the_comparison(compared):
    out, configs, _ = compared
    shutil.copytree(out / "maml", out / "anil")
    with pytest.raises(InputError, match="anil: holds a run that is no part of a comparison"):
        open_comparison(out, GIVEN, ("anil",), overwrite=True)
    before = (out / "anil" / "checkpoint.pt").stat()
    compare(configs[:1], out, overwrite=True)
    assert (out / "anil" / "checkpoint.pt").stat() == before
    assert not (out / "mirror" / "checkpoint.pt").exists()  # it was a part


def test_a_mistake_in_the_last_method_shows_before_the_first_is_trained(tmp_path):
    configs = open_comparison(tmp_path / "out", GIVEN | {"map_options": "terms=0"})
    with pytest.raises(InputError, match="terms"):
        compare(configs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_defaults_and_names(tmp_path):
    configs = open_comparison(tmp_path, {"task": "glyphs", "lr": 0.3, "map": "separable"})
    assert tuple(config.method for config in configs) == METHODS
    assert {config.lr for config in configs} == {0.3}
    assert [config.map for config in configs] == [None, None, "separable"]
    with pytest.raises(InputError, match="each once"):
        open_comparison(tmp_path, {"task": "glyphs"}, ("maml", "maml"))
    for name, value in (("map", "separable"), ("map_options", "terms=4")):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: none of --methods"):
            open_comparison(tmp_path, {"task": "glyphs", name: value}, ("maml",))


def test_evaluating_adds_rows_and_replaces_those_measured_again(compared):
    out, _, rows = compared
    again = evaluate_run(out, {"adapt_steps": "2,4", "guard": "on"})
    assert [(row["method"], row["adapt_steps"]) for row in again] == [
        (method, step) for method in ("maml", "mirror") for step in (2, 4)
    ]
    merged = results.read(out / "results.json")
    assert merged == rows + again  # another guard is another measurement
    evaluate_run(out, {"adapt_steps": "2"})
    assert len(results.read(out / "results.json")) == len(merged)
    with pytest.raises(InputError, match="--lr"):
        evaluate_run(out, {"lr": 0.1})


def test_an_unfinished_run_is_evaluated_for_what_it_is(compared):
    out, _, _ = compared
    state = checkpoint.load(out / "maml" / "checkpoint.pt")
    earlier = {"iteration": 2, "losses": state["losses"][:2]}
    checkpoint.save(out / "maml" / "checkpoint.pt", state | earlier)
    (row,) = evaluate_run(out / "maml", {"adapt_steps": "1"})
    assert row["iterations"] == 2


def test_table():
    config = RunConfig.create("glyphs", "mirror")
    row = dict.fromkeys(results.ROW) | {
        "method": "mirror",
        "map": "kronecker",
        "task": "glyphs",
        "ways": 5,
        "shots": 1,
        "train_steps": config.train_steps,
        "metric": "accuracy",
        "test_tasks": 600,
        "guard": "auto",
    }
    lines = results.table(
        [
            row | {"adapt_steps": 1, "mean": 0.9512, "ci95": 0.0061},
            row | {"adapt_steps": 10, "mean": 0.96, "ci95": 0.005},
            row | {"method": "maml", "map": None, "adapt_steps": 1, "mean": None, "ci95": None},
        ]
    ).splitlines()
    assert lines[0] == (
        "glyphs, 5-way 1-shot, trained at 1 step: query accuracy in %, "
        "mean ± 95% interval over 600 tasks"
    )
    assert lines[1].split() == ["adaptation", "steps", "1", "10"]
    assert lines[2].split() == ["mirror", "(kronecker)", "95.1", "±", "0.6", "96.0", "±", "0.5"]
    assert lines[3].split() == ["maml", "diverged"]


def test_a_results_file_with_a_foreign_row(tmp_path):
    (tmp_path / "results.json").write_text('[{"method": "maml"}]')
    with pytest.raises(InputError, match=r"results\.json: a row lacks task"):
        results.read(tmp_path / "results.json")
