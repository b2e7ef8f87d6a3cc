"""What the tests of runs share."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial

RECOVERY = {  # of a checkpoint
    "rate": 1.0,
    "means": None,
    "variances": (0.0, 0.0),
    "bad": 0.0,
    "time": 0,
    "kept": [],
    "returned": False,
}

CTRL_C = partial(signal.raise_signal, signal.SIGINT)


@contextlib.contextmanager
def handled_by(handler, number: int = signal.SIGINT) -> Iterator[None]:
    """A signal's handler; the tests may themselves run where Ctrl-C is ignored."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class InterruptedFamily:
    """A task family that calls ``interrupt`` when it is asked for training batch ``at``, once."""

    def __init__(self, family, at: int, interrupt: Callable[[], None] = CTRL_C):
        self.family, self.at, self.interrupt = family, at, interrupt

    def __getattr__(self, name):
        return getattr(self.family, name)

    def sample(self, split, index, tasks):
        if split == "train" and index == self.at:
            self.at = None
            self.interrupt()
        return self.family.sample(split, index, tasks)
