r"""What a list of tensors needs before a step can be launched: checks, layouts and tables.

Two tables in device memory describe the work of a launch: ``tensors`` has a row of addresses and
sizes for each tensor, ``programs`` a row for each program. They are made once for a list of tensors
and kept, by addresses, so that a step costs no more than looking them up.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirror_opt.backends.step import Step
from mirror_opt.errors import InputError
from mirror_opt.kernels.separable import check_device

__all__ = ["FIELDS", "NARROW", "WIDE", "Item", "Launch", "lists_of", "plan"]

# Entries of a tile: eight to a thread of a warp where all are of one channel, which is two accesses
# of 16 bytes for float32 and one for a half precision; else one to a thread, which then has room
# for coefficients of its own. Channels below _SHORT would leave half of a wide tile idle.
WIDE, NARROW, _SHORT = 256, 32, 128
# A program does a stretch of up to so many tiles; but work is cut into about _PROGRAMS programs
# first, of wide tiles, which fill a large GPU, and into eight times as many of narrow ones.
_TILES, _NARROW_TILES, _PROGRAMS = 8, 16, 2048

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = 12  # the columns of the table of tensors

Lists = tuple[Sequence[Tensor] | None, ...]


class Item(NamedTuple):
    """One tensor of the list with what belongs to it, all laid out alike; None where absent."""

    param: Tensor
    grad: Tensor
    gain: Tensor | None
    buffer: Tensor | None
    anchor: Tensor | None
    dual: Tensor | None
    dual_init: Tensor | None
    w: Tensor
    s: Tensor
    c: Tensor

    def changed(self) -> tuple[Tensor | None, ...]:
        """What a step writes to."""
        return self.param, self.buffer, self.dual

    def fields(self) -> tuple[int, ...]:
        """The row of the table of tensors."""
        channels = self.w.shape[1]
        addresses = (0 if x is None else x.data_ptr() for x in self)
        return (*addresses, channels, self.param.numel() // channels)


def lists_of(step: Step) -> Lists:
    """The lists of a step in the order of ``Item``, None for those that are empty."""
    lists = (
        step.params, step.grads, step.gains, step.buffers, step.anchors, step.duals,
        step.dual_inits, step.ws, step.ss, step.cs,
    )  # fmt: skip
    return tuple(xs or None for xs in lists)


def _is_wide(row: tuple[int, ...]) -> bool:
    """Whether programs do stretches of a channel: in long channels, at addresses of 16 bytes."""
    return row[-1] >= _SHORT and not any(address % 16 for address in row[:7])


class _Pinned:
    """Page-locked copies of rows on the host, which copies to a device may read when they like.

    While a graph is captured no such memory can be had: the allocator asks the device for blocks
    that are free again, which a capture forbids. So a slab is kept ready for rows of then. They
    are never given back, since a graph may be replayed whenever.
    """

    def __init__(self, allocate: Callable[[int], Tensor]):
        self.allocate = allocate
        self.slab = torch.empty(0, dtype=torch.int64, device="cpu")

    def copy(self, rows: Tensor, capturing: bool) -> Tensor:
        """The int64 ``rows``, page-locked."""
        with _lock:
            if not capturing:
                if self.slab.numel() < _SLAB // 2:
                    self.slab = self.allocate(_SLAB)
                taken = self.allocate(rows.numel())
            elif self.slab.numel() >= rows.numel():
                taken, self.slab = self.slab[: rows.numel()], self.slab[rows.numel() :]
            else:  # the allocator may have a block at hand
                taken = self.allocate(rows.numel())
        return taken.view(rows.shape).copy_(rows)


def _allocate_pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)


_SLAB = 2**18  # rows of graphs of some hundred networks: 2 MiB
_lock = threading.Lock()
_pinned = _Pinned(_allocate_pinned)


class _Table:
    """Rows in device memory, copied there without synchronising."""

    def __init__(self, rows: Tensor, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            rows = _pinned.copy(rows, torch.cuda.is_current_stream_capturing())
        self.host = rows
        self.rows = self.host.to(device, non_blocking=True)
        if self.cuda:
            self.stream = torch.cuda.current_stream()
            self.copied = self.stream.record_event()

    def use(self) -> Tensor:
        """The rows, for a launch on the current stream."""
        if self.cuda and torch.cuda.is_current_stream_capturing():
            # The graph reads the table at every replay. No need to wait: capturing began with a
            # synchronisation, or the copy is part of the graph.
            _captured.append(self)
        elif self.cuda and (stream := torch.cuda.current_stream()) != self.stream:
            stream.wait_event(self.copied)
            self.rows.record_stream(stream)
        return self.rows


class Launch(NamedTuple):
    """The tables of a launch, and what its kernel is compiled for."""

    tensors: _Table
    programs: _Table
    compiled_for: dict[str, Any]


class _Recent(OrderedDict):
    """The values that were used last, by what they were made from."""

    def recall(self, key: Any) -> Any:
        """The value, None where there is none."""
        with _lock:
            if key in self:
                self.move_to_end(key)
            return self.get(key)

    def make(self, key: Any, function: Callable[[], Any]) -> Any:
        value = self.recall(key)
        if value is None:
            value = function()
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return value  # its copy is part of the graph: outside, the table is empty
            with _lock:
                self[key] = value
                if len(self) > _MAX_RECENT:
                    self.popitem(last=False)
        return value


_MAX_RECENT = 64
_recent_launches = _Recent()
_recent_programs = _Recent()
# A graph may be replayed whenever: its tables are kept for good.
_captured: list[_Table] = []


def _programs(shapes: Sequence[tuple[int, int, bool]]) -> Tensor:
    """Rows (tensor, channel or -1, begin, end), int64, for tensors (C, n), wide or not."""
    # Shorter stretches where there is too little work to fill a large GPU with long ones.
    arange = partial(torch.arange, device="cpu")  # whatever the default
    total = sum(channels * n for channels, n, _ in shapes)
    stretch = min(max(total // _PROGRAMS // WIDE, 1), _TILES) * WIDE
    narrow = min(max(total // (8 * _PROGRAMS) // NARROW, 1), _NARROW_TILES) * NARROW
    rows = []
    for i, (channels, n, wide) in enumerate(shapes):
        if wide:
            pieces = triton.cdiv(n, stretch)
            channel = arange(channels).repeat_interleave(pieces)
            begin = channel * n + arange(pieces).repeat(channels) * stretch
            end = torch.minimum(begin + stretch, (channel + 1) * n)
        else:
            begin = arange(0, channels * n, narrow)
            channel = torch.full_like(begin, -1)
            end = (begin + narrow).clamp(max=channels * n)
        rows.append(torch.stack([torch.full_like(begin, i), channel, begin, end], 1))
    return torch.cat(rows)


def _check(item: Item, device: torch.device) -> None:
    """Raises InputError unless the tensors of an item fit each other."""
    param, w = item.param, item.w
    check_device(param)
    shape, channels = tuple(param.shape), w.shape[-1]
    if w.dim() != 2 or channels == 0 or param.numel() % channels:
        raise InputError(
            f"Invalid w of shape {tuple(w.shape)} for a parameter of shape {shape}: pass (K, C), "
            "where C divides its number of elements"
        )
    floats, single = tuple(_DTYPES), (torch.float32,)
    dtypes_of = dict.fromkeys(Item._fields, single)
    dtypes_of |= dict.fromkeys(("param", "grad", "buffer", "anchor"), floats)
    for name, x in item._asdict().items():
        shapes = [tuple(w.shape)] if name in "wsc" else [shape]
        if x is not None and x.device != device:
            raise InputError(f"Invalid {name} on {x.device}: pass tensors on {device}")
        if x is not None and (x.dtype not in dtypes_of[name] or tuple(x.shape) not in shapes):
            raise InputError(
                f"Invalid {name} of shape {tuple(x.shape)} and dtype {x.dtype}: pass "
                f"{' or '.join(map(str, shapes))}, {' or '.join(map(str, dtypes_of[name]))}"
            )
    states = {x.dtype for x in (item.buffer, item.anchor) if x is not None}
    if len(states) > 1:
        raise InputError(f"buffers and anchors of dtypes {states}: pass one dtype for both")


def _laid_out(item: Item) -> Item:
    """The item with all tensors in one order in memory, as they are where that is so already."""
    # A channels-last weight keeps its output channels outermost: it is served as it lies.
    param, layout = item.param, torch.contiguous_format
    if param.dim() == 4 and not param.is_contiguous() and item.w.shape[1] in (1, param.shape[0]):
        layout = torch.channels_last
    return Item(
        *(
            x if x is None
            else x.contiguous(memory_format=layout) if x.shape == param.shape
            else x.contiguous()
            for x in item
        )
    )


def plan(
    lists: Lists, device: torch.device
) -> tuple[list[Launch], list[tuple[Item, Item]]]:
    """The launches of a step, and those items that they see as copies, (original, copy).

    Copies have to live until after the launches, and their ``changed()`` to be copied back.

    Args:
        lists: parameters, gradients, gains, momentum, anchors, dual states, their origins, w, s, c.
        device: of all tensors.

    Raises:
        InputError: tensors do not fit each other.
    """
    # As long as this is the same, so are checks, layouts and tables; asking for more would take
    # longer than a step over a small network.
    key = tuple(
        None if x is None else (
            x.data_ptr(), x.numel(), x.dtype, x.is_contiguous() or x.stride()
        )
        for xs in lists for x in ((None,) if xs is None else xs)
    ) + tuple(w.shape for w in lists[-3])
    launches = _recent_launches.recall(key)
    if launches is not None:
        return launches, []
    params = lists[0]
    if any(xs is not None and len(xs) != len(params) for xs in lists):
        raise InputError(f"lists of {[len(xs or ()) for xs in lists]} tensors: pass one of each")
    absent: Sequence[None] = [None] * len(params)
    given = [Item(*x) for x in zip(*(absent if xs is None else xs for xs in lists), strict=True)]
    for item in given:
        _check(item, device)
    given = [item for item in given if item.param.numel()]
    items = [_laid_out(item) for item in given]
    copies = [
        (old, new) for old, new in zip(given, items, strict=True)
        if any(x is not y for x, y in zip(old, new, strict=True))
    ]
    if copies:  # which have other addresses every time
        return _plan_launches(items, device), copies
    return _recent_launches.make(key, lambda: _plan_launches(items, device)), []


def _plan_launches(items: Sequence[Item], device: torch.device) -> list[Launch]:
    groups = defaultdict(list)
    for item in items:
        state = next((x.dtype for x in (item.buffer, item.anchor) if x is not None), torch.float32)
        key = (item.param.dtype, item.grad.dtype, state, item.w.shape[0], item.gain is not None)
        groups[key].append(item.fields())
    launches = []
    for (param, grad, state, k, gain), rows in groups.items():
        shapes = tuple((*row[-2:], _is_wide(row)) for row in rows)
        programs = _recent_programs.make(
            (device, shapes), lambda shapes=shapes: _Table(_programs(shapes), device)
        )
        compiled_for = {
            "PARAM": _DTYPES[param], "GRAD": _DTYPES[grad], "STATE": _DTYPES[state], "K": k,
            "GAIN": gain,
        }
        tensors = _Table(torch.tensor(rows, device="cpu"), device)
        launches.append(Launch(tensors, programs, compiled_for))
    return launches
