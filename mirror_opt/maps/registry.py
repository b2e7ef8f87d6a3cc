"""The maps by name: what ``create``, the command line and the tests go through."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from mirror_opt.errors import InputError
from mirror_opt.maps.base import MirrorMap

__all__ = ["REGISTRY", "create", "register"]

REGISTRY: dict[str, type[MirrorMap]] = {}


_Map = TypeVar("_Map", bound=MirrorMap)


def register(name: str, summary: str) -> Callable[[type[_Map]], type[_Map]]:
    """Class decorator: makes a map known to ``create``, the command line and the tests.

    Args:
        name: what ``create`` takes; a name that is there already is replaced.
        summary: one line for listings.

    Returns:
        The decorator. The class, a ``MirrorMap``, gets the attributes ``name`` and ``summary``.

    Example:
        >>> import torch
        >>> @register("half", "h = |x|^2, grad h = 2 x")
        ... class Half(MirrorMap):
        ...     def _gradient(self, x, coefficient):
        ...         return 2 * x
        ...     def _gradient_conjugate(self, z, coefficient):
        ...         return z / 2
        ...     def _potential(self, x, coefficient):
        ...         return (x * x).sum()
        >>> create("half", []).inverse([torch.tensor([4.0])])
        (tensor([2.]),)
        >>> del REGISTRY["half"]
    """

    def add(cls: type[_Map]) -> type[_Map]:
        cls.name, cls.summary = name, summary
        REGISTRY[name] = cls
        return cls

    return add


def create(name: str, params: Iterable[Tensor], **options: Any) -> MirrorMap:
    """A registered map for these parameters.

    Raises:
        InputError: no map has this name, or the map has no such option.

    Example:
        >>> import torch
        >>> create("kronecker", [torch.zeros(3, 4)], units=2).name
        'kronecker'
    """
    if name not in REGISTRY:
        raise InputError(f"no mirror map named {name!r}: choose one of {', '.join(REGISTRY)}")
    cls = REGISTRY[name]
    given = (params,) if cls.owns_tensors else ()
    signature = inspect.signature(cls)
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        accepted = [n for n in signature.parameters if n != "params"]
        raise InputError(
            f"mirror map {name!r}: {error}; its options are {', '.join(accepted) or '(none)'}"
        ) from error
    return cls(*given, **options)
