"""Sharded parameters, over gloo on the CPU: every check of ``distributed_cases`` on 2 and 4.

The processes of one size of group run all checks one after the other, since starting them takes
longer than any check.
"""

import distributed_cases as cases
import distributed_harness as harness
import pytest
import torch
from torch import multiprocessing

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # The checks of 4 processes and of 1 read what those of 2 have saved.
    folder = tmp_path_factory.mktemp("distributed")
    for world in (2, 4):
        multiprocessing.spawn(harness.work, (world, str(folder)), nprocs=world)
    return folder


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", harness.CHECKS)
def test_in_every_process(name, world, folder):
    outcomes = [folder.joinpath(f"{name}-{world}-{rank}").read_text() for rank in range(world)]
    assert outcomes == [""] * world, "\n".join(outcomes)


# torch warns that a checkpoint is read without a process group, which is what is meant.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", cases.MAPS_SAVED)
def test_one_process_goes_on_from_the_checkpoint_of_two(name, folder):
    model = cases.network()
    optimizer = cases.optimizer_of(model, name)
    cases.load(model, optimizer, folder / name)
    cases.train(model, optimizer, cases.batch())
    harness.close(list(model.parameters()), list(cases.alone(name, 6)[0].parameters()))


@pytest.mark.parametrize(("name", "options"), cases.CASES, ids=str)
def test_maps_couple_entries_only_along_the_dimensions_that_they_name(name, options):
    for shape in ((3,), (3, 4), (2, 3, 2)):
        (x,) = harness.values(shapes=(shape,))
        mirror_map = cases.learned(name, [x], options)
        coupled = mirror_map.coupled(len(shape))
        assert set(coupled) <= set(range(len(shape)))

        def flat(v, mirror_map=mirror_map, shape=shape):
            return mirror_map.inverse([v.view(shape)])[0].flatten()

        z = mirror_map([x])[0].flatten()
        small = 1e-3 * torch.eye(len(z), dtype=z.dtype)
        moved = torch.stack([(flat(z + e) - flat(z - e)).abs() > 1e-12 for e in small])
        index = torch.cartesian_prod(*map(torch.arange, shape)).view(len(z), len(shape))
        for i, j in moved.nonzero().tolist():
            apart = (index[i] != index[j]).nonzero().flatten().tolist()
            assert set(apart) <= set(coupled)
        assert moved.diagonal().all()
        if coupled and len(shape) > 1:
            assert moved.sum() > len(z)  # what is named is meant
