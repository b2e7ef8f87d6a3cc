"""Mirror descent with classical and learned mirror maps, and meta-learning of those maps."""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from mirror_opt import maps, meta
from mirror_opt.backends import use_backend
from mirror_opt.errors import InputError
from mirror_opt.newton import NewtonError
from mirror_opt.optim import MirrorDescent

__all__ = [
    "InputError",
    "MirrorDescent",
    "NewtonError",
    "__version__",
    "maps",
    "meta",
    "use_backend",
]

__version__ = version("mirror_opt")


def __getattr__(name: str) -> ModuleType:
    # What is for few-shot tasks and the command line brings libraries of its own: when it is asked
    # for.
    if name in ("fewshot", "runs"):
        return import_module(f"mirror_opt.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
