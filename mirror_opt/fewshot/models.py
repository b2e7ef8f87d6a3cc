r"""The two networks of the few-shot tasks, each a ``body`` and a linear ``head``."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mirror_opt.errors import InputError

__all__ = ["MLP", "Conv4"]


class MLP(nn.Module):
    r"""A multilayer perceptron with ReLU; 1-40-40-1 as it stands, the sinusoid network of MAML
    (Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.1).

    Args:
        inputs: The number of input features.
        outputs: The number of outputs.
        hidden: The widths of the hidden layers.

    Raises:
        InputError: a width below 1, or no hidden layer.

    Example:
        >>> import torch
        >>> MLP()(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, inputs: int = 1, outputs: int = 1, hidden: Sequence[int] = (40, 40)):
        super().__init__()
        widths = (inputs, *hidden)
        if not hidden or min(widths) < 1:
            raise InputError(f"hidden is {tuple(hidden)}: pass one width of at least 1 per layer")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        r"""Maps ``(*, inputs)`` to ``(*, outputs)``."""
        return self.head(self.body(x))


class Conv4(nn.Module):
    r"""Four blocks of 3x3 convolution, batch norm, ReLU, 2x2 max pool, and a linear head: the
    backbone of Vinyals et al. 2016 (https://arxiv.org/abs/1606.04080) and of MAML after it.

    Batch norm uses the statistics of the batch it is given, in training and in evaluation, and
    keeps no running ones: a task's images are normalised by that task alone.

    Args:
        input_shape: ``(channels, height, width)`` of an image, at least 16 x 16, since each
            block halves it.
        outputs: The number of classes.
        filters: The number of filters of every convolution.

    Raises:
        InputError: an image smaller than 16 x 16, or fewer than one filter.

    Example:
        >>> import torch
        >>> Conv4((1, 28, 28), outputs=5, filters=8)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])
    """

    blocks = 4

    def __init__(self, input_shape: Sequence[int], outputs: int, filters: int = 64):
        super().__init__()
        channels, height, width = input_shape
        shrink = 2**self.blocks
        if min(height, width) < shrink:
            raise InputError(
                f"images are {height} x {width}: Conv4 halves them {self.blocks} times, "
                f"so pass an image size of at least {shrink}"
            )
        if filters < 1:
            raise InputError(f"filters is {filters}: pass at least 1")
        layers = [_block(channels if i == 0 else filters, filters) for i in range(self.blocks)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(filters * (height // shrink) * (width // shrink), outputs)

    def forward(self, x: Tensor) -> Tensor:
        r"""Maps images ``(N, channels, height, width)`` to logits ``(N, outputs)``."""
        return self.head(self.body(x))


def _block(channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, filters, kernel_size=3, padding=1),
        nn.BatchNorm2d(filters, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
