"""The registered maps with their variants, their points, and maps as training leaves them."""

import pytest
import torch
from torch import Tensor

from mirror_opt import maps

CASES = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name, cls in sorted(maps.REGISTRY.items())
    for i, options in enumerate(cls.variants)
]
DGF_CASES = [case for case in CASES if maps.REGISTRY[case.values[0]].is_dgf]
OWNERS = [name for name, cls in sorted(maps.REGISTRY.items()) if cls.owns_tensors]
SHAPES = ((5, 4), (5,), (3, 2, 3, 3), (), (1, 7))


def points(mirror_map, shapes=SHAPES, dtype=torch.float64, scale=1.0) -> list[Tensor]:
    """Random points of the map's domain."""
    raw = [scale * torch.randn(shape, dtype=dtype) for shape in shapes]
    if mirror_map.domain == "simplex":
        return [torch.softmax(x.reshape(-1) if x.dim() == 0 else x, -1) for x in raw]
    return [x.exp() for x in raw] if mirror_map.domain == "positive" else raw


def learned(name: str, options: dict, dtype=torch.float64, shapes=SHAPES):
    """A map as training might leave it: calibrated, and every parameter moved."""
    params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    mirror_map = maps.create(name, params, **options)
    samples = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(2)]
    mirror_map.calibrate(samples)
    with torch.no_grad():
        for p in mirror_map.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mirror_map


def relative(xs, ys) -> float:
    return max(
        ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
        for x, y in zip(xs, ys, strict=True)
    )


def jacobian(function, x: Tensor) -> Tensor:
    rows = torch.autograd.functional.jacobian(lambda v: function([v])[0], x)
    return rows.reshape(x.numel(), x.numel())
