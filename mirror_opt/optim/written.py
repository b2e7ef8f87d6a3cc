"""Who has written to parameters beside a dual state: their optimizer, or others since."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_opt.maps import MirrorMap
from mirror_opt.optim.options import Group, keeps_dual
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.sharded import local

__all__ = ["Written"]


class Written:
    """What steps have left of the groups that keep a dual state.

    Args:
        doubtful: whether others may have written before the first step, as after loading.
    """

    def __init__(self, doubtful: bool = False) -> None:
        self._left: dict[int, _Left] = {}  # of groups, by their id
        self._doubtful = doubtful

    def changed(self, group: Group) -> tuple[Collection[Tensor], Collection[Tensor]]:
        """Parameters beside a dual state that do not hold what a step has written there.

        And those of which only their values tell.
        """
        if not keeps_dual(group):
            return (), ()
        left = self._left.get(id(group))
        if left is None:
            return (), set(group["params"]) if self._doubtful else ()
        other_map = left.mirror_map is not group["mirror_map"]
        changed, doubtful = set(), set()
        for p, q, then in zip(group["params"], left.params, left.versions, strict=False):
            if p is not q:
                continue
            if then is None or not then.counts:
                doubtful.add(p)
            if other_map or (then is not None and not _version(p).follows(then)):
                changed.add(p)
        return changed, doubtful

    def record(self, lists: Lists) -> None:
        """Keeps what a step has left, and for parameters without a gradient what an earlier has."""
        params = list(lists.group["params"])
        now: list[_Version | None] = [*map(_version, params)]
        left = self._left.get(id(lists.group))
        if len(lists.slots) < len(params):
            stepped = set(lists.slots)
            for i, p in enumerate(params):
                if i in stepped:
                    continue
                if left is None:
                    now[i] = None if self._doubtful else now[i]
                elif i < len(left.params) and p is left.params[i]:
                    now[i] = left.versions[i]
        self._left[id(lists.group)] = _Left(params, now, lists.group["mirror_map"])


class _Left(NamedTuple):
    params: list[Tensor]
    versions: list["_Version | None"]  # None: not known
    mirror_map: MirrorMap


class _Version(NamedTuple):
    """What tells that others have written to a parameter, or given it other memory."""

    counts: tuple[int, ...]  # of writes in place that torch knows of: to the whole, to its shard
    address: int
    dtype: torch.dtype

    def follows(self, other: "_Version") -> bool:
        """Whether nobody has written since the other; a conversion to another dtype is no write."""
        if self.counts != other.counts:
            return False
        return self.address == other.address or self.dtype != other.dtype


def _version(p: Any) -> _Version:
    """The present version of a parameter."""
    shard = local(p)
    # Of an inference tensor there is no count.
    counts = () if p.is_inference() else (p._version, shard._version)
    return _Version(counts, shard.data_ptr(), p.dtype)
