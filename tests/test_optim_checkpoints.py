"""MirrorDescent saved, loaded and copied: it goes on as if it had not stopped."""

import copy
import functools
import io
import math
import operator
import pickle

import numpy as np
import pytest
import torch
from optim_cases import CASES, IDS, descend, learned, parameter, same, snapshot, start
from torch.distributed.checkpoint import state_dict as distributed

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_saved_and_resumed_is_uninterrupted(name, options, dtype):
    # bfloat16 rounds rows off the simplex by more than float32 does, within what the map accepts.
    settings = {"lr": 0.05, "momentum": 0.9, "dual_state": dtype == torch.bfloat16 or None}
    params = start(name, options, dtype)
    mirror_map = learned(name, params, options)
    optimizer = MirrorDescent(params, mirror_map=mirror_map, **settings)
    descend(optimizer, params, 3)
    saved = through_a_file(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    descend(optimizer, params, 3)

    others = [v.clone().requires_grad_() for v in values]
    resumed = MirrorDescent(others, lr=1.0, mirror_map=learned(name, others, options, seed=5))
    resumed.load_state_dict(saved)
    assert isinstance(resumed.param_groups[0]["mirror_map"], maps.MirrorMap)
    before = copy.deepcopy(saved["state"])
    descend(resumed, others, 3)
    assert same(snapshot(resumed), snapshot(optimizer))
    if settings["dual_state"]:
        assert all(t.dtype == torch.float32 for s in resumed.state.values() for t in s.values())
    # Steps write in place, but not into the checkpoint.
    for p, state in before.items():
        assert same(list(state.values()), list(saved["state"][p].values()))


def test_state_dict_holds_plain_values_only():
    params = start("kronecker", {})
    optimizer = MirrorDescent(params, mirror_map=maps.KroneckerNeural(params), momentum=0.9)
    descend(optimizer, params, 1)

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, str | int)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        else:
            assert value is None or type(value) in (torch.Tensor, int, float, bool, str)

    saved = optimizer.state_dict()
    walk(saved)
    packed = saved["param_groups"][0]["mirror_map"]
    assert packed["name"] == "kronecker"
    assert packed["state"].keys() == optimizer.param_groups[0]["mirror_map"].state_dict().keys()


class Unregistered(maps.PNorm):
    """A map of a user's own, with other formulas than the one that it derives from."""


def trained(mirror_map, *values):
    p = parameter(*(values or (1.0, 2.0)))
    optimizer = MirrorDescent(
        [("w", p)], lr=0.1, mirror_map=mirror_map([p]), momentum=0.9, dual_state=True
    )
    descend(optimizer, [p], 2)
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trained(lambda p: maps.Hypentropy()), "is of mirror map 'hypentropy' and this"),
        (
            lambda: trained(lambda p: maps.PNorm(3.0)),
            r"map 'pnorm' has p 3.0, this group's has 1.5",
        ),
        (
            lambda: trained(lambda p: maps.PNorm(1.5), 1.0),
            r"dual of parameter 'w' has shape \(1,\)|"
            r"momentum_buffer of parameter 'w' has",
        ),
        (lambda: torch.optim.SGD([parameter(1.0, 2.0)]), "no mirror_map: load what MirrorDescent"),
        (
            lambda: MirrorDescent([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)]}]),
            r"groups have \[1, 1\] parameters, the optimizer's \[1\]: load",
        ),
        (lambda: trained(lambda p: Unregistered()), "is of mirror map 'Unregistered' and this"),
    ],
)
def test_checkpoint_of_something_else_is_refused_and_changes_nothing(other, message):
    optimizer = trained(lambda p: maps.PNorm(1.5))
    before = snapshot(optimizer)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(InputError, match=message) as error:
        optimizer.load_state_dict(other().state_dict())
    assert "\n" not in str(error.value)
    assert same(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_checkpoint_of_a_map_with_other_tensors_is_refused():
    few = trained(lambda p: maps.SeparableNeural(p, units=2))
    many = trained(lambda p: maps.SeparableNeural(p, units=4))
    before = {k: v.clone() for k, v in many.param_groups[0]["mirror_map"].state_dict().items()}
    with pytest.raises(InputError, match=r"of shape \(1, 2\), this group's has \(1, 4\)|of shape"):
        many.load_state_dict(few.state_dict())
    after = many.param_groups[0]["mirror_map"].state_dict()
    assert same(list(before.values()), list(after.values()))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dual_state", [False, True])
def test_state_loads_into_parameters_of_another_dtype(to, dual_state):
    p = parameter(1.0, 2.0)
    options = {"lr": 0.1, "momentum": 0.9, "dual_state": dual_state, "anchor": "init"}
    optimizer = MirrorDescent([p], **options)
    descend(optimizer, [p], 2)
    q = p.detach().to(to).requires_grad_()
    other = MirrorDescent([q], **options)
    other.load_state_dict(optimizer.state_dict())
    expected = torch.promote_types(to, torch.float32) if dual_state else to
    assert other.state[q].keys() == optimizer.state[p].keys()
    assert all(t.dtype == expected for t in other.state[q].values())
    descend(optimizer, [p], 3)
    descend(other, [q], 3)
    torch.testing.assert_close(q.detach().float(), p.detach(), rtol=0.02, atol=0.02)


def test_checkpoint_from_before_an_option_existed():
    optimizer = trained(lambda p: maps.Hypentropy())
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("nesterov", "maximize", "dual_state", "anchor", "foreach", "nonfinite"):
        del saved["param_groups"][0][name]
    p = parameter(1.0, 2.0)
    other = MirrorDescent([p], mirror_map=maps.Hypentropy(), nonfinite="skip")
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["maximize"], group["dual_state"], group["anchor"]) == (False, None, "auto")
    assert group["nonfinite"] == "skip"
    descend(other, [p], 1)


