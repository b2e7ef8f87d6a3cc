"""Who has written to parameters beside a dual state: their optimizer, or others since."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from mirror_opt.maps import MirrorMap
from mirror_opt.optim.options import Group, keeps_dual
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.sharded import local

__all__ = ["Written"]


class Written:
    """What steps have left of the parameters beside a dual state.

    Args:
        doubtful: whether others may have written before the first step, as after loading.
    """

    def __init__(self, doubtful: bool = False) -> None:
        self._left = WeakTensorKeyDictionary()  # of parameters, a _Record each
        self._doubtful = doubtful

    def changed(self, group: Group) -> tuple[set[Tensor], set[Tensor]]:
        """Parameters beside a dual state that do not hold what a step has written there.

        And those of which only their values tell.
        """
        changed: set[Tensor] = set()
        doubtful: set[Tensor] = set()
        if keeps_dual(group):
            for p in group["params"]:
                then = self._left.get(p)
                if then is None:
                    doubtful |= {p} if self._doubtful else set()
                elif then.mirror_map is not group["mirror_map"] or not then.is_of(p):
                    changed.add(p)
                elif not then.writes:
                    doubtful.add(p)
        return changed, doubtful

    def record(self, lists: Lists) -> None:
        """Keeps what a step has left of the parameters that it has stepped."""
        if lists.duals:
            for slot in lists.slots:
                p = lists.group["params"][slot]
                self._left[p] = _record(p, lists.group["mirror_map"])


class _Record(NamedTuple):
    """What tells that others have written to a parameter, or given it other memory."""

    mirror_map: MirrorMap
    writes: tuple[int, ...]  # in place that torch knows of: to the whole, to its shard
    memory: StorageWeakRef  # by which no other memory can pass for it, at the same address
    offset: Any  # an integer
    dtype: torch.dtype

    def is_of(self, p: Any) -> bool:
        """Whether nobody has written since; a conversion to another dtype is no write."""
        if self.writes != _writes(p):
            return False
        shard = local(p)
        same = shard.untyped_storage()._cdata == self.memory.cdata
        return (same and shard.storage_offset() == self.offset) or p.dtype != self.dtype


def _writes(p: Any) -> tuple[int, ...]:
    # Of an inference tensor there is no count.
    return () if p.is_inference() else (p._version, local(p)._version)


def _record(p: Any, mirror_map: MirrorMap) -> _Record:
    shard = local(p)
    memory = StorageWeakRef(shard.untyped_storage())
    return _Record(mirror_map, _writes(p), memory, shard.storage_offset(), p.dtype)
