"""What the tests of the optimizer share: every registered map, off its identity start."""

import pytest
import torch
from torch import Tensor

from mirror_opt import maps
from mirror_opt.optim import fused, transaction

CASES = [(name, options) for name, cls in maps.REGISTRY.items() for options in cls.variants]
IDS = [f"{name}-{options}" for name, options in CASES]

# torch's compiler imports modules of its own that torch deprecates, instantiates what is not to be,
# and asks tensors of a graph for their gradients.
COMPILER_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`torch.jit:DeprecationWarning",
        ".*should not be instantiated:DeprecationWarning",
        "The .grad attribute of a Tensor that is not a leaf:UserWarning",
    )
]


def start(name: str, options: dict, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """A matrix and a vector inside the domain of every map, requiring grad."""
    generator = torch.Generator().manual_seed(seed)
    params = [
        torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)
        for shape in ((4, 3), (3,))
    ]
    return [p.to(dtype).requires_grad_() for p in params]


def learned(name: str, params: list[Tensor], options: dict, seed: int = 1) -> maps.MirrorMap:
    """The map with its parameters moved, so that no learned map is the identity."""
    mirror_map = maps.create(name, params, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mirror_map.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return mirror_map


def as_on_an_accelerator(monkeypatch) -> None:
    """Nothing is read back where that would wait on a device, though all is on the CPU."""
    for module in (fused, transaction):
        monkeypatch.setattr(module, "reads_freely", lambda tensors: False)


def quadratic(params: list[Tensor], target: float = 1 / 3) -> Tensor:
    """A convex loss whose minimum lies in every domain, the simplex of three entries included."""
    return sum(((p - target) ** 2).sum() for p in params) / 2


def descend(optimizer, params: list[Tensor], steps: int) -> list[float]:
    """The losses before each step and after the last."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = quadratic(params)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, quadratic(params).item()]


def snapshot(optimizer) -> list[Tensor]:
    """Copies of all that a step may change, in order."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    return [t.detach().clone() for t in tensors]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Bit for bit, and of one dtype."""
    return len(xs) == len(ys) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True)
    )

def parameter(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)
