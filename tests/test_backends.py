"""Which backend is chosen, and what is said where one cannot serve."""

import json
from types import SimpleNamespace

import pytest
import torch
from ops_cases import operands

import mirror_opt
from mirror_opt import backends, maps
from mirror_opt.backends import cpp, cuda, library, plain, triton, use_backend
from mirror_opt.errors import InputError
from mirror_opt.ops import separable_forward
from mirror_opt.reference import Units

needs_library = pytest.mark.skipif(cpp.unavailable() is not None, reason="it is not built")


@pytest.fixture(autouse=True)
def _own_choice(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.delenv("MIRROR_OPT_BACKEND", raising=False)


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As on a machine where the CPU library was not built."""
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    library.load.cache_clear()
    yield tmp_path
    library.load.cache_clear()


def chosen() -> str:
    return next(row.name for row in backends.status() if row.chosen)


def choice(dtype=torch.float32, units=3, sigma="algebraic", operator="forward"):
    return backends.choose(operator, torch.zeros(1, dtype=dtype), units, sigma)


def test_call_and_context_manager():
    assert mirror_opt.use_backend is use_backend
    with use_backend("torch"):
        assert chosen() == "torch"
        with use_backend("auto"):
            assert not any(row.chosen for row in backends.status())
        assert chosen() == "torch"
    assert not any(row.chosen for row in backends.status())
    use_backend("torch")
    assert chosen() == "torch"


def test_environment(monkeypatch):
    monkeypatch.setenv("MIRROR_OPT_BACKEND", "torch")
    assert chosen() == "torch"
    assert choice() is plain
    monkeypatch.setenv("MIRROR_OPT_BACKEND", "fortran")
    with pytest.raises(InputError, match="no backend named 'fortran': choose one of auto, "):
        choice()
    with use_backend("torch"):
        assert choice() is plain


@needs_library
def test_the_fastest_that_serves_is_chosen():
    assert choice() is cpp
    assert choice(torch.float64) is cpp
    assert choice(torch.float16) is plain
    assert choice(torch.float16, operator="step_") is cpp
    assert choice(sigma="tanh") is plain
    assert choice(units=65) is plain
    assert backends.choose("forward", torch.zeros(1, device="meta"), 3, "algebraic") is plain


@needs_library
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sigma": "tanh"}, "it has sigma='algebraic' only and got 'tanh'"),
        ({"dtype": torch.float16}, "it takes torch.float32, torch.float64 and got torch.float16"),
        ({"units": 65}, "it takes up to 64 units and got 65"),
        ({"operator": "rotate"}, "it has no such operator"),
    ],
)
def test_a_chosen_backend_does_not_give_way(options, reason):
    with use_backend("cpp"), pytest.raises(InputError, match=reason):
        choice(**options)


@needs_library
def test_a_map_says_what_its_backend_lacks():
    x = torch.ones(3)
    separable = maps.SeparableNeural([x], parametrization="primal", sigma="tanh")
    with use_backend("cpp"), pytest.raises(InputError, match="serve the operator forward"):
        separable([x])
    assert torch.equal(separable([x])[0], x)


def test_a_choice_holds_again_each_time_it_is_entered():
    before = backends.chosen()
    choice = use_backend("torch")
    for _ in range(2):
        with choice:
            assert backends.chosen() == "torch"
            with choice:
                assert backends.chosen() == "torch"
            assert backends.chosen() == "torch"
        assert backends.chosen() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_needs_a_device():
    triton.unavailable.cache_clear()
    if triton.unavailable() is None:
        pytest.skip("the interpreter is switched on")
    with pytest.raises(InputError, match=r"backend 'triton' is not available: .*CUDA device"):
        use_backend("triton")
    assert not any(row.chosen for row in backends.status())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_needs_a_device():
    with pytest.raises(InputError, match="backend 'cuda' is not available: there is no CUDA devic"):
        use_backend("cuda")


def on_cuda(dtype=torch.float32):
    """What a choice asks of a tensor on a CUDA device."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_cuda_is_chosen_where_triton_is_not(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    assert backends.choose("step_", on_cuda(), 3, "algebraic") is triton
    with use_backend("cuda"):
        assert backends.choose("step_", on_cuda(), 3, "algebraic") is cuda
    monkeypatch.setattr(triton, "unavailable", lambda: "it is not installed")
    assert backends.choose("step_", on_cuda(torch.bfloat16), 3, "algebraic") is cuda
    assert backends.choose("step_", on_cuda(torch.float64), 3, "algebraic") is plain
    assert backends.choose("step_", torch.zeros(1), 3, "algebraic") is not cuda


@pytest.mark.parametrize(
    ("x", "units", "sigma", "reason"),
    [
        (on_cuda(torch.float64), 3, "algebraic", "and got torch.float64"),
        (on_cuda(), 65, "algebraic", "it takes up to 64 units and got 65"),
        (on_cuda(), 3, "tanh", "it has sigma='algebraic' only and got 'tanh'"),
        (torch.zeros(1), 3, "algebraic", "it runs on CUDA devices and got a tensor on cpu"),
    ],
)
def test_what_cuda_does_not_serve(x, units, sigma, reason, monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    message = f"backend 'cuda' does not serve the operator step_: .*{reason}"
    with use_backend("cuda"), pytest.raises(InputError, match=message):
        backends.choose("step_", x, units, sigma)


def test_without_the_library(without_library):
    row = next(row for row in backends.status() if row.name == "cpp")
    assert row.reason == "it was not built: install with a C++ compiler at hand"
    assert row.runs_on is None
    with pytest.raises(InputError, match="backend 'cpp' is not available: it was not built"):
        use_backend("cpp")
    u, gain, *units = operands((3, 4), (3, 4), (3, 1))
    assert choice() is plain
    assert separable_forward(u, gain, Units(*units)).isfinite().all()


def test_the_reason_of_the_build_is_told(without_library):
    report = {"cpu": "it could not be built: no compiler"}
    (without_library / "build.json").write_text(json.dumps(report))
    assert cpp.unavailable() == report["cpu"]


def test_a_library_that_does_not_load_is_told(without_library):
    (without_library / "libmirror_opt_cpu.so").write_bytes(b"no library")
    assert "libmirror_opt_cpu.so does not load" in cpp.unavailable()


def test_status_has_a_row_for_each_backend():
    rows = backends.status()
    assert [row.name for row in rows] == list(backends.BACKENDS)
    assert all((row.reason is None) == (row.runs_on is not None) for row in rows)
    assert rows[-1].name == "torch"
    assert rows[-1].reason is None