def test_checkpoint_of_numbers_of_numpy_holds_plain_values(tmp_path):
    p = parameter(1.0, 2.0)
    mirror_map = maps.SeparableNeural([p], rho=np.float64(0.5))
    optimizer = MirrorDescent([p], np.float64(0.1), mirror_map, momentum=np.float32(0.9))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5))
    descend(optimizer, [p], 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def test_checkpoint_after_a_decay_to_zero_loads():
    # Which leaves a rounding error, on either side.
    rates = set()
    for steps in range(3, 20):
        optimizer = trained(lambda p: maps.Hypentropy())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, steps)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        rates.add(math.copysign(1.0, optimizer.param_groups[0]["lr"]))
        trained(lambda p: maps.Hypentropy()).load_state_dict(optimizer.state_dict())
    assert -1.0 in rates


@pytest.mark.parametrize("lr", [-0.5, torch.tensor(-0.5), math.nan])
def test_checkpoint_of_a_rate_that_no_decay_leaves_is_refused(lr):
    optimizer = trained(lambda p: maps.Hypentropy())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = lr
    with pytest.raises(InputError, match="Invalid lr="):
        optimizer.load_state_dict(saved)


def everything(optimizer):
    """All that loading may change, as text and copies."""
    packed = copy.deepcopy(optimizer.state_dict())
    tensors = [t for g in packed["param_groups"] for t in g["mirror_map"].pop("state").values()]
    return repr(packed["param_groups"]), [*tensors, *snapshot(optimizer)]


def replaced(saved, path, value):
    """A copy of nested dicts and lists with another value at a place."""
    if not path:
        return value
    parts = copy.copy(saved)
    parts[path[0]] = replaced(saved[path[0]], path[1:], value)
    return parts


