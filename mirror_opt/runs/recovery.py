r"""Going back to where training was sound.

A meta-step can carry the map to where the inner loop is no longer stable. There the meta-gradient
grows by orders of magnitude and points anywhere, training drifts off without any loss that would
tell, or the loop explodes on every task. A single bad batch is none of that: its iteration is left
out. But where the loss rises for good, or many batches are bad, training goes on from a sound state
that was kept, with other tasks and lower rates, which then come back: a run at rates that are too
high finds those that it can bear. A state from which training soon fails again was not sound after
all, however low the rates: then the one before it is next.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from mirror_opt.runs.options import fits

__all__ = ["Recovery", "is_state"]

_EVERY = 10  # iterations that make a state
_MEMORY = 0.9  # of the running means
_LONG_MEMORY = 0.98  # of the running variances
# A batch is bad whose loss or norm exceeds its running geometric mean by this factor, and by this
# many standard deviations of its logarithm: small losses of few examples are heavy-tailed.
_SPIKE, _SPIKE_DEVIATIONS = 100.0, 5.0
# A state is unsound where more than this share of batches are bad, or where the running mean of the
# loss exceeds that of an earlier state by this factor, and by so many of its own deviations.
_BAD, _RISE, _RISE_DEVIATIONS = 0.3, 3.0, 4.0
_BACK_OFF, _GROWTH = 0.5, 1.01  # of the rates, at a return and in an iteration
_LEAST_RATE = 2.0**-10


# The variance of the difference of two running means, in that of a single value.
_OF_DIFFERENCE = 2 * (1 - _MEMORY) / (1 + _MEMORY)


def _log(x: float) -> float:
    return math.log(max(x, 1e-30))


class _Kept(NamedTuple):
    """A state, the iterations that led to it, and the means and variances of then."""

    time: int
    means: tuple[float, float]
    variances: tuple[float, float]
    state: dict[str, Any]


# What a recovery's state dict holds.
_FIELDS = {
    "rate": float,
    "means": tuple[float, ...] | None,
    "variances": tuple[float, ...],
    "bad": float,
    "time": int,
    "kept": list[tuple[Any, ...]],
    "returned": bool,
}


class Recovery:
    r"""Keeps sound states of a module and its optimizer, and returns to them.

    The states that are kept are about twice as far back each as the one after it; the first is
    always among them.

    Attributes:
        rate: the factor on every outer rate, at most 1: halved at each return, to a thousandth.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._module, self._optimizer = module, optimizer
        self.rate = 1.0
        self._means: tuple[float, float] | None = None  # of the logarithms of loss and norm
        self._variances = (0.0, 0.0)
        self._bad = 0.0  # the share of bad batches lately
        self._time = 0  # in iterations that were taken; goes back with the state
        self._kept: list[_Kept] = []  # the latest last
        self._returned = False  # to the latest, which no later one has replaced yet

    def admit(self, loss: float, norm: float) -> bool:
        r"""Whether an iteration with this loss and gradient norm may be taken; call it before.

        Returns to a kept state where the present one is not sound.
        """
        self._bad *= _MEMORY
        if not self._is_usual(loss, norm):
            self._bad += 1 - _MEMORY
            if self._bad > _BAD:
                self._return()
            return False
        seen = (_log(loss), _log(norm))
        before = seen if self._means is None else self._means
        pairs = list(zip(before, seen, strict=True))
        loss, norm = (_MEMORY * m + (1 - _MEMORY) * x for m, x in pairs)
        self._means = loss, norm
        of_loss, of_norm = (
            _LONG_MEMORY * v + (1 - _LONG_MEMORY) * (x - m) ** 2
            for v, (m, x) in zip(self._variances, pairs, strict=True)
        )
        self._variances = of_loss, of_norm
        # The first state's loss is of a single batch, and may be of a lucky one. Norms do not tell:
        # they are heavy-tailed, and of some methods rise tenfold without harm.
        if any(self._has_risen(loss, kept) for kept in self._kept[1:]):
            self._return()
            return False
        self.rate = min(1.0, _GROWTH * self.rate)
        self._keep()
        self._time += 1
        return True

    @staticmethod
    def _has_risen(loss: float, kept: _Kept) -> bool:
        """Whether the mean logarithm of the loss is too far above that of a state."""
        deviation = math.sqrt(_OF_DIFFERENCE * kept.variances[0])
        return loss > kept.means[0] + max(math.log(_RISE), _RISE_DEVIATIONS * deviation)

    def _is_usual(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        if self._means is None:
            return True
        return all(
            _log(x) <= mean + max(math.log(_SPIKE), _SPIKE_DEVIATIONS * math.sqrt(variance))
            for x, mean, variance in zip((loss, norm), self._means, self._variances, strict=True)
        )

    def _keep(self) -> None:
        assert self._means is not None
        if not self._kept or self._time == self._kept[-1].time + _EVERY:
            module, optimizer = self._module.state_dict(), self._optimizer.state_dict()
            state = copy.deepcopy({"module": module, "optimizer": optimizer})
            self._kept = _thinned(
                [*self._kept, _Kept(self._time, self._means, self._variances, state)]
            )
            self._returned = False

    def _return(self) -> None:
        self.rate = max(_LEAST_RATE, self.rate * _BACK_OFF)
        self._bad = 0.0
        if not self._kept:
            return
        if self._returned and len(self._kept) > 1:
            self._kept.pop()
        self._time, self._means, self._variances, state = self._kept[-1]
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._returned = True

    def state_dict(self) -> dict[str, Any]:
        r"""Tensors and plain values."""
        return {
            "rate": self.rate,
            "means": self._means,
            "variances": self._variances,
            "bad": self._bad,
            "time": self._time,
            "kept": [tuple(kept) for kept in self._kept],
            "returned": self._returned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Reads :meth:`state_dict` back."""
        self.rate, self._means, self._bad = state["rate"], state["means"], state["bad"]
        self._time, self._returned = state["time"], state["returned"]
        self._variances = state["variances"]
        self._kept = [_Kept(*kept) for kept in state["kept"]]


def is_state(state: dict[str, Any]) -> bool:
    r"""Whether a dict can be a :meth:`Recovery.state_dict`, as far as it shows without its module.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> state = Recovery(module, torch.optim.Adam(module.parameters())).state_dict()
        >>> is_state(state), is_state(state | {"rate": math.nan})
        (True, False)
    """
    return (
        all(name in state and fits(state[name], hint) for name, hint in _FIELDS.items())
        and 0 < state["rate"] <= 1
        and 0 <= state["bad"] <= 1
        and (state["means"] is None or _is_pair(state["means"]))
        and _is_pair(state["variances"])
        and all(map(_is_kept, state["kept"]))
    )


def _is_pair(value: Any) -> bool:
    numbers = fits(value, tuple[float, ...]) and len(value) == 2
    return numbers and all(-math.inf < x < math.inf for x in value)


def _is_kept(values: tuple[Any, ...]) -> bool:
    if len(values) != len(_Kept._fields):
        return False
    time, means, variances, state = values
    return (
        fits(time, int)
        and _is_pair(means)
        and _is_pair(variances)
        and fits(state, dict[str, dict])
        and {"module", "optimizer"} <= state.keys()
    )


def _thinned(kept: list[_Kept]) -> list[_Kept]:
    """Without those whose neighbours are close enough: the earlier no more than twice as far back.

    Ages are counted from when the next state is due, so that the latest has one too.
    """
    due = kept[-1].time + _EVERY
    for i in range(len(kept) - 2, 0, -1):
        if due - kept[i - 1].time <= 2 * (due - kept[i + 1].time):
            kept = kept[:i] + kept[i + 1 :]
    return kept
