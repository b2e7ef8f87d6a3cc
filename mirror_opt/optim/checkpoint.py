"""What a checkpoint of MirrorDescent holds, and what it must agree with when it is loaded."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mirror_opt.errors import InputError
from mirror_opt.maps import MirrorMap
from mirror_opt.optim.options import Group, check_options, parameter_name, state_dtype
from mirror_opt.optim.sharded import placed_as

__all__ = ["adopt", "hide_state", "pack_maps"]

State = dict[Any, dict[str, Any]]


@dataclass(frozen=True)
class _Hidden:
    """State that ``Optimizer.load_state_dict`` passes on as it is, since it knows no such type."""

    value: Any


def pack_maps(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Post-hook of ``state_dict``: every map as plain values."""
    for group in state_dict["param_groups"]:
        group["mirror_map"] = _pack(group["mirror_map"])


def hide_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Pre-hook of ``load_state_dict``: keeps state from being cast to its parameter's dtype."""
    ids = {p for group in state_dict["param_groups"] for p in group["params"]}
    state = {
        p: {key: _Hidden(value) for key, value in values.items()} if p in ids else values
        for p, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def adopt(mine: list[Group], groups: list[Group], state: State) -> None:
    """Turns loaded groups and state, both changed in place, into those of an optimizer.

    Args:
        mine: the optimizer's groups, whose maps are kept and receive the saved tensors.
        groups: the loaded groups, which have the optimizer's parameters already.
        state: the loaded state, hidden.

    Raises:
        InputError: another map, or tensors of other shapes. Nothing has changed then.
    """
    maps = [group["mirror_map"] for group in mine]
    for mirror_map, group in zip(maps, groups, strict=True):
        _check_same(mirror_map, group.get("mirror_map"))
        check_options({**group, "mirror_map": mirror_map})
        for slot, p in enumerate(group["params"]):
            for key, hidden in state.get(p, {}).items():
                shape = getattr(hidden.value, "shape", None)
                if shape != p.shape:
                    raise InputError(
                        f"the checkpoint's {key} of {parameter_name(group, slot)} has shape "
                        f"{shape and tuple(shape)}: load a checkpoint of the same model"
                    )
    for mirror_map, group in zip(maps, groups, strict=True):
        mine_now = mirror_map.state_dict()
        saved = group["mirror_map"]["state"]
        mirror_map.load_state_dict({k: placed_as(v, mine_now[k]) for k, v in saved.items()})
        group["mirror_map"] = mirror_map
        for p in dict.fromkeys(group["params"]):
            dtype = state_dtype(p, group)
            if p in state:
                # A copy, since steps write in place and the checkpoint stays the caller's.
                state[p] = {
                    key: placed_as(hidden.value.to(p.device, dtype, copy=True), p)
                    for key, hidden in state[p].items()
                }


def _pack(mirror_map: MirrorMap) -> dict[str, Any]:
    """A map's name, the plain attributes that its tensors do not show, and its tensors."""
    options = {
        f"{path}.{key}".removeprefix("."): value
        for path, module in mirror_map.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not key.startswith("_")
        and key != "training"
    }
    return {"name": mirror_map.name, "options": options, "state": dict(mirror_map.state_dict())}


def _check_same(mirror_map: MirrorMap, saved: Any) -> None:
    if not isinstance(saved, dict) or saved.keys() != {"name", "options", "state"}:
        raise InputError(
            f"the checkpoint's mirror_map is {saved!r}: load what MirrorDescent.state_dict() gave"
        )
    mine = _pack(mirror_map)
    if saved["name"] != mine["name"]:
        raise InputError(
            f"the checkpoint is of mirror map {saved['name']!r} and this group's is "
            f"{mine['name']!r}: construct the optimizer with the map that was saved"
        )
    # Options that only one side knows were added or dropped between two versions of the map.
    for key in saved["options"].keys() & mine["options"].keys():
        _check_equal(mine["name"], key, saved["options"][key], mine["options"][key])
    theirs, ours = _shapes(saved["state"]), _shapes(mine["state"])
    for key in theirs | ours:
        _check_equal(mine["name"], f"{key} of shape", theirs.get(key), ours.get(key))


def _check_equal(name: str, what: str, theirs: Any, mine: Any) -> None:
    if theirs != mine:
        raise InputError(
            f"the checkpoint's mirror map {name!r} has {what} {theirs}, this group's has {mine}: "
            "construct the map with the options and parameters that were saved"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}
