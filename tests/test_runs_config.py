"""What defines a run: every field's type, read back from a file that may hold anything."""

import dataclasses
import json

import pytest

from mirror_opt.errors import InputError
from mirror_opt.runs import RunConfig

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
        ("adapt_steps", 3, "--adapt-steps 3: must be a list of whole numbers"),
        ("adapt_steps", [1, "2"], "--adapt-steps (1, '2'): must be a list of whole numbers"),
        ("adapt_steps", [], "--adapt-steps : pass step counts"),
        ("adapt_steps", [5, 1], "--adapt-steps (5, 1): pass (1, 5)"),
        ("train_steps", "5", "--train-steps '5': pass 5"),
        ("train_steps", "five", "--train-steps five: pass a number of inner steps"),
        ("map_options", {"colour": 3}, "--map-options colour=3: map separable has no option"),
        ("map_options", {3: 4}, "--map-options {3: 4}: must be a set of options"),
        ("map_options", {"rho": [0.5]}, "--map-options rho=[0.5]: must be a number"),
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


def test_a_config_of_before_rates_could_be_learned():
    values = CONFIGS[0].to_dict() | {"rate_lr": 0.01}
    del values["learn_lr"]
    assert RunConfig.from_dict(values, "here") == CONFIGS[0]
