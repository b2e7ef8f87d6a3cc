r"""Few-shot tasks and their models.

A :class:`TaskFamily` gives :class:`Episodes`, batches of support and query sets, as a pure
function of (seed, split, index). :func:`make_task` makes one by name.
"""

import inspect
import os
from typing import Any

from mirror_opt.errors import InputError
from mirror_opt.fewshot.episodes import SPLITS, Episodes, ImageSet, ImageTasks, TaskFamily
from mirror_opt.fewshot.folder import ImageFolder
from mirror_opt.fewshot.glyphs import Glyphs
from mirror_opt.fewshot.models import MLP, Conv4
from mirror_opt.fewshot.omniglot import Omniglot
from mirror_opt.fewshot.sinusoid import Sinusoid

__all__ = [
    "MLP",
    "SPLITS",
    "TASKS",
    "Conv4",
    "Episodes",
    "Glyphs",
    "ImageFolder",
    "ImageSet",
    "ImageTasks",
    "Omniglot",
    "Sinusoid",
    "TaskFamily",
    "make_task",
]

TASKS: dict[str, type[TaskFamily]] = {
    family.name: family for family in (Sinusoid, Glyphs, Omniglot, ImageFolder)
}


def make_task(
    name: str,
    *,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    **options: Any,
) -> TaskFamily:
    r"""Makes a task family by its name in ``TASKS``.

    An argument that is None, and ``download=False``, leave the family's own default.

    Args:
        name: ``"sinusoid"``, ``"glyphs"``, ``"omniglot"`` or ``"folder"``.
        ways: The number of classes in a task.
        shots: The number of support examples, of each class where there are classes.
        queries: The number of query examples, of each class where there are classes.
        seed: Chooses the stream of tasks.
        data_dir: The folder of the data, for families that read some.
        download: Whether to fetch data that is absent, for families that can.
        options: Other options of the family, such as ``validation`` or ``image_size``.

    Raises:
        InputError: an unknown name, an option that the family has not, or what it raises.

    Example:
        >>> make_task("sinusoid", shots=5).sample("test", 0, tasks=2).support_x.shape
        torch.Size([2, 5, 1])
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    given = {
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "data_dir": data_dir,
        "download": download or None,
        **options,
    }
    given = {option: value for option, value in given.items() if value is not None}
    accepted = inspect.signature(TASKS[name]).parameters
    for option, value in given.items():
        if option not in accepted:
            raise InputError(
                f"task {name} has no option {option} (it was {value!r}): "
                f"leave it out; it has {', '.join(accepted)}"
            )
    return TASKS[name](seed=seed, **given)