def places(value, path=()):
    """The paths to all parts of nested dicts and lists, and to the whole."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


GROUP = ("param_groups", 0)
MAP = (*GROUP, "mirror_map")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [1], "checkpoint's state dict is of type list, not dict"),
        (("state",), None, "checkpoint's state is of type NoneType"),
        (("state", 0), [1], "state of parameter 0 is of type list"),
        (("state", 0, "dual"), 1.5, "dual of parameter 'w' is of type float, not Tensor"),
        (("state", 0, "dual"), torch.ones(2, dtype=torch.int32), "dual .* is of torch.int32"),
        (("param_groups",), {}, "param_groups is of type dict, not list"),
        (GROUP, None, "group 0 is of type NoneType"),
        ((*GROUP, "params"), 0, "params of group 0 is of type int, not list"),
        ((*GROUP, "params", 0), [0], "id of a parameter of group 0 is of type list, not int or st"),
        ((*GROUP, "param_names"), "w", "param_names is of type str"),
        ((*GROUP, "param_names"), [], "0 param_names for 1 parameters"),
        ((*GROUP, "param_names", 0), 7, "name of a parameter is of type int"),
        ((*GROUP, "lr"), "0.1", "Invalid lr='0.1'"),
        ((*GROUP, "momentum"), None, "Invalid momentum=None"),
        ((*GROUP, "anchor"), [1], r"Invalid anchor=\[1\]"),
        (MAP, [1], "mirror_map is of type list, not dict: load what MirrorDescent.state_dict"),
        ((*MAP, "version"), 2, "is of version 2, this mirror_opt reads 1: use the mirror_opt that"),
        ((*MAP, "version"), "1", "version of the mirror_map is of type str"),
        ((*MAP, "name"), None, "name of the mirror_map is of type NoneType"),
        ((*MAP, "options"), "p", "options of the mirror_map is of type str"),
        ((*MAP, "options", "terms"), torch.ones(2), "option terms of the mirror_map is of type Te"),
        ((*MAP, "state"), [], "state of the mirror_map is of type list"),
    ],
)
def test_damage_is_named_and_changes_nothing(path, value, message):
    optimizer = trained(lambda p: maps.KroneckerNeural(p, units=2))
    before = everything(optimizer)
    saved = trained(lambda p: maps.KroneckerNeural(p, units=2), 3.0, 4.0).state_dict()
    with pytest.raises(InputError, match=message) as error:
        optimizer.load_state_dict(replaced(saved, path, value))
    assert "\n" not in str(error.value)
    after = everything(optimizer)
    assert after[0] == before[0]
    assert same(after[1], before[1])


def test_what_is_lost_is_named():
    optimizer = trained(lambda p: maps.KroneckerNeural(p, units=2))
    saved = optimizer.state_dict()
    of = {(): ["state", "param_groups"], GROUP: ["params", "lr", "mirror_map"]}
    of[MAP] = ["name", "options", "state"]
    for path, key in ((path, key) for path, keys in of.items() for key in keys):
        part = functools.reduce(operator.getitem, path, saved)
        lost = replaced(saved, path, {k: v for k, v in part.items() if k != key})
        with pytest.raises(InputError, match=key):
            optimizer.load_state_dict(lost)


@pytest.mark.parametrize(
    ("make_map", "empty"),
    [(lambda p: maps.Euclidean(), "options"), (maps.Diagonal, "options"),
     (lambda p: maps.Hypentropy(), "state")],
    ids=["euclidean", "diagonal", "hypentropy"],
)  # fmt: skip
def test_what_is_empty_may_be_lost(make_map, empty):
    saved, optimizer = trained(make_map, 3.0, 4.0), trained(make_map)
    state_dict = saved.state_dict()
    assert state_dict["param_groups"][0]["mirror_map"].pop(empty) == {}
    optimizer.load_state_dict(state_dict)
    states = [[t for s in o.state.values() for t in s.values()] for o in (saved, optimizer)]
    assert states[0]
    assert same(*states)


@pytest.mark.parametrize(
    ("make_map", "lost"),
    [(lambda p: maps.Hypentropy(), "dual_init"), (maps.KroneckerNeural, "anchor")],
    ids=["dual_init", "anchor"],
)
def test_a_displacement_without_its_origin_is_refused(make_map, lost):
    optimizer = trained(make_map)
    saved = optimizer.state_dict()
    before = everything(optimizer)
    for p, values in saved["state"].items():
        saved["state"][p] = {k: v for k, v in values.items() if k != lost}
    with pytest.raises(InputError, match="has a dual and neither anchor nor dual_init"):
        optimizer.load_state_dict(saved)
    assert same(everything(optimizer)[1], before[1])


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"mirror_map": "kronecker"}, {"mirror_map": "hypentropy"}),
        ({"mirror_map": "hypentropy", "momentum": 0.9}, {"mirror_map": "separable"}),
        ({"mirror_map": "hypentropy", "momentum": 0.9}, {"anchor": "init"}),
        ({"mirror_map": "hypentropy", "anchor": "init", "dual_state": True},
         {"anchor": "zero", "dual_state": False}),
        ({"mirror_map": "hypentropy", "dual_state": True}, {"anchor": "init"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_group_whose_options_have_changed_loads_its_own_checkpoint(before, after, stepped):
    params = start("hypentropy", {}, torch.float32)

    def made(options):
        if "mirror_map" not in options:
            return options
        name = options["mirror_map"]
        owned = params if maps.REGISTRY[name].owns_tensors else []
        return {**options, "mirror_map": maps.create(name, owned)}

    optimizer = MirrorDescent(params, 0.05, **made(before))
    descend(optimizer, params, 2)
    optimizer.param_groups[0] |= made(after)
    descend(optimizer, params, stepped)
    params, optimizer = copy.deepcopy((params, optimizer))
    others, resumed = copy.deepcopy((params, optimizer))
    resumed.load_state_dict(through_a_file(resumed.state_dict()))
    for each, mine in ((optimizer, params), (resumed, others)):
        descend(each, mine, 2)
    assert same(snapshot(optimizer), snapshot(resumed))


def test_tensors_of_a_map_that_are_no_floats_are_refused():
    optimizer = trained(maps.Diagonal)
    saved = optimizer.state_dict()
    state = saved["param_groups"][0]["mirror_map"]["state"]
    state.update({key: value.int() for key, value in state.items()})
    with pytest.raises(InputError, match=r"of the mirror_map is of torch\.int32"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("value", [None, "text", -1.5, [1], {"a": 1}], ids=repr)
def test_whatever_is_damaged_loads_or_changes_nothing(value):
    saved = trained(lambda p: maps.KroneckerNeural(p, units=2), 3.0, 4.0).state_dict()
    refused = 0
    for path in places(saved):
        optimizer = trained(lambda p: maps.KroneckerNeural(p, units=2))
        before = everything(optimizer)
        try:
            optimizer.load_state_dict(replaced(saved, path, value))
        except ValueError:  # torch's own, for lists of another length, is none of ours
            refused += 1
            after = everything(optimizer)
            assert after[0] == before[0]
            assert same(after[1], before[1])
        else:
            descend(optimizer, optimizer.param_groups[0]["params"], 1)
    assert refused > 20


def test_hooks_of_saving_and_loading_see_what_is_saved_and_loaded():
    optimizer = trained(lambda p: maps.Hypentropy())
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda o, saved: seen.append(saved["param_groups"][0]["mirror_map"]["name"])
    )

    def rename(o, saved):
        seen.append(type(saved["state"][0]["dual"]))
        groups = [{**g, "lr": 0.25} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(type(t) for t in o.state[o.param_groups[0]["params"][0]].values())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["hypentropy"] + [torch.Tensor] * 4
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", ["hypentropy", "kronecker"])
def test_copies_go_on_alike_and_apart(copied, name):
    params = start(name, {})
    optimizer = MirrorDescent(
        params, lr=0.05, mirror_map=learned(name, params, {}), momentum=0.9, dual_state=True
    )
    descend(optimizer, params, 2)
    twin = copied(optimizer)
    before = snapshot(twin)
    descend(optimizer, params, 2)
    assert same(snapshot(twin), before)
    descend(twin, twin.param_groups[0]["params"], 2)
    assert same(snapshot(twin), snapshot(optimizer))


def test_defaults_changed_later_hold_for_later_groups():
    optimizer = MirrorDescent([parameter(1.0)], lr=0.1)
    optimizer.defaults["lr"] = 0.5
    optimizer.add_param_group({"params": [parameter(1.0)]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_distributed_checkpoints_know_its_state():
    params = start("kronecker", {})
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(params[0].detach().clone())})
    optimizer = MirrorDescent(
        model.parameters(), mirror_map=maps.KroneckerNeural(list(model.parameters())), momentum=0.9
    )
    descend(optimizer, [model["w"]], 2)
    saved = copy.deepcopy(distributed.get_optimizer_state_dict(model, optimizer))
    assert saved["state"]["w"].keys() == {"momentum_buffer", "anchor", "dual"}
    before = snapshot(optimizer)
    descend(optimizer, [model["w"]], 2)
    with torch.no_grad():
        model["w"].copy_(before[0])
    distributed.set_optimizer_state_dict(model, optimizer, saved)
    assert same(snapshot(optimizer), before)
