"""Which parameters of a model adapt."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from mirror_opt.errors import InputError

__all__ = ["adapted_parameters", "last_layer"]


def adapted_parameters(
    model: nn.Module, adapt: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the model whose names match one of the patterns, in order.

    Args:
        model: the network; of its parameters those that require gradients.
        adapt: patterns (``fnmatch``), or one; all parameters when None.

    Raises:
        InputError: there is no such parameter, or none for one of the patterns.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    patterns = ["*"] if adapt is None else [adapt] if isinstance(adapt, str) else list(adapt)
    matches = [{name for name in named if fnmatchcase(name, pattern)} for pattern in patterns]
    for pattern, found in zip(patterns or [""], matches or [set()], strict=True):
        if not found:
            raise InputError(
                f"no trainable parameter of {type(model).__name__} matches {pattern!r} of "
                f"{adapt=}: pass patterns for names such as "
                f"{', '.join(list(named)[:3]) or '(none)'}"
            )
    return {name: p for name, p in named.items() if any(name in found for found in matches)}


def last_layer(model: nn.Module) -> list[str]:
    """Patterns for the parameters of the last module that has any."""
    every = model.named_parameters(remove_duplicate=False)
    names = [name for name, p in every if p.requires_grad]
    if not names:
        return ["*"]  # which MetaLearner refuses with what it needs
    prefix = names[-1].rpartition(".")[0]
    head = [name for name in names if name.rpartition(".")[0] == prefix]
    own = {name for name, _ in model.named_parameters()}
    if shared := [name for name in head if name not in own]:
        raise InputError(
            f"the last layer {prefix!r} of the model shares {', '.join(shared)} with another: ANIL "
            "would adapt both; use method 'maml', or a layer with parameters of its own"
        )
    return head
