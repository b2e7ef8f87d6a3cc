"""Named methods: configurations of one ``MetaLearner``, and the rates each does best with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mirror_opt import maps
from mirror_opt.errors import InputError
from mirror_opt.meta.learner import MetaLearner
from mirror_opt.meta.parameters import adapted_parameters, last_layer

__all__ = ["METHODS", "Method", "MethodDefaults", "build", "defaults"]


@dataclass(frozen=True)
class Method:
    """A configuration of ``MetaLearner``.

    Attributes:
        summary: one line for listings.
        map_name: the mirror map in the registry; None where the caller chooses.
        options: keyword arguments of ``MetaLearner``.
        head_only: adapt the last layer only.
    """

    summary: str
    map_name: str | None = "euclidean"
    options: dict[str, Any] = field(default_factory=dict)
    head_only: bool = False


METHODS = {
    "maml": Method("MAML: the init (Finn et al. 2017)"),
    "fomaml": Method("first-order MAML (Finn et al. 2017)", options={"first_order": True}),
    "anil": Method("the init; only the last layer adapts (Raghu et al. 2020)", head_only=True),
    "meta-sgd": Method("the init and a rate an element (Li et al. 2017)", "diagonal"),
    "meta-curvature": Method(
        "the init and a matrix a mode (Park and Oliva 2019)", "meta-curvature"
    ),
    "mirror": Method("the init and a learned mirror map", None),
}


@dataclass(frozen=True)
class MethodDefaults:
    """Inner step size, and the outer rates of the init, the map and the inner rates."""

    lr: float
    init_lr: float
    map_lr: float
    rate_lr: float = 1e-2


def build(
    method: str,
    model: nn.Module,
    *,
    map_name: str | None = None,
    map_options: dict[str, Any] | None = None,
    adapt: Iterable[str] | None = None,
    **options: Any,
) -> MetaLearner:
    """The learner of a named method for a model.

    Args:
        method: a key of ``METHODS``.
        model: the network.
        map_name, map_options: the mirror map of method ``"mirror"``, by its name in the registry
            (``"kronecker"`` when None) and keyword arguments.
        adapt: name patterns of the parameters that adapt, as ``MetaLearner`` takes them; the last
            layer's for method ``"anil"``, all when None.
        options: keyword arguments of ``MetaLearner``.

    Returns:
        The learner, with the default map options and inner rate of ``MetaLearner`` unless given.

    Raises:
        InputError: unknown method or map, a map or ``adapt`` given to a method that has its own, or
            method ``"anil"`` for a model whose last layer shares parameters.

    Example:
        >>> build("maml", nn.Linear(2, 1), lr=0.1).mirror_map.name
        'euclidean'
    """
    if method not in METHODS:
        raise InputError(f"no method named {method!r}: choose one of {', '.join(METHODS)}")
    spec = METHODS[method]
    if spec.map_name is not None and (map_options or map_name not in (None, spec.map_name)):
        raise InputError(
            f"method {method!r} has its own map {spec.map_name!r}: "
            "leave map_name and map_options out, or choose method 'mirror'"
        )
    if spec.head_only:
        if adapt is not None:
            raise InputError(f"method {method!r} adapts the last layer: leave adapt out")
        adapt = last_layer(model)
    elif adapt is not None and not isinstance(adapt, str):
        adapt = list(adapt)  # it is gone through twice
    params = list(adapted_parameters(model, adapt).values())
    name = spec.map_name or map_name or "kronecker"
    mirror_map = maps.create(name, params, **(map_options or {}))
    return MetaLearner(model, mirror_map, adapt=adapt, **{**spec.options, **options})


def defaults(method: str, task: str) -> MethodDefaults:
    """The rates that a method does well with on any task of a kind.

    Args:
        method: a key of ``METHODS``.
        task: ``"sinusoid"``, or an image task.

    Raises:
        InputError: there is no such method.
    """
    if method not in METHODS:
        raise InputError(f"no method named {method!r}: choose one of {', '.join(METHODS)}")
    # The steadiest over the studies of bench/results, docs/search.md; a test holds them to it.
    if task == "sinusoid":
        init_lr = {"meta-curvature": 2e-2, "meta-sgd": 3e-3}.get(method, 1e-2)
        map_lr = {"meta-curvature": 3e-2}.get(method, 1e-2)
        return MethodDefaults(0.01, init_lr, map_lr)
    map_lr = {"mirror": 3e-3, "meta-sgd": 3e-2}.get(method, 1e-2)
    return MethodDefaults(0.1, 3e-3, map_lr)
