r"""Going back to where training was sound.

A meta-step can carry the map to where the inner loop is no longer stable. There the meta-gradient
grows by orders of magnitude and points anywhere, training drifts off without any loss that would
tell, or the loop explodes on every task, and skipping iterations would be all that is left of the
run. So a sound state is kept, and training goes on from it, with other tasks and lower rates, which
then come back: a run at rates that are too high finds those that it can bear.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

__all__ = ["Recovery"]

_EVERY = 10  # sound iterations between two states that are kept
# A loss or a norm that exceeds its running geometric mean by this factor is not sound.
_LOSS_SPIKE, _NORM_SPIKE = 100.0, 10.0
_MEMORY = 0.9  # of the running means
_BACK_OFF, _GROWTH = 0.5, 1.01  # of the rates, at a return and in a sound iteration


def _log(x: float) -> float:
    return math.log(max(x, 1e-30))


class Recovery:
    r"""Keeps a sound state of a module and its optimizer, and returns to it.

    Attributes:
        rate: the factor on every outer rate, in (0, 1]: halved at each return.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._module, self._optimizer = module, optimizer
        self.rate = 1.0
        self._means: tuple[float, float] | None = None  # of the logarithms of loss and norm
        self._since = 0
        self._kept: dict[str, Any] | None = None

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
        if self._kept is None or self._since == _EVERY:
            module, optimizer = self._module.state_dict(), self._optimizer.state_dict()
            self._kept = copy.deepcopy({"module": module, "optimizer": optimizer})
            self._since = 0
        self._since += 1

    def restore(self) -> None:
        r"""Returns to the state that was kept, if there is one, with half the rates."""
        self.rate *= _BACK_OFF
        if self._kept is not None:
            self._module.load_state_dict(self._kept["module"])
            self._optimizer.load_state_dict(copy.deepcopy(self._kept["optimizer"]))
            self._since = 0

    def state_dict(self) -> dict[str, Any]:
        r"""Tensors and plain values."""
        means = None if self._means is None else list(self._means)
        return {"means": means, "since": self._since, "kept": self._kept, "rate": self.rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Reads :meth:`state_dict` back."""
        self._since, self._kept, self.rate = state["since"], state["kept"], state["rate"]
        self._means = None if state["means"] is None else tuple(state["means"])
