"""Parameters that are spread over processes (``DTensor``): what a step does with the shards.

FSDP2 and tensor parallelism make parameters DTensors. All of a step but its map is elementwise and
runs on the local shards, and so does the map where it couples no entries across a cut. A tensor
that is cut along a dimension that the map couples (``MirrorMap.coupled``) is gathered along that
dimension, on its way into the map only, and each process keeps its shard of what comes out.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mirror_opt.errors import InputError
from mirror_opt.maps import MirrorMap

# DTensors are Any to the type checker, since torch imports them apart.

__all__ = [
    "OnShards",
    "anywhere",
    "check_placements",
    "from_shard",
    "gradient",
    "is_elsewhere",
    "is_sharded",
    "largest",
    "local",
    "meshes",
    "on_shards",
    "placed_as",
    "shard_index",
    "united",
    "whole",
]


_PLAIN = frozenset((Tensor, nn.Parameter))


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor."""
    if type(x) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # half a second, for those who need it

    return isinstance(x, DTensor)


def local(x: Any) -> Tensor:
    """The shard that this process holds, in the same memory; of a plain tensor itself."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Any) -> Tensor:
    """The tensor of all processes; of a plain tensor itself."""
    return x.full_tensor() if is_sharded(x) else x


def placed_as(x: Any, p: Any) -> Tensor:
    """A tensor in the shape of p, spread as p is."""
    if not is_sharded(p):
        return whole(x)
    if not is_sharded(x):
        x = _on_mesh(x, p, _replicated(p))
    return x.redistribute(p.device_mesh, p.placements)


def from_shard(x: Any, p: Any) -> Tensor:
    """The tensor in the shape of p whose local shard is x; of a plain tensor x itself."""
    return _on_mesh(x, p, p.placements) if is_sharded(p) else x


def shard_index(p: Any) -> tuple[int, ...]:
    """Which of the shards of p this process holds; equal where they hold the same."""
    if not is_sharded(p):
        return ()
    at = p.device_mesh.get_coordinate()
    return tuple(i for i, placement in zip(at, p.placements, strict=True) if _is_cut(placement))


def gradient(p: Any) -> Tensor:
    """The gradient of p, spread as p is, or as it is where it is sparse."""
    if not is_sharded(p) or p.grad.layout != torch.strided:
        return p.grad
    return placed_as(p.grad, p)


def check_placements(params: Iterable[Any]) -> None:
    """Raises InputError for a parameter that is placed in a way that steps do not support."""
    for i, p in enumerate(params):
        for placement in p.placements if is_sharded(p) else ():
            if not (placement.is_replicate() or _is_cut(placement)):
                raise InputError(
                    f"parameter {i} of its group is placed as {tuple(p.placements)}: pass one "
                    "whose placements are Shard or Replicate, as redistribute() makes it"
                )


def is_elsewhere(p: Any) -> bool:
    """Whether p is a DTensor of other processes than this one."""
    return is_sharded(p) and p.device_mesh.get_coordinate() is None


def meshes(params: Iterable[Any]) -> list:
    """The device meshes of the parameters that this process takes part in, each once."""
    held = (p for p in params if is_sharded(p) and not is_elsewhere(p))
    return list(dict.fromkeys(p.device_mesh for p in held))


def anywhere(flags: Tensor, meshes: Iterable) -> Tensor:
    """Not zero where the flags (as ``found_inf``) are not zero in some process of the meshes."""
    for mesh in meshes:
        flags = largest((flags != 0).to(mesh.device_type, torch.int32), mesh).float()
    return flags


def largest(x: Tensor, mesh: Any) -> Tensor:
    """The largest of x over the processes of a mesh, entry by entry, in place."""
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group)
    return x


def united(params: Sequence[Any], *sets: Collection[Any]) -> list[set]:
    """The union of sets of parameters over all processes, one for each set."""
    table = torch.tensor([[float(p in some) for some in sets] for p in params], device="cpu")
    rows = anywhere(table, meshes(params)).tolist()
    return [{p for p, row in zip(params, rows, strict=True) if row[i]} for i in range(len(sets))]


class OnShards:
    """A mirror map as a function of the local shards of its tensors.

    Args:
        mirror_map: the map of the whole tensors, whose own tensors every process holds.
        params: one parameter for each of its tensors, some of them DTensors.
    """

    def __init__(self, mirror_map: MirrorMap, params: Sequence[Any]):
        self.whole, self.entrywise = mirror_map, mirror_map.entrywise
        self._params = params
        # For each tensor, how it is placed when it goes into the map.
        self._inside: list[Any] = [
            _uncut(p, mirror_map.coupled(p.dim())) if is_sharded(p) else None for p in params
        ]

    @property
    def gathers(self) -> bool:
        """Whether processes have to meet for the map, which couples entries across a cut."""
        pairs = zip(self._params, self._inside, strict=True)
        return any(to is not None and to != tuple(p.placements) for p, to in pairs)

    def __call__(self, xs: Sequence[Tensor | None], coefficients: Any = None) -> list:
        return self._apply(self.whole, xs, coefficients)

    def inverse(self, zs: Sequence[Tensor | None], coefficients: Any = None) -> list:
        return self._apply(self.whole.inverse, zs, coefficients)

    def coefficients(self) -> Sequence[Any] | None:
        """Those of the map, each with the part that its tensor's shard meets."""
        coefficients = self.whole.coefficients()
        if coefficients is None:
            return None
        if not any(_is_cut(q) for at in self._inside for q in at or ()):
            # The map gets whole tensors, and its coefficients need not be one for each of them.
            return tree_map_only(Tensor, whole, coefficients)
        return [
            c if at is None else tree_map_only(Tensor, functools.partial(_part, p=p, at=at), c)
            for c, p, at in zip(coefficients, self._params, self._inside, strict=True)
        ]

    def _apply(self, function: Callable, xs: Sequence[Any], coefficients: Any) -> list:
        coefficients = self.coefficients() if coefficients is None else coefficients
        moves = list(zip(self._params, self._inside, strict=True))
        # All of them before the map runs, and so in every process, whatever the map then raises.
        xs = [_moved(x, p, p.placements, to) if _is_moved(x, p, to) else x
              for x, (p, to) in zip(xs, moves, strict=True)]  # fmt: skip
        ys = function(xs, coefficients)
        return [_moved(y, p, to, p.placements) if _is_moved(y, p, to) else y
                for y, (p, to) in zip(ys, moves, strict=True)]  # fmt: skip


