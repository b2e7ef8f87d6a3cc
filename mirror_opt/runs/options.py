r"""Options as a person writes them: read into values, checked, and spelled in messages."""

import inspect
import shlex
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import torch

from mirror_opt.errors import InputError
from mirror_opt.runs.directory import MOST

__all__ = [
    "READERS",
    "check_further",
    "check_type",
    "counted",
    "device",
    "fits",
    "option",
    "pairs",
    "resume_command",
    "shown",
    "step_counts",
    "train_steps",
]


def option(name: str) -> str:
    r"""The command line's spelling of a field.

    Example:
        >>> option("train_steps")
        '--train-steps'
    """
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    r"""A value as a person would write it."""
    if isinstance(value, tuple | list):
        return ",".join(shown(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={shown(part)}" for key, part in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def counted(number: int | str, noun: str) -> str:
    r"""A number and its noun.

    Example:
        >>> counted(1, "step"), counted(5, "step"), counted("1-5", "step")
        ('1 step', '5 steps', '1-5 steps')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def resume_command(command: str, out: Any, **more: Any) -> str:
    r"""The command line that goes on with the run in ``out``, as a shell takes it.

    Example:
        >>> resume_command("train", "my runs/1"), resume_command("train", "-1")
        ("mirror-opt train --out 'my runs/1' --resume", 'mirror-opt train --out=-1 --resume')
    """
    words = ["mirror-opt", command, *_passed("out", out), "--resume"]
    for name, value in more.items():
        words += _passed(name, value)
    return shlex.join(words)


def _passed(name: str, value: Any) -> list[str]:
    # What starts with a dash would be taken for an option.
    text = str(value)
    return [f"{option(name)}={text}"] if text.startswith("-") else [option(name), text]


def train_steps(value: Any) -> int | str:
    r"""The trained horizon: ``5``, or ``"1-5"`` for a random one; ``"5"`` and ``(1, 5)`` too.

    Raises:
        InputError: anything else.

    Example:
        >>> train_steps("5"), train_steps("1-5"), train_steps((1, 5))
        (5, '1-5', '1-5')
    """
    try:
        parts = value.split("-") if isinstance(value, str) else value
        low, *rest = (_whole(part) for part in ([parts] if isinstance(parts, int) else parts))
        (high,) = rest or [low]
    except (ValueError, TypeError):
        low = high = 0
    if not 1 <= low <= high <= MOST:
        raise InputError(
            f"--train-steps {shown(value)}: pass a number of inner steps such as 5, "
            "or a range such as 1-5"
        )
    return low if low == high else f"{low}-{high}"


def step_counts(value: Any) -> tuple[int, ...]:
    r"""``"0,1,5"`` or a sequence as a rising tuple of distinct counts.

    Raises:
        InputError: not a list of whole numbers from 0.

    Example:
        >>> step_counts("5,1,0")
        (0, 1, 5)
    """
    try:
        parts = value.split(",") if isinstance(value, str) else value
        steps = tuple(sorted({_whole(part) for part in parts}))
    except (ValueError, TypeError):
        steps = ()
    if not steps or steps[0] < 0 or steps[-1] > MOST:
        raise InputError(
            f"--adapt-steps {shown(value)}: pass step counts, comma-separated, such as 0,1,5,10"
        )
    return steps


def pairs(value: Any) -> Any:
    r"""``"terms=4,eps=0.1"`` as a dict with numbers and booleans read; what is no text, as it is.

    Raises:
        InputError: not a list of name=value pairs with distinct names.

    Example:
        >>> pairs("terms=4,eps=0.1,sigma=tanh")
        {'terms': 4, 'eps': 0.1, 'sigma': 'tanh'}
    """
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for item in value.split(",") if value else ():
        key, equals, text = item.partition("=")
        if not (key.isidentifier() and equals and text) or key in found:
            raise InputError(
                f"{value!r}: pass options as name=value, comma-separated, each name once, "
                "such as terms=4,units=4"
            )
        found[key] = _scalar(text)
    return found


def device(value: str) -> str:
    r"""A device that is there; ``"auto"`` is CUDA where it is available, else the CPU.

    Raises:
        InputError: an unknown or absent device.
    """
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = "pass auto, cpu, cuda or cuda:N"
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        raise InputError(f"--device {value}: unknown; {known}") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"--device {value}: not supported; {known}")
    visible = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= visible:
        raise InputError(
            f"--device {value}: CUDA devices visible here: {visible}; pass --device cpu"
        )
    return str(found)


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list of whole numbers",
    dict: "a set of options",
}


def fits(value: Any, hint: Any) -> bool:
    r"""Whether a plain value is of the type that an annotation says.

    A whole number is a number too, and True is not a number.

    Example:
        >>> fits(3, float), fits(True, int), fits([1, None], list[int | None]), fits("3", int)
        (True, False, True, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is dict:
        key, part = arguments
        return isinstance(value, dict) and all(
            fits(k, key) and fits(v, part) for k, v in value.items()
        )
    if origin in (list, tuple):  # a tuple of any length: tuple[int, ...]
        return isinstance(value, origin) and all(fits(one, arguments[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def check_type(what: str, value: Any, hint: Any) -> None:
    r"""Raises InputError unless a value fits an annotation; ``what`` names it in the message.

    Example:
        >>> check_type("--lr abc", "abc", float)
        Traceback (most recent call last):
        mirror_opt.errors.InputError: --lr abc: must be a number
    """
    if not fits(value, hint):
        raise InputError(f"{what}: must be {_wanted(hint)}")


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_wanted(one) for one in typing.get_args(hint) if one is not type(None))
    kind = typing.get_origin(hint) or hint
    return _NAMES.get(kind, kind.__name__)


def check_further(
    name: str,
    given: dict[str, Any],
    function: Callable[..., Any],
    owner: str,
    elsewhere: Collection[str] = (),
) -> dict[str, Any]:
    r"""Holds options given as name=value pairs against the function that takes them.

    Args:
        name: the option of the command line that has the pairs, as a field.
        given: the pairs.
        function: what takes them as keyword arguments.
        owner: what the function makes, in messages.
        elsewhere: its parameters that have an option of their own.

    Returns:
        All that the function takes: what is given, and defaults for the rest.

    Raises:
        InputError: names the first pair that the function does not take.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    optional = {key: p for key, p in parameters.items() if p.default is not p.empty}
    accepted = {key: p for key, p in optional.items() if key not in elsewhere}
    for key, value in given.items():
        pair = f"{option(name)} {key}={shown(value)}"
        if key in elsewhere:
            raise InputError(f"{pair}: that has an option of its own; pass {option(key)}")
        if key not in accepted:
            raise InputError(
                f"{pair}: {owner} has no option {key}; "
                f"pass {', '.join(accepted) or f'no {option(name)}'}"
            )
        check_type(f"{option(name)} {key}={value!r}", value, accepted[key].annotation)
    # A number written without a point may be larger than a whole number can be.
    numbers = {k: float(str(v)) for k, v in given.items() if accepted[k].annotation is float}
    return {key: p.default for key, p in accepted.items()} | given | numbers


READERS = {
    "train_steps": train_steps,
    "adapt_steps": step_counts,
    "map_options": pairs,
    "task_options": pairs,
    "device": device,
}


def _whole(value: Any) -> int:
    r"""A whole number or its text; int would cut 1.5 and count True."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _scalar(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
