"""Mirror maps: gradients of distance-generating functions, classical and learned."""

from mirror_opt.maps.base import MirrorMap, Profile
from mirror_opt.maps.baselines import MetaCurvature
from mirror_opt.maps.classical import Diagonal, Euclidean, Hypentropy, NegativeEntropy, PNorm
from mirror_opt.maps.kronecker import KroneckerNeural
from mirror_opt.maps.registry import REGISTRY, create, register
from mirror_opt.maps.separable import SeparableNeural

__all__ = [
    "REGISTRY",
    "Diagonal",
    "Euclidean",
    "Hypentropy",
    "KroneckerNeural",
    "MetaCurvature",
    "MirrorMap",
    "NegativeEntropy",
    "PNorm",
    "Profile",
    "SeparableNeural",
    "create",
    "register",
]