def on_shards(mirror_map: MirrorMap, params: Sequence[Any]) -> MirrorMap | OnShards:
    """The map as a function of local shards: itself where no parameter is a DTensor."""
    return OnShards(mirror_map, params) if any(map(is_sharded, params)) else mirror_map


def _is_cut(placement: Any) -> bool:
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    return isinstance(placement, Shard | _StridedShard)  # the latter: FSDP2 over tensor parallelism


def _replicated(p: Any) -> list:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * p.device_mesh.ndim


def _uncut(p: Any, dims: Sequence[int]) -> tuple:
    """The placements of p with none that cuts these dimensions."""
    pairs = zip(p.placements, _replicated(p), strict=True)
    return tuple(r if _is_cut(q) and q.dim in dims else q for q, r in pairs)


def _is_moved(x: Tensor | None, p: Any, inside: tuple | None) -> bool:
    return x is not None and inside is not None and inside != tuple(p.placements)


def _moved(x: Tensor, p: Any, before: Sequence, after: Sequence) -> Tensor:
    """The shard, once placed otherwise, of the tensor in the shape of p whose shard is x."""
    return _on_mesh(x, p, before).redistribute(placements=after).to_local()


def _on_mesh(x: Tensor, p: Any, placements: Sequence) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        x, p.device_mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def _part(x: Any, p: Any, at: Sequence) -> Tensor:
    """What p, placed so, meets of a coefficient ``(*lead, *)`` with ``(*)`` broadcastable to p."""
    from torch.distributed.tensor import DTensor

    if not any(map(_is_cut, at)):
        return whole(x)
    pairs = zip(at, _replicated(p), strict=True)
    lead = x.dim() - p.dim()
    own = [q if _is_cut(q) and x.shape[lead + q.dim] > 1 else r for q, r in pairs]
    if is_sharded(x):  # made from p, and so in its shape
        return x.redistribute(placements=own).to_local()
    first, last = list(range(lead)), list(range(-lead, 0))
    x = x.movedim(first, last)
    x = DTensor.from_local(x, p.device_mesh, _replicated(p), run_check=False)
    return x.redistribute(placements=own).to_local().movedim(last, first)
