"""The step in blocks, so that what it makes on its way takes little memory and stays in the cache.

Every operation of a step makes a tensor: over all parameters at once that is many passes through
memory, and several times the size of the parameters, beside the result that a step which changes
all or nothing has to hold. Maps that treat every entry by itself go through pieces of tensors, the
others through a few tensors at a time.
"""

import math
from collections.abc import Iterator
from types import EllipsisType

import torch

from mirror_opt.optim.scalars import is_zero, reads_freely
from mirror_opt.optim.sharded import OnShards
from mirror_opt.optim.update import Rule, Tensors, Update, mirror_descent

__all__ = ["step"]


def _most(in_cache: bool) -> int:
    """The entries of a block."""
    if in_cache:
        # torch gives a thread to every so many of an elementwise operation: work for all threads,
        # and more than the calls take themselves.
        return (1 << 15) * max(4, torch.get_num_threads())
    return 1 << 24  # which take an accelerator longer than the launch of a kernel


def step(rule: Rule, *lists: Tensors) -> Update:
    """As ``mirror_descent``, which says what they are; block by block where that pays."""
    params, _, buffers, _, _, duals = lists
    size = _size(params, rule)
    if sum(p.numel() for p in params) <= size:
        return mirror_descent(rule, *lists)
    mirror_map = rule.mirror_map
    every, entrywise = mirror_map.coefficients(), mirror_map.entrywise
    new = Update(*([x.new_empty(x.shape) for x in old] for old in (params, buffers, duals)))

    def seen(xs: Tensors) -> Tensors:
        return [x.reshape(-1) for x in xs] if entrywise else xs

    given, results = [seen(xs) for xs in lists], [seen(xs) for xs in new]
    own = seen([every[slot] for slot in rule.slots]) if entrywise and every is not None else []
    for block in _blocks([p.numel() for p in params], int(size), entrywise):

        def of(xs: Tensors, block: list[_Piece] = block) -> Tensors:
            return [xs[i][entries] for i, entries in block] if xs else []

        draws = rule.draws and [rule.draws[i] for i, _ in block]
        if entrywise:
            # Pieces are in no process's shards, and of no shape that a map was built for.
            part = rule._replace(
                mirror_map=mirror_map.whole if isinstance(mirror_map, OnShards) else mirror_map,
                slots=[*range(len(block))],
                total=len(block),
                draws=draws,
                coefficients=of(own) or None,
            )
        else:
            slots = [rule.slots[i] for i, _ in block]
            part = rule._replace(slots=slots, draws=draws, coefficients=every)
        for old, values in zip(results, mirror_descent(part, *map(of, given)), strict=True):
            for x, y in zip(of(old), values, strict=True):
                x.copy_(y)
    return new


def _size(params: Tensors, rule: Rule) -> float:
    """The entries of a block; infinite where all have to go at once."""
    if rule.differentiable or torch.compiler.is_compiling() or is_zero(rule.lr):
        return math.inf
    entrywise = rule.mirror_map.entrywise
    if isinstance(rule.mirror_map, OnShards) and not entrywise:
        return math.inf  # processes gather alike, and their shards are of unlike sizes
    return _most(in_cache=entrywise and not rule.foreach and reads_freely(params))


_Piece = tuple[int, slice | EllipsisType]  # of which tensor, and which of its entries


def _blocks(counts: list[int], size: int, entrywise: bool) -> Iterator[list[_Piece]]:
    """Pieces of tensors with so many entries, at most ``size`` entries a block.

    Tensors stay whole, and a block has one at least, where entries are not alike.
    """
    block: list[_Piece] = []
    held = 0
    for i, count in enumerate(counts):
        starts = range(0, count, size) if entrywise else range(1)
        for start in starts:
            length = min(size, count - start) if entrywise else count
            if block and held + length > size:
                yield block
                block, held = [], 0
            block.append((i, slice(start, start + length) if entrywise else ...))
            held += length
    yield block
