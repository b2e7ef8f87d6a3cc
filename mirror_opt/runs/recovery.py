r"""Going back to where training was sound.

A meta-step can carry the map to where the inner loop explodes on every task; there no meta-gradient
is finite, and skipping iterations would be all that is left of the run. So a sound state is kept,
and training goes on from it, with other tasks.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

__all__ = ["Recovery"]

_EVERY = 10  # sound iterations between two states that are kept
_SPIKE = 100.0  # a loss that exceeds the running mean by this factor is not sound
_MEMORY = 0.9  # of the running mean


class Recovery:
    r"""Keeps a sound state of a module and its optimizer, and returns to it."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._module, self._optimizer = module, optimizer
        self._mean: float | None = None
        self._since = 0
        self._kept: dict[str, Any] | None = None

    def sound(self, loss: float, norm: float) -> bool:
        r"""Whether an iteration with this loss and gradient norm may be taken."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        return finite and (self._mean is None or loss <= _SPIKE * self._mean)

    def keep(self, loss: float) -> None:
        r"""Called before each sound step: keeps the state now and then."""
        self._mean = loss if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * loss
        if self._kept is None or self._since == _EVERY:
            module, optimizer = self._module.state_dict(), self._optimizer.state_dict()
            self._kept = copy.deepcopy({"module": module, "optimizer": optimizer})
            self._since = 0
        self._since += 1

    def restore(self) -> None:
        r"""Returns to the state that was kept, if there is one."""
        if self._kept is not None:
            self._module.load_state_dict(self._kept["module"])
            self._optimizer.load_state_dict(copy.deepcopy(self._kept["optimizer"]))
            self._since = 0

    def state_dict(self) -> dict[str, Any]:
        r"""Tensors and plain values."""
        return {"mean": self._mean, "since": self._since, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Reads :meth:`state_dict` back."""
        self._mean, self._since, self._kept = state["mean"], state["since"], state["kept"]
