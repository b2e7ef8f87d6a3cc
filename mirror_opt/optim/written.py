"""Who has written to parameters beside a dual state: their optimizer, or others since."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

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
        self._left: dict[int, _Record] = {}  # of parameters, by their id
        self._doubtful = doubtful

    def changed(self, group: Group) -> tuple[set[Tensor], set[Tensor]]:
        """Parameters beside a dual state that do not hold what a step has written there.

        And those of which only their values tell.
        """
        changed: set[Tensor] = set()
        doubtful: set[Tensor] = set()
        if keeps_dual(group):
            for p in group["params"]:
                then = self._of(p)
                if then is None:
                    doubtful |= {p} if self._doubtful else set()
                elif then.mirror_map is not group["mirror_map"] or not then.is_of(p):
                    then.writes = None  # until a step has been taken from what is there now
                    changed.add(p)
                elif not then.writes:
                    doubtful.add(p)
        return changed, doubtful

    def record(self, lists: Lists) -> None:
        """Keeps what a step has left of the parameters that it has stepped."""
        if not lists.duals:
            return
        for slot in lists.slots:
            p = lists.group["params"][slot]
            then = self._of(p)
            if then is not None and then.writes is not None and then.dtype == p.dtype:
                then.writes = _writes(p)
            else:
                alive = {k: v for k, v in self._left.items() if v.param() is not None}
                self._left = alive | {id(p): _Record(p, lists.group["mirror_map"])}

    def _of(self, p: Tensor) -> "_Record | None":
        record = self._left.get(id(p))
        return record if record is not None and record.param() is p else None


class _Record:
    """What tells that others have written to a parameter, or given it other memory."""

    def __init__(self, p: Any, mirror_map: MirrorMap):
        shard = local(p)
        self.param = weakref.ref(p)
        self.mirror_map = mirror_map
        self.dtype: torch.dtype = p.dtype
        # While it is referred to, no other memory can pass for it, whatever its address.
        self.memory = StorageWeakRef(shard.untyped_storage())
        self.offset = shard.storage_offset()
        self.writes = _writes(p)

    def is_of(self, p: Any) -> bool:
        """Whether nobody has written since; a conversion to another dtype is no write."""
        if self.writes != _writes(p):
            return False
        shard = local(p)
        same = shard.untyped_storage()._cdata == self.memory.cdata
        return (same and shard.storage_offset() == self.offset) or p.dtype != self.dtype


def _writes(p: Any) -> tuple[int, ...] | None:
    """The writes in place that torch has counted, to the whole and to its shard."""
    # Of an inference tensor there is no count.
    return () if p.is_inference() else (p._version, local(p)._version)
