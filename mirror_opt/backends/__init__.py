r"""Which implementation serves an operator, and why.

An automatic choice takes the first of ``BACKENDS`` that can serve the operands. A backend that was
asked for by name serves them or raises InputError that says why: it never gives way silently.
"""

import os
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from mirror_opt.backends import cpp, cuda, plain, triton
from mirror_opt.errors import InputError

__all__ = ["BACKENDS", "BackendStatus", "choose", "chosen", "status", "use_backend"]

BACKENDS: dict[str, ModuleType] = {
    "triton": triton,
    "cuda": cuda,
    "cpp": cpp,
    "torch": plain,
}
"""By name, the fastest first. Each module has the operators that it implements as functions, and

``DEVICES``: the types of devices for which it is an automatic choice, None for all;
``unavailable()``: why it cannot be used on this machine, None if it can;
``describe()``: what it runs on;
``refusal(operator, x, units, sigma)``: why it does not serve such operands, None if it does.
"""

_chosen: str | None = None  # None: the environment decides


class use_backend:  # noqa: N801
    r"""Chooses the backend of all operators, from here on or within a ``with`` block.

    For all threads of the process.

    Args:
        name: ``"auto"`` (the fastest that serves the operands), ``"torch"`` (plain PyTorch),
            ``"cpp"`` (CPU), ``"triton"`` or ``"cuda"``. Without any call MIRROR_OPT_BACKEND
            decides, and ``"auto"`` where it is not set.

    Raises:
        InputError: there is no such backend, or it cannot be used here. Operands that a chosen
            backend does not serve raise InputError in the operator.

    Example:
        >>> with use_backend("torch"):
        ...     [row.name for row in status() if row.chosen]
        ['torch']
    """

    def __init__(self, name: str):
        global _chosen
        _check(name)
        self._name, self._before = name, [_chosen]
        self._holds = True  # from here on; within a block, from where it is entered
        _chosen = name

    def __enter__(self) -> None:
        global _chosen
        if not self._holds:
            self._before.append(_chosen)
            _chosen = self._name
        self._holds = False

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._before.pop()


class BackendStatus(NamedTuple):
    """One backend on this machine: ``reason`` says why it is not available, None if it is."""

    name: str
    chosen: bool
    reason: str | None
    runs_on: str | None


def status() -> list[BackendStatus]:
    """One row for each backend, the fastest first; what ``mirror-opt info`` prints."""
    current = chosen()
    rows = []
    for name, module in BACKENDS.items():
        reason = module.unavailable()
        rows.append(
            BackendStatus(name, name == current, reason, None if reason else module.describe())
        )
    return rows


def choose(operator: str, x: Tensor, units: int, sigma: str) -> ModuleType:
    """The backend for an operator, by the name of its function, on operands like x.

    Raises:
        InputError: the backend that was chosen by name does not serve them.
    """
    name = chosen()
    if name != "auto":
        reason = _refusal(name, operator, x, units, sigma)
        if reason:
            raise InputError(
                f"backend {name!r} does not serve the operator {operator}: {reason}; choose "
                "another, such as mirror_opt.use_backend('auto')"
            )
        return BACKENDS[name]
    device = x.device.type
    return next(
        module
        for name, module in BACKENDS.items()
        if (module.DEVICES is None or device in module.DEVICES)
        and not _refusal(name, operator, x, units, sigma)
    )


def _refusal(name: str, operator: str, x: Tensor, units: int, sigma: str) -> str | None:
    module = BACKENDS[name]
    if not hasattr(module, operator):
        return "it has no such operator"
    return module.unavailable() or module.refusal(operator, x, units, sigma)


def chosen() -> str:
    """The name that was chosen, ``"auto"`` if none was."""
    if _chosen is not None:
        return _chosen
    name = os.environ.get("MIRROR_OPT_BACKEND") or "auto"
    try:
        _check(name)
    except InputError as error:
        raise InputError(f"MIRROR_OPT_BACKEND: {error}") from None
    return name


def _check(name: str) -> None:
    if name == "auto":
        return
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise InputError(f"no backend named {name!r}: choose one of {known}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise InputError(f"backend {name!r} is not available: {reason}")
