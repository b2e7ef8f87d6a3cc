r"""Sinusoid regression, the toy family of MAML."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from mirror_opt.fewshot.episodes import SPLITS, Episodes, TaskFamily
from mirror_opt.fewshot.models import MLP

__all__ = ["Sinusoid"]


class Sinusoid(TaskFamily):
    r"""Regression of :math:`y = A \sin(x - \varphi)` with amplitude :math:`A` uniform in
    ``[0.1, 5]``, phase :math:`\varphi` uniform in ``[0, pi]`` and ``x`` uniform in ``[-5, 5]``
    (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.1).

    The splits are independent draws from this one distribution.

    Args:
        shots: The number of support points.
        queries: The number of query points.
        seed: Chooses the stream of tasks.

    Raises:
        InputError: a number that is not whole or out of range.

    Example:
        >>> episodes = Sinusoid(shots=10).sample("train", 0, tasks=25)
        >>> episodes.support_x.shape, episodes.query_y.shape
        (torch.Size([25, 10, 1]), torch.Size([25, 10, 1]))
    """

    name = "sinusoid"
    metric = "mse"
    splits = SPLITS
    amplitude = (0.1, 5.0)
    phase = (0.0, float(np.pi))
    domain = (-5.0, 5.0)

    def __init__(self, *, shots: int = 10, queries: int = 10, seed: int = 0):
        super().__init__(ways=None, shots=shots, queries=queries, seed=seed)
        self.input_shape = (1,)
        self.output_size = 1

    @staticmethod
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""Mean squared error of ``(n, 1)`` against ``(n, 1)``."""
        return F.mse_loss(prediction, y)

    @staticmethod
    def metric_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""Mean squared error, the loss itself."""
        return F.mse_loss(prediction, y)

    def model(self, hidden: Sequence[int] = (40, 40)) -> MLP:
        r"""A fresh :class:`MLP`, initialised from torch's global generator."""
        return MLP(1, 1, hidden)

    def _draw(self, split: str, rngs: Sequence[Generator]) -> Episodes:
        x = np.empty((len(rngs), self.shots + self.queries, 1))
        y = np.empty_like(x)
        for task, rng in enumerate(rngs):
            amplitude, phase = rng.uniform(*self.amplitude), rng.uniform(*self.phase)
            x[task] = rng.uniform(*self.domain, size=x[task].shape)
            y[task] = amplitude * np.sin(x[task] - phase)
        parts = slice(None, self.shots), slice(self.shots, None)
        return Episodes(*(torch.from_numpy(v[:, part]).float() for part in parts for v in (x, y)))
