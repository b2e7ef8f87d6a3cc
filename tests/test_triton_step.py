"""The in-place multi-tensor step against its equations in float64."""

import sys
import threading

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICES, DTYPES, make_units, rounding, unsynchronised

from mirror_opt import MirrorDescent, maps, reference, use_backend
from mirror_opt.backends import plain
from mirror_opt.backends.step import Step
from mirror_opt.errors import InputError
from mirror_opt.newton import Status
from mirror_opt.ops import separable_step_
from mirror_opt.reference import Units

pytest.importorskip("triton")

from mirror_opt.kernels import multi_tensor, plans
from mirror_opt.kernels.multi_tensor import step_

LR = 0.2
# Shapes and C: stretches of a channel with and without a rest, unaligned rows, short channels.
LIST = (((2, 280), 2), ((3, 129), 3), ((300,), 1), ((7,), 7), ((), 1), ((2, 3, 2, 2), 2), ((0,), 1))
pytestmark = pytest.mark.parametrize("device", DEVICES)


class Tensors:
    """The lists of a step, and a float64 copy of them that follows the equations."""

    def __init__(
        self, device, shapes=LIST, dtype=torch.float32, count=2, seed=0, primal=True, gains=True,
        anchor=False, dual=False, dual_init=False, state=None, **options,
    ):
        generator = torch.Generator().manual_seed(seed)
        state = state or (torch.float32 if dual else dtype)

        def normal(like=dtype, scale=1.0):
            return [
                (scale * torch.randn(shape, generator=generator)).to(device, like)
                for shape, _ in shapes
            ]

        self.shapes, self.primal, self.options = shapes, primal, options
        self.params, self.grads = normal(), normal()
        self.units = [
            Units(*(x.to(device) for x in make_units(count, c, generator))) for _, c in shapes
        ]
        self.gains = None
        if gains:
            drawn = [torch.rand(shape, generator=generator) for shape, _ in shapes]
            self.gains = [x.add(0.5).to(device) for x in drawn]
        self.buffers = normal(state) if options.get("momentum") else None
        self.anchors = normal(state, 0.1) if anchor else None
        self.duals = normal(torch.float32) if dual else None
        self.dual_inits = normal(torch.float32, 0.1) if dual_init else None
        if dual:  # the parameter is what the dual state makes it
            for i, param in enumerate(self.params):
                param.copy_(self.inverse(i, self.dual(i)) + self.anchor(i))
        self.before = [p.double() for p in self.params]

    def step(self, lr=LR, grad_scale=None, found_inf=None, status=None) -> Tensor:
        options = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
        if not isinstance(lr, Tensor):
            lr = torch.tensor(lr, dtype=torch.float64)
        if status is None:
            status = torch.zeros(1, dtype=torch.int32, device=self.params[0].device)
        step_(Step(
            self.params, self.grads, lr, self.gains or (),
            *zip(*self.units, strict=True), self.buffers or (), self.anchors or (),
            self.duals or (), self.dual_inits or (), grad_scale, found_inf, status,
            **(options | self.options), primal=self.primal, sigma="algebraic",
        ))  # fmt: skip
        return status

    # In float64, the tensor i seen as (C, n).

    def rows(self, i: int, x: Tensor) -> Tensor:
        return x.double().reshape(self.shapes[i][1], -1)

    def coefficients(self, i: int) -> tuple:
        gain = self.rows(i, torch.ones_like(self.params[i]))
        if self.gains:
            gain = gain * self.gains[i].double().reshape(len(gain), -1)
        return gain, *(x.double().unsqueeze(2) for x in self.units[i]), "algebraic"

    def closed(self, i: int, u: Tensor) -> Tensor:
        return plain.forward(self.rows(i, u), *self.coefficients(i)).reshape(u.shape)

    def solved(self, i: int, t: Tensor) -> Tensor:
        return plain.inverse(self.rows(i, t), *self.coefficients(i))[0].reshape(t.shape)

    def forward(self, i: int, u: Tensor) -> Tensor:
        return self.closed(i, u) if self.primal else self.solved(i, u)

    def inverse(self, i: int, z: Tensor) -> Tensor:
        return self.solved(i, z) if self.primal else self.closed(i, z)

    def anchor(self, i: int) -> Tensor | float:
        return self.anchors[i].double() if self.anchors else 0.0

    def dual_init(self, i: int) -> Tensor | float:
        return self.dual_inits[i].double() if self.dual_inits else 0.0

    def dual(self, i: int) -> Tensor:
        return self.duals[i].double() + self.dual_init(i)

    def expected(self, i: int, lr=LR, grad_scale=1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(parameter, momentum, zeta) after a step from what the lists hold now."""
        o = self.options
        d = self.grads[i].double() / grad_scale * (-1 if o.get("maximize") else 1)
        buffer, mu = d, o.get("momentum", 0.0)
        if mu:
            buffer = mu * self.buffers[i].double() + d
            d = d + mu * buffer if o.get("nesterov") else buffer
        shrink = 1 - lr * o.get("weight_decay", 0.0)
        if self.duals and shrink == 1:
            z = self.dual(i)
        else:
            x = self.inverse(i, self.dual(i)) + self.anchor(i) if self.duals else self.before[i]
            z = self.forward(i, shrink * x - self.anchor(i))
        z = z - lr * d
        return self.inverse(i, z) + self.anchor(i), buffer, z - self.dual_init(i)

    def assert_close(self, i: int, result: Tensor, expected: Tensor) -> None:
        if not result.numel():
            return
        gain, *units, _ = self.coefficients(i)
        units = Units(*units)
        lower, upper = reference.psi_slope_bounds(units)
        # Rounding z by its own size moves phi by 1 / slope of that, and the other way round.
        size = 1 + expected.abs() + (gain * reference.psi_bracket(units)).max()
        ratio = torch.maximum((gain * upper).max(), 1 / (gain * lower).min())
        allowed = 2e-6 * ratio * size + rounding(result)
        error = (result.double() - expected).abs()
        assert bool((error <= allowed).all()), float((error / allowed).max())

    def assert_steps(self, lr=LR, **options) -> None:
        scale = options.get("grad_scale", 1.0)
        expected = [self.expected(i, float(lr), scale) for i in range(len(self.params))]
        status = self.step(lr, **options)
        assert int(status) == Status.CONVERGED
        for i, (param, buffer, zeta) in enumerate(expected):
            self.assert_close(i, self.params[i], param)
            if self.buffers:
                self.assert_close(i, self.buffers[i], buffer)
            if self.duals:
                self.assert_close(i, self.duals[i], zeta)


VARIANTS = {
    "primal": {},
    "no gain, nine units": {"gains": False, "count": 9},
    "no units": {"count": 0},
    "dual": {"primal": False, "anchor": True},
    "momentum": {"momentum": 0.9, "anchor": True},
    "nesterov, maximize": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "decay": {"weight_decay": 0.3, "anchor": True},
    "dual state": {"dual": True, "anchor": True},
    "dual state, dual": {"primal": False, "dual": True, "dual_init": True, "momentum": 0.9},
    "dual state, decay": {"dual": True, "dual_init": True, "weight_decay": 0.3},
    "dual state, dual, decay": {
        "primal": False, "dual": True, "anchor": True, "weight_decay": 0.3,
    },
}
_SHORT = LIST[:1] + LIST[3:]


@pytest.mark.parametrize("name", VARIANTS)
def test_step_follows_its_equations(name, device):
    Tensors(device, LIST if name in ("primal", "dual") else _SHORT, **VARIANTS[name]).assert_steps()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["primal", "momentum", "dual state", "dual state, dual"])
def test_half_precisions(name, dtype, device):
    Tensors(device, _SHORT, dtype, **VARIANTS[name]).assert_steps()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients(scale, device):
    tensors = Tensors(device, LIST[:1] + LIST[3:4])
    for grad in tensors.grads:
        grad.mul_(scale)
    for i, (param, _, _) in enumerate([tensors.expected(i) for i in range(2)]):
        if not i:
            assert int(tensors.step()) == Status.CONVERGED
        tensors.assert_close(i, tensors.params[i], param)


def test_rate_as_a_number_or_a_tensor(device):
    one, other = (Tensors(device, _SHORT) for _ in range(2))
    one.step(0.3)
    other.step(torch.tensor(0.3, device=device))
    for p, q in zip(one.params, other.params, strict=True):
        assert torch.equal(p, q)


def test_grad_scale_and_found_inf(device):
    scale = torch.tensor(64.0, device=device)
    tensors = Tensors(device, _SHORT)
    for grad in tensors.grads:
        grad.mul_(64)
    tensors.assert_steps(grad_scale=scale, found_inf=torch.zeros(1, device=device))

    tensors = Tensors(device, _SHORT, dual=True, momentum=0.9)
    kept = [x.clone() for x in (*tensors.params, *tensors.buffers, *tensors.duals)]
    tensors.step(grad_scale=scale, found_inf=torch.ones(1, device=device))
    for x, y in zip((*tensors.params, *tensors.buffers, *tensors.duals), kept, strict=True):
        assert torch.equal(x, y)


def test_hundreds_of_small_tensors_are_one_launch(device, monkeypatch):
    shapes = [((1 + i % 3,), 1 + i % 3 if i % 2 else 1) for i in range(200)]
    tensors = Tensors(device, shapes, count=1, primal=False, dual=True)
    launches = []

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = multi_tensor._step_kernel
    monkeypatch.setattr(multi_tensor, "_step_kernel", Counting())
    tensors.assert_steps()
    assert launches == [(200,)]


def test_programs_do_several_tiles_where_there_are_many_entries(device, monkeypatch):
    monkeypatch.setattr(plans, "_PROGRAMS", 1)
    shapes = (40, 23, False), (2, 700, True)
    rows = plans._programs(shapes).tolist()
    assert [end - begin for i, _, begin, end in rows if i == 0] == [288, 288, 288, 56]
    assert [end - begin for i, _, begin, end in rows if i == 1] == [700, 700]
    monkeypatch.setattr(plans, "_recent_programs", plans._Recent())
    shapes = [((channels, n), channels) for channels, n, _ in shapes]
    Tensors(device, shapes, momentum=0.9).assert_steps()


def test_tables_are_made_once(device, monkeypatch):
    tensors = Tensors(device, LIST[3:6])
    tensors.step()
    monkeypatch.setattr(plans, "_check", None)
    monkeypatch.setattr(plans, "_Table", None)
    before = [p.clone() for p in tensors.params]
    tensors.step()
    assert not any(torch.equal(p, q) for p, q in zip(tensors.params, before, strict=True))


def test_tensors_in_any_order_in_memory(device):
    tensors = Tensors(device, (((2, 3, 8, 8), 2), ((4, 5), 4), ((300,), 1), ((260,), 1)))
    tensors.params[0] = tensors.params[0].contiguous(memory_format=torch.channels_last)
    tensors.params[1] = tensors.params[1].t().contiguous().t()
    tensors.params[2] = torch.cat([tensors.params[2]] * 2)[1:301].copy_(tensors.params[2])  # offset
    tensors.grads[3] = tensors.grads[3].repeat_interleave(2)[::2]
    strides = [p.stride() for p in tensors.params]
    tensors.assert_steps()
    assert [p.stride() for p in tensors.params] == strides


def test_an_element_that_fails_keeps_its_value(device):
    def changed(value):
        tensors = Tensors(device, _SHORT, dual=True, momentum=0.9)
        if value is not None:
            tensors.grads[0][1, 17] = value
            tensors.grads[1][3] = value
        kept = [x.clone() for x in (*tensors.params, *tensors.buffers, *tensors.duals)]
        status = torch.zeros(1, dtype=torch.int32, device=device)
        assert tensors.step(status=status) is status
        return kept, [*tensors.params, *tensors.buffers, *tensors.duals], int(status)

    kept, clean, status = changed(None)
    assert status == Status.CONVERGED
    for value in (torch.nan, torch.inf, -torch.inf):
        _, dirty, status = changed(value)
        assert status == Status.NONFINITE
        for before, expected, result in zip(kept, clean, dirty, strict=True):
            good = result == expected
            assert bool(good.sum() >= good.numel() - 1)
            assert torch.equal(result[~good], before[~good])
        assert not torch.equal(dirty[0], clean[0])
        assert not torch.equal(dirty[1], clean[1])


def test_overflow_of_a_half_precision_is_not_stored(device):
    tensors = Tensors(device, (((4,), 1),), torch.float16, count=0, gains=False)
    tensors.params[0].fill_(60000)
    tensors.grads[0].copy_(torch.tensor([-60000.0, 60000.0, 0.0, 1.0]))
    assert int(tensors.step(1.0)) == Status.NONFINITE
    assert tensors.params[0].tolist() == [60000, 0, 60000, 60000]


def test_same_bits_again(device):
    one, other = (Tensors(device, _SHORT, dual=True, weight_decay=0.1) for _ in range(2))
    one.step()
    other.step()
    for p, q in zip((*one.params, *one.duals), (*other.params, *other.duals), strict=True):
        assert torch.equal(p, q)


def test_lists_that_do_not_fit_are_refused(device):
    def refused(match, change, **options):
        tensors = Tensors(device, LIST[3:6], **options)
        change(tensors)
        before = [p.clone() for p in tensors.params]
        with pytest.raises(InputError, match=match):
            tensors.step()
        for p, q in zip(tensors.params, before, strict=True):
            assert torch.equal(p, q)

    refused("one of each", lambda t: t.grads.pop())
    refused("Invalid grad of shape", lambda t: t.grads.__setitem__(2, t.grads[2][:1]))
    refused("divides its number", lambda t: t.units.__setitem__(2, t.units[0]))
    refused("Invalid param .*float64", lambda t: t.params.__setitem__(2, t.params[2].double()))
    refused("Invalid dual of", lambda t: t.duals.__setitem__(0, t.duals[0].half()), dual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_steps_where_the_backend_is_asked_for_by_name(device, dtype):
    results = []
    for backend, fused in (("triton", True), ("torch", False)):
        generator = torch.Generator().manual_seed(0)
        normal = lambda: torch.randn(4, 3, generator=generator)  # noqa: B023, E731
        p = torch.nn.Parameter(normal().to(device, dtype))
        with use_backend(backend):
            separable = maps.SeparableNeural([p])
            optimizer = MirrorDescent([p], 0.1, separable, momentum=0.9, fused=fused)
            for _ in range(2):
                p.grad = normal().to(device, dtype)
                optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.gpu
class TestOnADevice:
    """What the interpreter cannot show."""

    @pytest.fixture(autouse=True)
    def _needs_a_device(self, device):
        if device != "cuda":
            pytest.skip("needs a CUDA device")

    def test_a_step_does_not_synchronise(self, device):
        tensors = Tensors(device)
        tensors.step(torch.tensor(0.1, device=device))  # compiles, makes the tables
        with unsynchronised():
            tensors.step(torch.tensor(0.1).to(device, non_blocking=True))
            tensors.grads = [g.clone() for g in tensors.grads]  # new addresses: a new table
            tensors.step(0.1)

    def test_a_step_allocates_nothing_of_the_size_of_the_parameters(self, device):
        tensors = Tensors(device, (((64, 4096), 64), ((1000, 100), 1000)))
        tensors.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tensors.step()
        assert torch.cuda.max_memory_allocated() - before < 4096

    @pytest.mark.parametrize("fresh_table", [False, True])
    def test_a_captured_step_replays(self, device, fresh_table):
        graphed, eager = Tensors(device), Tensors(device)
        lr = torch.tensor(0.1, device=device)
        graphed.step(lr)  # compiles
        eager.step(lr)
        if fresh_table:
            graphed.grads = [g.clone() for g in graphed.grads]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed.step(lr)
        for rate in (0.05, 0.2):
            lr.fill_(rate)
            graph.replay()
            eager.step(lr)
        for p, q in zip(graphed.params, eager.params, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("primal", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dual", [False, True])
def test_without_gains_they_are_one(primal, decay, dual, device):
    torch.manual_seed(0)
    units = [Units(*(x.to(device) for x in make_units(2, 1, torch.Generator().manual_seed(0))))]
    results = []
    for gains in ([], [torch.ones(40, device=device)]):
        params = [torch.linspace(-2, 2, 40, device=device)]
        options = {"weight_decay": decay, "primal": primal}
        if dual:
            options["duals"] = [torch.linspace(-1, 1, 40, device=device)]
        with use_backend("triton"):
            status = separable_step_(
                params, [torch.cos(params[0])], LR, gains, units, **options
            )
        assert status.item() == Status.CONVERGED
        results.append(params + options.get("duals", []))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
        assert x.abs().max() > 0.5


def test_a_buffer_that_overflows_keeps_parameter_and_state(device):
    start = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    grad = torch.tensor([1.0, 1e5, -3e5, 2.0], device=device)
    units = [Units(*torch.zeros(3, 1, 1, device=device))]
    params, buffers = [start.clone()], [torch.zeros(4, dtype=torch.float16, device=device)]
    with use_backend("triton"):
        status = separable_step_(
            params, [grad], 1e-3, [], units, buffers=buffers, momentum=0.9, primal=True
        )
    assert status.item() == Status.NONFINITE
    torch.testing.assert_close(params[0], start - torch.tensor([1e-3, 0, 0, 2e-3], device=device))
    assert buffers[0].tolist() == [1.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("grad", [float("inf"), -float("inf"), -3e38])
def test_only_a_solve_that_ends_the_step_reaches_its_limit(grad, device):
    units = [Units(*torch.zeros(3, 1, 1, device=device))]
    params = [torch.ones(2, device=device)]
    with use_backend("triton"):
        status = separable_step_(
            params, [torch.full((2,), grad, device=device)], 10.0, [], units, primal=False
        )
    assert status.item() == Status.NONFINITE
    assert params[0].tolist() == [1.0, 1.0]


def test_tables_are_made_on_the_cpu_whatever_the_default_device(device):
    with torch.device("meta"):
        assert plans._programs(((1, 300, True), (4, 3, False))).device.type == "cpu"


def test_tables_are_remembered_by_several_threads(device):
    recent, errors = plans._Recent(), []

    def work(seed):
        try:
            for i in range(2000):
                key = (i * 7 + seed) % 200
                assert recent.make(key, lambda key=key: str(key)) == str(key)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len(recent) <= plans._MAX_RECENT


def test_rows_of_a_graph_lie_in_memory_that_was_there_before(device, monkeypatch):
    monkeypatch.setattr(plans, "_SLAB", 64)
    allocated = []

    def allocate(size):
        allocated.append(size)
        return torch.zeros(size, dtype=torch.int64)

    pinned, rows = plans._Pinned(allocate), torch.arange(24).view(2, 12)
    plain = pinned.copy(rows, capturing=False)
    assert allocated == [64, 24]
    captured = [pinned.copy(rows + i, capturing=True) for i in range(2)]
    assert allocated == [64, 24]
    again = pinned.copy(rows, capturing=False)  # with too little left for the next graph
    assert allocated == [64, 24, 64, 24]
    for copy, shift in ((plain, 0), (captured[0], 0), (captured[1], 1), (again, 0)):
        assert torch.equal(copy, rows + shift)
    pinned.copy(torch.zeros(9, 12), capturing=True)
    assert allocated[4:] == [108]  # more than is left: the allocator may have it
