"""Mirror descent with classical and learned mirror maps, and meta-learning of those maps."""

from importlib.metadata import version

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
