"""What defines a run: every field's type, read back from a file that may hold anything."""

import dataclasses
import json

import pytest

from mirror_opt.errors import InputError
from mirror_opt.runs import RunConfig
from mirror_opt.runs.directory import read_json, write_json

CONFIGS = [
    RunConfig.create("sinusoid", map="separable", map_options="rho=0.5", train_steps="1-5"),
    RunConfig.create("omniglot", "maml", task_options="split=background", learn_lr=True),
]


def refused(values):
    with pytest.raises(InputError, match=r"a/config\.json: .*restore it or train again") as caught:
        RunConfig.from_dict(values, "a/config.json")
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict())), "here") == config


def test_a_number_without_a_point_is_one(tmp_path):
    given = {"map": "hypentropy", "map_options": f"beta={10**19}"}
    config = RunConfig.create("sinusoid", device="cpu", **given)
    write_json(tmp_path / "config.json", config.to_dict())
    assert read_json(tmp_path / "config.json", dict)["map_options"] == {"beta": 1e19}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig)])
def test_a_field_of_a_wrong_type(name):
    values = CONFIGS[0].to_dict()
    for wrong in ([{"a": 1}], 3) if name in ("map_options", "task_options") else ({"a": 1}, [1.5]):
        assert f"--{name.replace('_', '-')} " in refused(values | {name: wrong})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("iterations", "5", "--iterations '5': must be a whole number"),
        ("iterations", True, "--iterations True: must be a whole number"),
        ("shots", 1.0, "--shots 1.0: must be a whole number"),
        ("lr", "0.1", "--lr '0.1': must be a number"),
        ("method", ["mirror"], "--method ['mirror']: must be a text"),
        ("method", "adam", "--method adam: unknown; choose from maml"),
        ("task", "sudoku", "--task sudoku: unknown; choose from sinusoid"),
        ("adapt_steps", 3, "--adapt-steps 3: pass step counts"),
        ("adapt_steps", [1, 2.5], "--adapt-steps 1,2.5: pass step counts"),
        ("adapt_steps", [True], "--adapt-steps true: pass step counts"),
        ("adapt_steps", [], "--adapt-steps : pass step counts"),
        ("train_steps", "five", "--train-steps five: pass a number of inner steps"),
        ("map_options", {"colour": 3}, "--map-options colour=3: map separable has no option"),
        ("map_options", {3: 4}, "--map-options {3: 4}: must be a set of options"),
        ("map_options", {"rho": [0.5]}, "--map-options rho=[0.5]: must be a number"),
        ("ways", 5, "--ways 5: task sinusoid has no option ways; drop --ways"),
        ("filters", 8, "--filters 8: task sinusoid has no option filters; drop --filters"),
        ("data_dir", "/data", "--data-dir /data: task sinusoid has no option data_dir"),
        ("threads", 1025, "--threads 1025: must be a whole number, from 1 to 1024"),
        ("lr", 1e31, "--lr 1e+31: must be a number from 0 to 1e+30"),
        ("map_lr", float("inf"), "--map-lr inf: must be a number from 0 to 1e+30"),
        ("rate_lr", 0.1, "--rate-lr 0.1: the inner rates are not learned; pass --learn-lr"),
    ],
)
def test_a_wrong_value(name, value, says):
    assert says in refused(CONFIGS[0].to_dict() | {name: value})


@pytest.mark.parametrize("values", [3, [], None, "text"])
def test_no_config_at_all(values):
    assert "for a config" in refused(values)


def test_missing_and_unknown_fields():
    values = CONFIGS[0].to_dict()
    assert "colour" in refused(values | {"colour": 3})
    del values["iterations"]
    assert "iterations" in refused(values)


def test_the_device_is_one_that_is_there():
    values = CONFIGS[0].to_dict()
    there = RunConfig.create("sinusoid").device
    for auto in (values | {"device": "auto"}, {k: v for k, v in values.items() if k != "device"}):
        assert RunConfig(**auto).device == there != "auto"
    # A run may be evaluated where its own device is not.
    assert RunConfig(**values | {"device": "cuda:99"}).device == "cuda:99"


def test_steps_are_kept_in_one_spelling():
    config = dataclasses.replace(CONFIGS[0], adapt_steps=[5, 1, 1], train_steps="5-5")
    assert (config.adapt_steps, config.train_steps) == ((1, 5), 5)


def test_options_of_map_and_task_are_kept_in_full():
    assert CONFIGS[1].task_options == {"split": "background", "validation": 0, "rotations": True}
    values = CONFIGS[1].to_dict() | {"task_options": {"split": "background"}}
    assert RunConfig.from_dict(values, "here") == CONFIGS[1]
    assert CONFIGS[0].map_options.items() > {"rho": 0.5}.items()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task_options": "split=standard"}, "split=standard: the run in here has split=back"),
        ({"task_options": "colour=3"}, "--task-options colour=3: task omniglot has no option colo"),
        ({"map_options": "terms=1"}, "--map-options terms=1: --method maml has its own geometry"),
        ({"learn_lr": False}, "--learn-lr false: the run in here has true"),
    ],
)
def test_options_that_a_resumed_run_has_not(given, says):
    CONFIGS[1].check_same({"task_options": "rotations=true,split=background"}, "here")
    with pytest.raises(InputError) as caught:
        CONFIGS[1].check_same(given, "here")
    assert says in str(caught.value)
