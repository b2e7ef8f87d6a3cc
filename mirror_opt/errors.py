"""InputError, the exception for input that a person can mend, and the checks of numbers."""

from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = ["InputError", "is_integer", "is_number"]


class InputError(ValueError):
    """Input that cannot be used.

    The message is one line: what is wrong, the value that was given, and what to pass instead.
    It is raised before any state changes. The command line prints it and exits with status 2.
    """


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether the value is an integer, which True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
