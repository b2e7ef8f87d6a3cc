"""The step in blocks that stay in the cache, for maps that treat every entry by itself.

Every operation of a step makes a tensor: over all parameters at once that is many passes through
memory, and many times the size of the parameters. A block's tensors are small and used at once.
"""

from collections.abc import Iterator
from typing import Any

import torch

from mirror_opt.maps import MirrorMap
from mirror_opt.optim.update import Tensors, Update, is_zero, mirror_descent

__all__ = ["step"]

# torch gives a thread to every so many entries of an elementwise operation.
_GRAIN = 32768


def _size() -> int:
    """The entries of a block: work for all threads, and more than the calls take themselves."""
    return _GRAIN * max(4, torch.get_num_threads())


def step(*lists: Tensors, **options: Any) -> Update:
    """As ``mirror_descent``, which says what they are; block by block where that pays."""
    params, _, buffers, _, _, duals = lists
    if not _pays(params, **options):
        return mirror_descent(*lists, **options)
    every = options["mirror_map"].coefficients()
    own = [every[slot] for slot in options["slots"]] if every is not None else []
    new = Update(*([x.new_empty(x.shape) for x in old] for old in (params, buffers, duals)))
    for block in _blocks((*lists, own, *new)):
        given, coefficients, results = block[: len(lists)], block[len(lists)], block[-len(new) :]
        count = len(given[0])
        options |= {"slots": [*range(count)], "count": count, "coefficients": coefficients or None}
        if options["draws"] is not None:
            options["draws"] = [None] * count
        for xs, ys in zip(results, mirror_descent(*given, **options), strict=True):
            for x, y in zip(xs, ys, strict=True):
                x.copy_(y)
    return new


def _pays(params: Tensors, **options: Any) -> bool:
    mirror_map = options["mirror_map"]
    return (
        isinstance(mirror_map, MirrorMap)
        and mirror_map.entrywise
        and not (options["foreach"] or options["differentiable"])
        and not (torch.compiler.is_compiling() or is_zero(options["lr"]))
        and all(p.is_cpu for p in params)
        and sum(p.numel() for p in params) > _size()
    )


def _blocks(lists: tuple[Tensors, ...]) -> Iterator[list[Tensors]]:
    """Pieces of all lists alike, at most ``_size()`` entries of each at once."""
    size = _size()
    block: list[Tensors] = [[] for _ in lists]
    held = 0
    for i in range(len(lists[0])):
        pieces = [x[i].reshape(-1).split(size) if x else () for x in lists]
        for j, piece in enumerate(pieces[0]):
            if held + piece.numel() > size:
                yield block
                block, held = [[] for _ in lists], 0
            held += piece.numel()
            for xs, of_list in zip(block, pieces, strict=True):
                xs.extend(of_list[j : j + 1])
    yield block
