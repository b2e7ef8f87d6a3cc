"""What a checkpoint of MirrorDescent holds, and what it must agree with when it is loaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from mirror_opt.errors import InputError, is_number
from mirror_opt.maps import MirrorMap
from mirror_opt.optim.options import (
    Group,
    check_options,
    check_rounding,
    parameter_name,
    state_dtype,
)
from mirror_opt.optim.sharded import placed_as
from mirror_opt.optim.state import STATE

__all__ = ["adopt", "checked", "hide_state", "pack_maps"]

State = dict[Any, dict[str, Any]]

# Of maps as they are packed, and of the state beside them. It lies with the map, since
# torch.distributed.checkpoint keeps groups and state and no more.
_VERSION = 1
_ROUNDING = 1e-6  # of a rate
_ADVICE = "load what MirrorDescent.state_dict() gave"


@dataclass(frozen=True)
class _Hidden:
    """State that ``Optimizer.load_state_dict`` passes on as it is, since it knows no such type."""

    value: Any


def pack_maps(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Post-hook of ``state_dict``: every map as plain values."""
    for group in state_dict["param_groups"]:
        for key, value in group.items():
            group[key] = _plain(value)
        group["mirror_map"] = _pack(group["mirror_map"])


def hide_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Pre-hook of ``load_state_dict``: keeps state from being cast to its parameter's dtype.

    Raises:
        InputError: ``state_dict`` is not built as one is.
    """
    ids: list[int | str] = []
    counts = []
    saved = checked(state_dict, "state dict", dict)
    for i, group in enumerate(checked(saved.get("param_groups"), "param_groups", list)):
        params = checked(group, f"group {i}", dict).get("params")
        counts.append(len(checked(params, f"params of group {i}", list)))
        for p in params:
            ids.append(checked(p, f"id of a parameter of group {i}", int, str))
    own = [len(group["params"]) for group in optimizer.param_groups]
    if counts != own:
        raise InputError(
            f"the checkpoint's groups have {counts} parameters, the optimizer's {own}: load a "
            "checkpoint of the same model and the same groups"
        )
    state = dict(checked(saved.get("state"), "state", dict))
    for p in state.keys() & ids:
        values = checked(state[p], f"state of parameter {p}", dict)
        state[p] = {key: _Hidden(value) for key, value in values.items()}
    return {**saved, "state": state}


def adopt(mine: list[Group], groups: list[Group], state: State) -> None:
    """Turns loaded groups and state, both changed in place, into those of an optimizer.

    Args:
        mine: the optimizer's groups, whose maps are kept and receive the saved tensors.
        groups: the loaded groups, which have the optimizer's parameters already.
        state: the loaded state, hidden.

    Raises:
        InputError: another map, tensors of other shapes, values of other types, or a version of
            this package that is newer. Nothing has changed then.
    """
    maps = [group["mirror_map"] for group in mine]
    for own, group in zip(mine, groups, strict=True):
        _check_same(own["mirror_map"], group.get("mirror_map"))
        _check_group(own, group)
        for slot, p in enumerate(group["params"]):
            found, where = state.get(p, {}), parameter_name(own, slot)
            for key in filter(STATE.__contains__, found):
                _check_state(found[key].value, p, f"{key} of {where}")
            # Without what it is measured from, a displacement says nothing.
            if "dual" in found and not {"anchor", "dual_init"} & found.keys():
                raise InputError(
                    f"the checkpoint's state of {where} has a dual and neither anchor nor "
                    f"dual_init: {_ADVICE}"
                )
    for mirror_map, group in zip(maps, groups, strict=True):
        mine_now = mirror_map.state_dict()
        saved = group["mirror_map"].get("state", {})
        mirror_map.load_state_dict({k: placed_as(v, mine_now[k]) for k, v in saved.items()})
        group["mirror_map"] = mirror_map
        for p in dict.fromkeys(group["params"]):
            dtype = state_dtype(p, group)
            if p in state:
                # A copy, since steps write in place and the checkpoint stays the caller's.
                state[p] = {
                    key: placed_as(hidden.value.to(p.device, dtype, copy=True), p)
                    if key in STATE
                    else hidden.value
                    for key, hidden in state[p].items()
                }


def checked(value: Any, what: str, *kinds: type) -> Any:
    """The value at a place of a checkpoint, which must be of one of these types.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"the checkpoint's {what} is of type {type(value).__name__}, not {wanted}: {_ADVICE}"
        )
    return value


