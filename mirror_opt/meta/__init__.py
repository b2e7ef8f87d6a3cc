"""Meta-learning: adapt by mirror descent, and learn the init, the map and the rates."""

from mirror_opt.meta.adapted import Adapted, AdaptedBatch, Evaluation, NonFiniteLossError
from mirror_opt.meta.learner import MetaLearner
from mirror_opt.meta.methods import METHODS, Method, MethodDefaults, build, defaults

__all__ = [
    "METHODS",
    "Adapted",
    "AdaptedBatch",
    "Evaluation",
    "MetaLearner",
    "Method",
    "MethodDefaults",
    "NonFiniteLossError",
    "build",
    "defaults",
]
