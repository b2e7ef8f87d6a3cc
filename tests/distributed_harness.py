"""How checks run in every process of a group, and what they share."""

import datetime
import traceback
from pathlib import Path

import torch
from optim_cases import learned
from torch import distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    distribute_tensor,
    init_device_mesh,
)

from mirror_opt import MirrorDescent

CHECKS = {}
SHAPES = ((5, 4), (3,), (2, 3, 2), ())  # uneven over 2 and 4; one has an empty shard over 4


def check(function):
    CHECKS[function.__name__] = function
    return function


def work(rank: int, world: int, folder: str) -> None:
    """Runs every check, and writes how each ended: empty, or a traceback."""
    import distributed_cases  # noqa: F401  # registers them, in a process that is new

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world,
        timeout=datetime.timedelta(minutes=5),  # on a busy machine the processes start apart
    )  # fmt: skip
    for name, function in CHECKS.items():
        try:
            function(world, Path(folder))
            outcome = ""
        except BaseException:
            outcome = traceback.format_exc()
        Path(folder, f"{name}-{world}-{rank}").write_text(outcome)
    dist.barrier()  # none takes its connections away while another still uses them
    dist.destroy_process_group()


def mesh(world: int):
    return init_device_mesh("cpu", (world,))


def square(world: int):
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))


def values(seed=0, shapes=SHAPES, dtype=torch.float64):
    """Tensors inside the domain of every map."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(s, generator=generator, dtype=dtype).softmax(-1) for s in shapes]


def spread(tensors, device_mesh, placements):
    """As DTensors, each cut along the dimensions that it has."""
    def fitting(x, placement):
        return placement if placement.is_replicate() or placement.dim < x.dim() else Replicate()

    return [
        distribute_tensor(x, device_mesh, [fitting(x, q) for q in placements]) for x in tensors
    ]


def pair(name, options, device_mesh, placements, shapes=SHAPES, dtype=torch.float64, **settings):
    """An optimizer of plain parameters, and the same of sharded ones."""
    plain = [x.requires_grad_() for x in values(shapes=shapes, dtype=dtype)]
    shards = spread(values(shapes=shapes, dtype=dtype), device_mesh, placements)
    shards = [x.requires_grad_() for x in shards]
    optimizers = [
        MirrorDescent(params, mirror_map=learned(name, values(shapes=shapes, dtype=dtype), options),
                      **settings)
        for params in (plain, shards)
    ]  # fmt: skip
    return plain, shards, *optimizers


def give(k, plain, shards):
    generator = torch.Generator().manual_seed(100 + k)
    for p, q in zip(plain, shards, strict=True):
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)


def step(k, plain, shards, one, other):
    give(k, plain, shards)
    one.step()
    other.step()


def whole(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def close(xs, ys):
    torch.testing.assert_close(whole(xs), whole(ys), rtol=1e-10, atol=1e-12)