def _plain(value: Any) -> Any:
    """A number of numpy, which ``torch.load(weights_only=True)`` refuses, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _pack(mirror_map: MirrorMap) -> dict[str, Any]:
    """A map's name, the plain attributes that its tensors do not show, and its tensors."""
    options = {
        f"{path}.{key}".removeprefix("."): _plain(value)
        for path, module in mirror_map.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not key.startswith("_")
        and key != "training"
    }
    return {
        "version": _VERSION,
        "name": mirror_map.name,
        "options": options,
        "state": dict(mirror_map.state_dict()),
    }


def _check_same(mirror_map: MirrorMap, saved: Any) -> None:
    if saved is None:
        raise InputError(f"the checkpoint's groups have no mirror_map: {_ADVICE}")
    mine = _pack(mirror_map)
    version = checked(saved, "mirror_map", dict).get("version")
    if checked(version, "version of the mirror_map", int) != _VERSION:
        raise InputError(
            f"the checkpoint's mirror_map is of version {version}, this mirror_opt reads "
            f"{_VERSION}: use the mirror_opt that saved it"
        )
    name = checked(saved.get("name"), "name of the mirror_map", str)
    if name != mine["name"]:
        raise InputError(
            f"the checkpoint is of mirror map {name!r} and this group's is "
            f"{mine['name']!r}: construct the optimizer with the map that was saved"
        )
    # torch.distributed.checkpoint drops what is empty.
    found = {**{key: {} for key in ("options", "state") if not mine[key]}, **saved}
    options = checked(found.get("options"), "options of the mirror_map", dict)
    # Options that only one side knows were added or dropped between two versions of the map.
    for key in options.keys() & mine["options"].keys():
        theirs = checked(options[key], f"option {key} of the mirror_map", int, float, str)
        _check_equal(name, key, theirs, mine["options"][key])
    state = checked(found.get("state"), "state of the mirror_map", dict)
    theirs, ours = _shapes(state), _shapes(mine["state"])
    for key in theirs | ours:
        _check_equal(name, f"{key} of shape", theirs.get(key), ours.get(key))
    for key, value in state.items():
        _check_numbers(value, f"{key} of the mirror_map")


def _check_equal(name: str, what: str, theirs: Any, mine: Any) -> None:
    if theirs != mine:
        raise InputError(
            f"the checkpoint's mirror map {name!r} has {what} {theirs}, this group's has {mine}: "
            "construct the map with the options and parameters that were saved"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(checked(value, f"{key} of the mirror_map", Tensor).shape)
        for key, value in state.items()
    }


def _check_group(own: Group, group: Group) -> None:
    """Raises InputError for options or names that a group cannot have."""
    missing = {"lr", "momentum", "weight_decay"} - group.keys()  # every version has saved these
    if missing:
        raise InputError(f"the checkpoint's group has no {', '.join(sorted(missing))}: {_ADVICE}")
    # Schedulers leave a rate that ends at zero a rounding error below it.
    lr = group["lr"]
    if (is_number(lr) or (isinstance(lr, Tensor) and lr.numel() == 1)) and -_ROUNDING <= lr < 0:
        lr = 0.0
    check_options({**group, "mirror_map": own["mirror_map"], "lr": lr})
    check_rounding(group)
    names = checked(group.get("param_names", []), "param_names", list)
    for name in names:
        checked(name, "name of a parameter", str)
    if "param_names" in group and len(names) != len(group["params"]):
        raise InputError(
            f"the checkpoint's group has {len(names)} param_names for {len(group['params'])} "
            f"parameters: {_ADVICE}"
        )


def _check_state(value: Any, p: Tensor, what: str) -> None:
    """Raises InputError unless a parameter's state is a tensor that belongs to it."""
    shape = checked(value, what, Tensor).shape
    if shape != p.shape:
        raise InputError(
            f"the checkpoint's {what} has shape {tuple(shape)}: load a checkpoint of the same model"
        )
    _check_numbers(value, what)


def _check_numbers(value: Tensor, what: str) -> None:
    if not value.is_floating_point() or value.layout is not torch.strided:
        raise InputError(
            f"the checkpoint's {what} is of {value.dtype} and {value.layout}, not of a floating "
            f"dtype and strided: {_ADVICE}"
        )
