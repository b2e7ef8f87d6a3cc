"""Meta-learning: adapt by mirror descent, and learn the init, the map and the rates."""

from mirror_opt.meta.learner import Adapted, AdaptedBatch, Evaluation, MetaLearner, NonFiniteLoss
from mirror_opt.meta.methods import METHODS, MethodDefaults, build, defaults

__all__ = [
    "METHODS",
    "Adapted",
    "AdaptedBatch",
    "Evaluation",
    "MetaLearner",
    "MethodDefaults",
    "NonFiniteLoss",
    "build",
    "defaults",
]
