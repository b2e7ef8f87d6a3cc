r"""How kernels see the operands of a separable map: as rows that share coefficients.

An operator takes u ``(*)``, gain and units ``(K, *)`` that broadcast along u. Kernels take

    u ``(rows, n)``,   w, s, c ``(K, columns)``,   gain ``(gain_rows, n)``,

contiguous, where row r has the coefficients of column ``r % columns`` and the gains of row
``r % gain_rows``, and ``gain_rows`` is a multiple of ``columns``. Coefficients for each output
channel of a weight, for each element of a vector, and for each task of a batch all have this form;
what has not is expanded to it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mirror_opt.backends.step import CHANGED, Step

__all__ = ["Rows", "contiguous", "unserved", "write_back"]


class _Layout(NamedTuple):
    rows: int
    n: int
    columns: int
    gain_rows: int
    lead: int  # leading dimensions of u that make up the rows
    expand_units: bool
    expand_gain: bool


@lru_cache(maxsize=4096)
def _layout(u: tuple[int, ...], gain: tuple[int, ...], units: tuple[int, ...]) -> _Layout:
    lead = len(u)
    # Long rows, even where a gain is then written out along them.
    while lead and units[lead - 1] == 1:
        lead -= 1
    rows, n = math.prod(u[:lead]), math.prod(u[lead:])
    first = _shared_dims(u[:lead], units[:lead])
    first_gain = _shared_dims(u[:lead], gain[:lead])
    expand_units = first is None
    first = 0 if first is None else first
    expand_gain = first_gain is None or first_gain > first or gain[lead:] != u[lead:]
    columns = math.prod(u[first:lead])
    gain_rows = math.prod(u[:lead] if expand_gain else u[first_gain:lead])
    return _Layout(rows, n, columns, gain_rows, lead, expand_units, expand_gain)


def _shared_dims(full: tuple[int, ...], part: tuple[int, ...]) -> int | None:
    """How many leading dimensions ``part`` broadcasts over, if it has all the others; else None."""
    shared = 0
    while shared < len(full) and part[shared] == 1:
        shared += 1
    while shared and full[shared - 1] == 1:  # either will do, and fewer shared rows are simpler
        shared -= 1
    return shared if part[shared:] == full[shared:] else None


class Rows:
    """The operands of one call as rows, and the way back.

    Attributes:
        u: ``(rows, n)``.
        gain: ``(gain_rows, n)``.
        units: w, s and c, each ``(K, columns)``.
    """

    def __init__(self, u: Tensor, gain: Tensor, units: Sequence[Tensor]):
        count, *shape = units[0].shape
        layout = _layout(tuple(u.shape), tuple(gain.shape), tuple(shape))
        self._shape, self._gain_shape, self._units_shape = u.shape, gain.shape, units[0].shape
        self._layout = layout
        if layout.expand_gain:
            gain = gain.expand(u.shape)
        if layout.expand_units:
            units = [x.expand(count, *u.shape[: layout.lead], *shape[layout.lead :]) for x in units]
        self.u = u.reshape(layout.rows, layout.n).contiguous()
        self.gain = gain.reshape(layout.gain_rows, layout.n).contiguous()
        self.units = [x.reshape(count, layout.columns).contiguous() for x in units]

    def like_u(self, x: Tensor) -> Tensor:
        """``(rows, n)`` as rows of an operand shaped as u."""
        return x.reshape(self._layout.rows, self._layout.n).contiguous()

    def shaped(self, x: Tensor) -> Tensor:
        """``(rows, n)`` back in the shape of u."""
        return x.view(self._shape)

    def gain_gradient(self, x: Tensor) -> Tensor:
        """The gradient ``(rows, n)`` of each element's own gain, as that of the gain."""
        return x.view(self._shape).sum_to_size(self._gain_shape)

    def units_gradient(self, x: Tensor) -> Tensor:
        """A gradient ``(K, columns)`` as that of w, s or c."""
        if self._layout.expand_units:
            lead = self._layout.lead
            rest = [1] * (len(self._shape) - lead)
            return x.view(len(x), *self._shape[:lead], *rest).sum_to_size(self._units_shape)
        return x.view(self._units_shape)


def unserved(
    x: Tensor, dtypes: Sequence[torch.dtype], sigma: str, units: int = 0, most: int = 0
) -> str | None:
    """Why kernels of these dtypes, the algebraic sigma and at most so many units do not serve."""
    if x.dtype not in dtypes:
        return f"it takes {', '.join(map(str, dtypes))} and got {x.dtype}"
    if sigma != "algebraic":
        return f"it has sigma='algebraic' only and got {sigma!r}"
    if units > most:
        return f"it takes up to {most} units and got {units}"
    return None


def contiguous(xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, contiguous: the same list where there is nothing to do."""
    return xs if all(map(Tensor.is_contiguous, xs)) else [x.contiguous() for x in xs]


def write_back(step: Step, rows: Sequence[Sequence[Tensor]]) -> None:
    """Copies what a step changed in contiguous ``rows`` of its lists into the lists themselves."""
    for xs, copies in [(step.lists[i], rows[i]) for i in CHANGED]:
        if copies is not xs:
            for old, new in zip(xs, copies, strict=True):
                if new is not old:
                    old.copy_(new)
