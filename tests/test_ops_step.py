"""The multi-tensor step against its equations in float64, on every implementation."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from ops_cases import each_step_implementation, random_units  # noqa: F401
from torch import Tensor
from triton_cases import unsynchronised

from mirror_opt import reference
from mirror_opt.backends import use_backend
from mirror_opt.errors import InputError
from mirror_opt.newton import Status
from mirror_opt.ops import separable_inverse, separable_step_
from mirror_opt.reference import Units

LR = 0.2
# Shapes and C: rows with and without a rest, single elements, 0-dim, empty tensors.
SHAPES = (
    ((4, 33), 4), ((7,), 7), ((1025,), 1), ((3, 2, 3, 3), 3), ((), 1), ((5, 32), 5), ((0, 3), 1),
    ((2, 0), 2),
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("each_step_implementation"),
    # torch's compiler imports modules of its own that torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Lists:
    """The lists of a step, and its equations on float64 copies of them."""

    def __init__(
        self, dtype=torch.float32, shapes=SHAPES, count=3, seed=0, *, primal=True, gains=True,
        anchor=False, dual=False, dual_init=False, **options,
    ):  # fmt: skip
        generator = torch.Generator("cpu").manual_seed(seed)
        device = torch.get_default_device()
        wide = torch.promote_types(dtype, torch.float32)
        state = wide if dual else dtype

        def normal(dtype, wanted=True, scale=1.0, shift=0.0):
            draw = [torch.randn(shape, generator=generator, device="cpu") for shape, _ in shapes]
            return [(scale * x + shift).to(device, dtype) for x in draw] if wanted else []

        self.params, self.grads = normal(dtype), normal(dtype)
        self.gains = [x.abs() + 0.5 for x in normal(wide, gains)]
        self.units = [
            Units(*(x.to(wide) for x in random_units(count, columns, seed=i)))
            for i, (_, columns) in enumerate(shapes)
        ]
        momentum = options.get("momentum", 0.0) != 0
        self.lists = {
            "buffers": normal(state, momentum),
            "anchors": normal(state, anchor, 0.1),
            "duals": normal(wide, dual),
            "dual_inits": normal(wide, dual_init, 0.1),
        }
        self.options = {"primal": primal, **options}

    def step(self, lr: float | Tensor = LR, **more) -> Tensor:
        lists = (self.params, self.grads, lr, self.gains, self.units)
        return separable_step_(*lists, **self.lists, **self.options, **more)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.lists["buffers"], *self.lists["duals"]]

    def expected(self, grad_scale: float = 1.0) -> list[Tensor]:
        """What ``tensors`` will be, in float64."""
        options = self.options
        mu, decay = options.get("momentum", 0.0), 1 - LR * options.get("weight_decay", 0.0)
        new: list[list[Tensor]] = [[], [], []]
        for i, p in enumerate(self.params):
            columns = self.units[i].w.shape[1]

            def get(xs, p=p, columns=columns, i=i):
                x = xs[i].double() if xs else torch.zeros(p.shape, dtype=torch.float64)
                return x.reshape(columns, p.numel() // max(columns, 1))

            gain = get(self.gains) if self.gains else torch.ones((), dtype=torch.float64)
            units = Units(*(x.double().unsqueeze(-1) for x in self.units[i]))

            def value(u, gain=gain, units=units):
                return gain * reference.psi(u, units)

            def inverse(t, gain=gain, units=units):
                with use_backend("torch"):
                    return separable_inverse(t, gain, units)

            grad_h, grad_h_star = (value, inverse) if options["primal"] else (inverse, value)
            b, anchor, zeta, z0 = (get(self.lists[k]) for k in self.lists)
            d = get(self.grads) / grad_scale * (-1 if options.get("maximize") else 1)
            if mu:
                b = mu * b + d
                d = d + mu * b if options.get("nesterov") else b
            z = zeta + z0
            if decay != 1 or not self.lists["duals"]:
                x = anchor + grad_h_star(z) if self.lists["duals"] else get(self.params)
                z = grad_h(decay * x - anchor)
            z = z - LR * d
            for results, x in zip(new, (anchor + grad_h_star(z), b, z - z0), strict=True):
                results.append(x.reshape(p.shape))
        return [
            *new[0],
            *(new[1] if self.lists["buffers"] else []),
            *(new[2] if self.lists["duals"] else []),
        ]

    def assert_stepped(self, expected: list[Tensor]) -> None:
        for result, x in zip(self.tensors(), expected, strict=True):
            # Solved to a few units in the last place of 1 and then stored; slopes go down to 0.1.
            eps = torch.finfo(result.dtype).eps
            arithmetic = 60 * torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
            error = (result.double() - x).abs()
            allowed = (0.51 * eps + arithmetic) * x.abs() + 3 * arithmetic
            assert bool((error <= allowed).all()), float((error / allowed).max())


def options():
    for primal, dual, anchor, momentum, decay in itertools.product((True, False), repeat=5):
        yield {
            "primal": primal,
            "dual": dual,
            "dual_init": dual and not anchor,
            "anchor": anchor,
            "gains": not (momentum and anchor),
            "momentum": 0.9 if momentum else 0.0,
            "nesterov": momentum and primal,
            "weight_decay": 0.1 if decay else 0.0,
            "maximize": anchor and decay,
        }


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_of_the_equations(dtype, each_step_implementation):  # noqa: F811
    if dtype == torch.float64 and each_step_implementation.startswith(("cuda", "triton")):
        pytest.skip("float64 is for the CPU")
    for i, chosen in enumerate(options()):
        lists = Lists(dtype, seed=i, **chosen)
        expected = lists.expected()
        assert lists.step() == Status.CONVERGED
        lists.assert_stepped(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(dtype):
    # Several blocks of a launch to a row, aligned and not, with and without a rest.
    shapes = (((3, 5000), 3), ((2, 2049), 2), ((4, 131), 4), ((3001, 2), 3001), ((2, 4096), 2))
    lists = Lists(dtype, shapes=shapes, dual=True, anchor=True, momentum=0.9)
    expected = lists.expected()
    assert lists.step() == Status.CONVERGED
    lists.assert_stepped(expected)


@pytest.mark.parametrize("dual", [False, True])
def test_hundreds_of_small_tensors(dual):
    shapes = [((1 + i % 5, 1 + i % 7), 1 + i % 5) for i in range(300)]
    lists = Lists(shapes=shapes, dual=dual, anchor=dual, primal=not dual)
    expected = lists.expected()
    lists.step()
    lists.assert_stepped(expected)


def test_any_layout_of_memory():
    lists = Lists(dual=True, anchor=True, momentum=0.9, shapes=(((4, 6, 3, 3), 4), ((6, 5), 6)))
    other = Lists(dual=True, anchor=True, momentum=0.9, shapes=(((4, 6, 3, 3), 4), ((6, 5), 6)))
    lists.step()

    def scattered(x):
        if x.dim() == 4:
            return x.to(memory_format=torch.channels_last)
        return torch.stack([x, x], -1)[..., 0]

    for name in ("params", "grads", "gains"):
        setattr(other, name, [scattered(x) for x in getattr(other, name)])
    other.lists = {name: [scattered(x) for x in xs] for name, xs in other.lists.items()}
    strides = [x.stride() for x in other.tensors()]
    other.step()
    assert strides == [x.stride() for x in other.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(lists.tensors(), other.tensors(), strict=True))


def test_rate_scale_and_found_inf_as_tensors():
    lists, plain = Lists(), Lists()
    expected = lists.expected(grad_scale=8.0)
    lists.step(torch.tensor([LR]), grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    lists.assert_stepped(expected)
    status = torch.full((), int(Status.MAX_ITERATIONS), dtype=torch.int32)
    before = [x.clone() for x in plain.tensors()]
    assert plain.step(found_inf=torch.tensor(1.0), status=status) is status
    assert all(torch.equal(a, b) for a, b in zip(before, plain.tensors(), strict=True))
    assert plain.step(status=status) == Status.MAX_ITERATIONS  # raised, never lowered


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dual", [False, True])
def test_elements_that_fail_keep_their_values(bad, dual):
    lists = Lists(dual=dual, anchor=dual, primal=not dual, momentum=0.9, shapes=(((3, 50), 3),))
    lists.grads[0][1, 7] = bad
    before = [x.clone() for x in lists.tensors()]
    grads = lists.grads[0].clone()
    lists.grads[0].nan_to_num_(0.0, 0.0, 0.0)
    expected = lists.expected()
    lists.grads[0].copy_(grads)
    assert lists.step() == Status.NONFINITE
    for new, old, x in zip(lists.tensors(), before, expected, strict=True):
        assert new[1, 7] == old[1, 7]
        x[1, 7] = old[1, 7]
    lists.assert_stepped(expected)


def test_a_result_beyond_the_range_of_its_dtype_is_not_stored():
    lists = Lists(torch.float16, shapes=(((40,), 1),), gains=False)
    lists.grads[0][:] = 0
    lists.grads[0][3] = -60000
    lists.params[0][3] = 60000
    before = lists.params[0].clone()
    assert lists.step() == Status.NONFINITE  # 60000 + 0.2 * 60000
    assert torch.equal(lists.params[0], before)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.03, 0.3, 3, 100, 1e30])
def test_gradients_of_any_size(size):
    lists = Lists(shapes=(((3, 50), 3),))
    lists.grads = [x * size for x in lists.grads]
    expected = lists.expected()
    assert lists.step() == Status.CONVERGED
    lists.assert_stepped(expected)


def test_results_do_not_depend_on_neighbours(each_step_implementation):  # noqa: F811
    if not each_step_implementation.startswith("cpp"):
        pytest.skip("what is computed together is the C++ library's choice")
    # Moves for which a series is proven, beside some for which it is not and some that fail.
    lists, other = (Lists(shapes=(((1000,), 1),)) for _ in range(2))
    for x in (lists, other):
        x.grads[0][::7] *= 100
        x.grads[0][::91] = math.nan
    for xs in (other.params, other.grads, other.gains):
        xs[0] = xs[0].flip(0)
    assert lists.step() == other.step() == Status.NONFINITE
    assert torch.equal(lists.params[0], other.params[0].flip(0))


def test_two_runs_and_any_number_of_threads_give_the_same_bits():
    shapes = (((7, 1999), 7), ((9000,), 9000), ((3, 5), 3))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        lists = Lists(shapes=shapes, momentum=0.9)
        lists.step()
        results.append(lists.tensors())
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autograd_sees_the_change():
    lists = Lists()
    versions = [x._version for x in lists.tensors()]
    lists.step()
    assert all(x._version > v for x, v in zip(lists.tensors(), versions, strict=True))


def test_no_temporary_of_the_size_of_the_parameters(each_step_implementation):  # noqa: F811
    if each_step_implementation == "torch":
        pytest.skip("plain PyTorch makes many")
    lists = Lists(shapes=(((8, 10_000), 8), ((50_000,), 1)), dual=True, anchor=True, momentum=0.9,
                  weight_decay=0.1)  # fmt: skip
    lists.step()
    if each_step_implementation.endswith("gpu"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lists.step()
        assert torch.cuda.max_memory_allocated() - before < 4096
        return
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        lists.step()
    grown = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < grown < 1000


def test_steps_on_a_device_do_not_synchronise_and_replay_from_a_graph(
    each_step_implementation,  # noqa: F811
):
    if not each_step_implementation.endswith("gpu"):
        pytest.skip("needs a CUDA device")
    graphed, eager, lr = Lists(momentum=0.9), Lists(momentum=0.9), torch.tensor(LR)
    graphed.step(lr)  # what is compiled on first use
    eager.step(lr)
    with unsynchronised():
        graphed.step(lr)
        eager.step(lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(lr)
    for rate in (0.05, 0.2):
        lr.fill_(rate)
        graph.replay()
        eager.step(lr)
    assert all(torch.equal(a, b) for a, b in zip(graphed.tensors(), eager.tensors(), strict=True))


def test_opcheck_and_compiled_once_for_all_rates():
    lists = Lists(shapes=(((3, 4), 3), ((5,), 5)), dual=True, anchor=True)
    args = (
        lists.params, lists.grads, torch.tensor(LR), lists.gains,
        *map(list, zip(*lists.units, strict=True)), *lists.lists.values(), None, None,
        torch.zeros((), dtype=torch.int32), 0.0, 0.0, False, False, True, "algebraic",
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.mirror_opt.separable_step_, args)
    assert set(results.values()) == {"SUCCESS"}

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lists.step, fullgraph=True, backend=counter)
    plain, counts = Lists(shapes=(((3, 4), 3), ((5,), 5)), dual=True, anchor=True), []
    for rate in (0.1, 0.2, 0.3):
        compiled(torch.tensor(rate))
        plain.step(torch.tensor(rate))
        assert all(torch.equal(a, b) for a, b in zip(lists.tensors(), plain.tensors(), strict=True))
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


def test_lists_that_do_not_fit_are_refused_before_anything_changes():
    def attempt(message, **changes):
        lists = Lists(dual=True, shapes=(((3, 4), 3), ((5,), 5)))
        for name, change in changes.items():
            if name in lists.lists:
                lists.lists[name] = change(lists.lists[name])
            elif name == "options":
                lists.options.update(change)
            else:
                setattr(lists, name, change(getattr(lists, name)))
        before = [x.clone() for x in lists.tensors()]
        with pytest.raises(InputError, match=message):
            lists.step()
        assert all(torch.equal(a, b) for a, b in zip(before, lists.tensors(), strict=True))

    attempt("2 params and 1 grads: pass one for each", grads=lambda xs: xs[:1])
    attempt(r"gains\[1\] has shape \(4,\): pass that of params\[1\]",
            gains=lambda xs: [xs[0], xs[1][:4]])
    attempt("momentum=0.9: pass buffers", options={"momentum": 0.9})
    attempt(r"units\[1\] has 4 channels", units=lambda us: [us[0], random_float_units(4)])
    attempt(r"units\[0\] has shapes", units=lambda us: [Units(us[0].w[:2], *us[0][1:]), us[1]])
    attempt("dual state of params.0. are torch.float16: pass torch.float32",
            duals=lambda xs: [x.half() for x in xs])
    attempt(r"grads\[1\] is torch.float64: pass a floating dtype that torch.float32 holds",
            grads=lambda xs: [xs[0], xs[1].double()])
    attempt(r"anchors\[0\] is torch.float64", anchors=lambda xs: [
        torch.zeros(3, 4, dtype=torch.float64), torch.zeros(5)])
    attempt(r"grads\[0\] is torch.int64", grads=lambda xs: [xs[0].long(), xs[1]])
    attempt(r"anchors\[1\] is on meta: pass all tensors on cpu",
            anchors=lambda xs: [torch.zeros(3, 4), torch.zeros(5, device="meta")])
    for status in (torch.zeros(()), torch.zeros(2, dtype=torch.int32),
                   torch.zeros((), dtype=torch.int32, device="meta")):
        attempt("status is of .*: pass one int32 on cpu", options={"status": status})
    for scalar in (torch.ones(2), torch.ones((), device="meta")):
        attempt("found_inf has shape", options={"found_inf": scalar})
        attempt("grad_scale has shape", options={"grad_scale": scalar})
        with pytest.raises(InputError, match="lr has shape"):
            Lists().step(scalar)


def random_float_units(columns):
    return Units(*(x.float() for x in random_units(3, columns)))
