r"""What a family of few-shot tasks is, and how episodes of image classes are drawn.

Every task is drawn from a counter-based generator keyed by (seed, split) and positioned by
(index, task), so a batch of episodes is a pure function of these: a resumed run sees the tasks
that an uninterrupted one sees, and two methods compared see the same, with no state to save.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor, nn
from torch.nn import functional as F

from mirror_opt.errors import InputError, is_integer
from mirror_opt.fewshot.models import Conv4

__all__ = ["SPLITS", "Episodes", "ImageSet", "ImageTasks", "TaskFamily"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Episodes:
    r"""A batch of tasks, each a support set to adapt to and a query set to be judged on.

    Iterating gives the four tensors in this order.

    Attributes:
        support_x: Inputs, ``(tasks, n, *input_shape)`` float32. For classes ``n = ways * shots``
            and the examples of a class are neighbours.
        support_y: Targets: class labels ``(tasks, n)`` int64 in ``0..ways-1``, or values
            ``(tasks, n, output_size)`` float32.
        query_x: As ``support_x``, with ``queries`` in place of ``shots``.
        query_y: As ``support_y``, with ``queries`` in place of ``shots``.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.support_x, self.support_y, self.query_x, self.query_y))

    @property
    def tasks(self) -> int:
        r"""The number of tasks."""
        return len(self.support_x)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Episodes":
        r"""The episodes on ``device``, floating tensors as ``dtype``; labels keep theirs."""
        return Episodes(*(x.to(device, dtype if x.is_floating_point() else None) for x in self))


