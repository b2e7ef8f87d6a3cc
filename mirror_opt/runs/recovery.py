r"""Going back to where training was sound.

A meta-step can carry the map to where the inner loop is no longer stable. There the meta-gradient
grows by orders of magnitude and points anywhere, training drifts off without any loss that would
tell, or the loop explodes on every task, and skipping iterations would be all that is left of the
run. So sound states are kept, and training goes on from the last of them, with other tasks and
lower rates, which then come back: a run at rates that are too high finds those that it can bear. A
state from which training soon fails again was not sound after all, however low the rates: then the
one before it is next.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Recovery"]

_EVERY = 10  # sound iterations that make a state
# A loss or a norm that exceeds its running geometric mean by this factor is not sound.
_LOSS_SPIKE, _NORM_SPIKE = 100.0, 10.0
_MEMORY = 0.9  # of the running means
_BACK_OFF, _GROWTH = 0.5, 1.01  # of the rates, at a return and in a sound iteration


def _log(x: float) -> float:
    return math.log(max(x, 1e-30))


class _Kept(NamedTuple):
    """A state, and the sound iterations before it."""

    time: int
    state: dict[str, Any]


class Recovery:
    r"""Keeps sound states of a module and its optimizer, and returns to them.

    The states that are kept are about twice as far back each as the one after it; the first is
    always among them.

    Attributes:
        rate: the factor on every outer rate, in (0, 1]: halved at each return.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._module, self._optimizer = module, optimizer
        self.rate = 1.0
        self._means: tuple[float, float] | None = None  # of the logarithms of loss and norm
        self._time = 0  # in sound iterations; goes back with the state
        self._kept: list[_Kept] = []  # the latest last
        self._returned = False  # to the latest, which no later one has replaced yet

    def sound(self, loss: float, norm: float) -> bool:
        r"""Whether an iteration with this loss and gradient norm may be taken."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        if self._means is None:
            return True
        usual_loss, usual_norm = map(math.exp, self._means)
        return loss <= _LOSS_SPIKE * usual_loss and norm <= _NORM_SPIKE * usual_norm

    def keep(self, loss: float, norm: float) -> None:
        r"""Called before each sound step: keeps the state now and then."""
        seen = (_log(loss), _log(norm))
        before = seen if self._means is None else self._means
        loss, norm = (_MEMORY * m + (1 - _MEMORY) * x for m, x in zip(before, seen, strict=True))
        self._means = loss, norm
        self.rate = min(1.0, _GROWTH * self.rate)
        if not self._kept or self._time == self._kept[-1].time + _EVERY:
            module, optimizer = self._module.state_dict(), self._optimizer.state_dict()
            state = copy.deepcopy({"module": module, "optimizer": optimizer})
            self._kept = _thinned([*self._kept, _Kept(self._time, state)])
            self._returned = False
        self._time += 1

    def restore(self) -> None:
        r"""Returns to the last sound state, if there is one, with half the rates."""
        self.rate *= _BACK_OFF
        if not self._kept:
            return
        if self._returned and len(self._kept) > 1:
            self._kept.pop()
        self._time, state = self._kept[-1]
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._returned = True

    def state_dict(self) -> dict[str, Any]:
        r"""Tensors and plain values."""
        return {
            "means": None if self._means is None else list(self._means),
            "time": self._time,
            "kept": [tuple(kept) for kept in self._kept],
            "returned": self._returned,
            "rate": self.rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Reads :meth:`state_dict` back."""
        self.rate, self._time, self._returned = state["rate"], state["time"], state["returned"]
        self._kept = [_Kept(*kept) for kept in state["kept"]]
        self._means = None if state["means"] is None else tuple(state["means"])


def _thinned(kept: list[_Kept]) -> list[_Kept]:
    """Without those whose neighbours are close enough: the earlier no more than twice as far back.

    Ages are counted from when the next state is due, so that the latest has one too.
    """
    due = kept[-1].time + _EVERY
    for i in range(len(kept) - 2, 0, -1):
        if due - kept[i - 1].time <= 2 * (due - kept[i + 1].time):
            kept = kept[:i] + kept[i + 1 :]
    return kept
