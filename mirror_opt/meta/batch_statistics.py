r"""Batch norm on batch statistics, which needs care in second derivatives.

The gradient OVER ``vmap`` of a network with ``batch_norm(training=True)`` is silently wrong at
second order (PyTorch, at least to 2.13); the gradient taken INSIDE ``vmap`` is right. A batch of
tasks must therefore know whether the network normalises so, by a module or by a call of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

__all__ = ["BatchStatisticsError", "RefuseBatchStatistics", "batch_norms", "has_batch_statistics"]

# All of them take "use the statistics of this batch" as sixth argument: with its default.
_NORMALISERS: dict[Callable, tuple[str, bool]] = {
    F.batch_norm: ("training", False),
    F.instance_norm: ("use_input_stats", True),
    torch.batch_norm: ("training", False),
    torch.instance_norm: ("use_input_stats", True),
    torch.native_batch_norm: ("training", False),
}


class BatchStatisticsError(Exception):
    """Raised within ``RefuseBatchStatistics`` by a call that uses them."""


class RefuseBatchStatistics(TorchFunctionMode):
    """Within it, normalising by the statistics of the batch raises ``BatchStatisticsError``."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func in _NORMALISERS:
            name, default = _NORMALISERS[func]
            if kwargs.get(name, args[5] if len(args) > 5 else default):
                raise BatchStatisticsError
        return func(*args, **kwargs)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norm modules of a model."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether some batch norm module of the model normalises by the statistics of the batch."""
    return any(m.training or not m.track_running_stats for m in batch_norms(model))
