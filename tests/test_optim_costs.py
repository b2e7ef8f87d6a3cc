"""What a step of MirrorDescent reads back, and how much memory it takes."""

import weakref

import pytest
import torch
from optim_infos import INFOS, counting, every, over_maps, run, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@over_maps
def test_a_step_that_skips_reads_nothing_back(name):
    # What capturable means for torch's own: no value comes to the host, so an accelerator is never
    # waited for. There is no step count, hence no flag. On the CPU a tensor lr and the question
    # whether a fused step can be taken are read, since it costs nothing there.
    cls, cases = every(name, "differentiable", "fused")
    for case in cases:
        params = start()
        kwargs = {**case.kwargs, "lr": 0.1, "nonfinite": "skip", "fused": False}
        optimizer = cls(params, **kwargs)
        run(optimizer, params, 1)  # the first step creates the state
        with counting("_local_scalar_dense", "nonzero", "equal", "is_nonzero") as counted:
            run(optimizer, params, 1)
        mirror_map = optimizer.param_groups[0]["mirror_map"]
        decays = case.kwargs.get("weight_decay", 0) > 0
        if mirror_map.inverse_is_closed and (mirror_map.forward_is_closed or not decays):
            assert counted() == []
        else:
            assert "_local_scalar_dense" in counted()  # a solve asks whether it has converged


class Memory(TorchDispatchMode):
    """The largest number of bytes held at once by storages that were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in self.seen and key not in given:
                self._hold(key, storage)
        return result

    def _hold(self, key, storage):
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key, size):
        self.now -= size
        self.seen.remove(key)


def storages(tree):
    found = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return {s._cdata: s for s in found}


@pytest.mark.parametrize("flag", ["forloop", "foreach", "fused"])
def test_peak_memory_is_that_of_the_arithmetic(flag):
    # A step changes all or nothing, so the unfused ones hold the new values of all parameters, and
    # beside them the momentum or what one operation makes. The fused one holds neither.
    size = 1 << 12
    parameter_bytes = 8 * size * 4
    name = "separable" if flag == "fused" else "euclidean"
    if flag == "fused" and not INFOS[name].supports_fused_on:
        pytest.skip("the CPU library is not built")
    peaks = {}
    for momentum in (0, 0.9):
        params = [torch.ones(size, requires_grad=True) for _ in range(8)]
        flags = {"foreach": flag == "foreach", "fused": flag == "fused"}
        optimizer = INFOS[name].optim_cls(params, lr=0.1, momentum=momentum, **flags)
        run(optimizer, params, 1)
        with Memory() as memory:
            optimizer.step()
        peaks[momentum] = memory.peak / parameter_bytes
    expected = {"forloop": (1, 2), "foreach": (1, 2), "fused": (0, 0)}[flag]
    for peak, multiple in zip(peaks.values(), expected, strict=True):
        assert multiple <= peak <= multiple + 0.15  # a tensor in flight, and scalars