class TaskFamily(ABC):
    r"""A distribution of tasks with disjoint train, validation and test parts.

    ``fingerprint`` names the data that tasks are drawn from, wherever it lies; None for families
    that read none.

    Args:
        ways: The number of classes in a task; None for regression.
        shots: The number of support examples, of each class where there are classes.
        queries: The number of query examples, of each class where there are classes.
        seed: Chooses the stream of tasks, never which class is in which split.

    Raises:
        InputError: a number that is not whole or out of range.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    fingerprint: str | None = None
    input_shape: tuple[int, ...]
    output_size: int

    def __init__(self, *, ways: int | None, shots: int, queries: int, seed: int):
        least = {"shots": (shots, 1), "queries": (queries, 1), "seed": (seed, 0)}
        if ways is not None:
            least["ways"] = (ways, 2)
        for option, (value, bound) in least.items():
            _check_whole(option, value, bound)
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.seed = seed

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        r"""The splits that can be sampled, out of ``SPLITS``."""

    def sample(self, split: str, index: int, tasks: int) -> Episodes:
        r"""Draws the first ``tasks`` tasks of batch ``index``.

        A pure function of the seed and its arguments: the same call gives the same bits, a
        larger ``tasks`` only appends, and batches of different ``index`` are independent.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            index: Which batch, from 0.
            tasks: How many tasks, at least 1.

        Raises:
            InputError: a split that this family has not, or a number out of range.
        """
        if split not in self.splits:
            raise InputError(self._absent(split))
        _check_whole("index", index, 0)
        _check_whole("tasks", tasks, 1)
        key = np.array([self.seed, SPLITS.index(split)], dtype=np.uint64)
        return self._draw(
            split,
            [Generator(Philox(key=key, counter=[0, 0, task, index])) for task in range(tasks)],
        )

    @abstractmethod
    def _draw(self, split: str, rngs: Sequence[Generator]) -> Episodes:
        r"""One task from each generator."""

    def _absent(self, split: str) -> str:
        return f"no split {split!r} in {self.name}: choose from {', '.join(self.splits)}"

    @staticmethod
    @abstractmethod
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""The loss that adaptation descends, 0-dim."""

    @staticmethod
    @abstractmethod
    def metric_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""The figure that is reported, 0-dim: accuracy in ``[0, 1]``, or mean squared error."""

    @abstractmethod
    def model(self) -> nn.Module:
        r"""A fresh model for this family, initialised from torch's global generator."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    r"""The images of one split.

    Attributes:
        images: ``(N, channels, height, width)`` uint8; may be mapped from a file.
        members: For each class the indices of its images, int64.
        names: For each class its name.
    """

    images: np.ndarray
    members: tuple[np.ndarray, ...]
    names: tuple[str, ...]


class ImageTasks(TaskFamily):
    r"""Few-shot classification: ``ways`` classes drawn without replacement from a split, and
    ``shots + queries`` different images of each. Inputs are in ``[0, 1]``.

    Args:
        sets: The images of each split; a split that is left out cannot be sampled.
        rotations: Whether each class turned by 90, 180 and 270 degrees is a class of its own.

    Raises:
        InputError: fewer classes in a split than ``ways``, or fewer images in a class than
            ``shots + queries``.
    """

    metric = "accuracy"

    def __init__(
        self,
        sets: Mapping[str, ImageSet],
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        rotations: bool = False,
    ):
        super().__init__(ways=ways, shots=shots, queries=queries, seed=seed)
        self._sets = {split: sets[split] for split in SPLITS if split in sets}
        self._turns = 4 if rotations else 1
        for split, chosen in self._sets.items():
            self._check(split, chosen)
        self.input_shape = next(iter(self._sets.values())).images.shape[1:]
        self.ways: int = ways
        self.output_size = ways

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._sets)

    def classes(self, split: str) -> tuple[str, ...]:
        r"""The names of the classes of ``split``, turned ones included.

        Raises:
            InputError: there is no such split.
        """
        if split not in self.splits:
            raise InputError(self._absent(split))
        names = self._sets[split].names
        turned = (f"{name} turned {90 * k}" for k in range(1, self._turns) for name in names)
        return (*names, *turned)

    @staticmethod
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""Cross-entropy of logits ``(n, ways)`` against labels ``(n,)``, the mean over n."""
        return F.cross_entropy(prediction, y)

    @staticmethod
    def metric_fn(prediction: Tensor, y: Tensor) -> Tensor:
        r"""The share of ``n`` whose largest logit is the label's, in the logits' dtype; NaN where
        a logit is not finite, since of NaN any class would be the largest."""
        right = (prediction.argmax(-1) == y).to(prediction.dtype)
        return right.where(prediction.isfinite().all(-1), torch.nan).mean()

    def model(self, filters: int = 64) -> Conv4:
        r"""A fresh :class:`Conv4`, initialised from torch's global generator."""
        return Conv4(self.input_shape, self.output_size, filters)

    def _check(self, split: str, chosen: ImageSet) -> None:
        classes = len(chosen.members) * self._turns
        if classes < self.ways:
            raise InputError(
                f"ways is {self.ways}, but split {split!r} of {self.name} has {classes} classes: "
                f"pass {classes} or fewer"
            )
        needed = self._images_needed()
        for name, members in zip(chosen.names, chosen.members, strict=True):
            if len(members) < needed:
                raise InputError(
                    f"class {name!r} in split {split!r} of {self.name} has {len(members)} images, "
                    f"but {self.shots} shots and {self.queries} queries need {needed}: "
                    "pass fewer, or leave the class out"
                )

    def _images_needed(self) -> int:
        return self.shots + self.queries

    def _draw(self, split: str, rngs: Sequence[Generator]) -> Episodes:
        chosen = self._sets[split]
        count = len(chosen.members)
        classes = np.stack(
            [rng.choice(count * self._turns, self.ways, replace=False) for rng in rngs]
        )
        picked = np.stack(
            [
                np.stack([self._pick(chosen.members[c % count], rng) for c in task])
                for task, rng in zip(classes, rngs, strict=True)
            ]
        )
        images = np.asarray(chosen.images[picked])
        for turn in range(1, self._turns):
            turned = classes // count == turn
            images[turned] = np.rot90(images[turned], turn, axes=(-2, -1))
        x = self._augment(torch.from_numpy(images).float() / 255, rngs)
        labels = torch.arange(self.ways).expand(len(rngs), -1)
        return Episodes(
            x[:, :, : self.shots].flatten(1, 2).contiguous(),
            labels.repeat_interleave(self.shots, dim=1),
            x[:, :, self.shots :].flatten(1, 2).contiguous(),
            labels.repeat_interleave(self.queries, dim=1),
        )

    def _pick(self, members: np.ndarray, rng: Generator) -> np.ndarray:
        r"""Of one class's images the ``shots`` for the support set, then the ``queries``."""
        return rng.choice(members, self.shots + self.queries, replace=False)

    def _augment(self, x: Tensor, rngs: Sequence[Generator]) -> Tensor:
        r"""A random change of the images ``(tasks, ways, n, channels, height, width)``: none."""
        return x


def _check_whole(option: str, value: object, least: int) -> None:
    # bool is an int to Python, and True shots is a mistake.
    if not is_integer(value) or not least <= value < 2**63:
        raise InputError(f"{option} is {value!r}: pass a whole number, at least {least}")
