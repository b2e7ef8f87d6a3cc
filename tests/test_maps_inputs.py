"""What maps take, and what they say of what they do not."""

import math

import pytest
import torch
from maps_cases import CASES, OWNERS, learned
from torch import Tensor

from mirror_opt import NewtonError, maps
from mirror_opt.errors import InputError
from mirror_opt.newton import Status

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maps.create("nonsense", []), "choose one of"),
        (lambda: maps.create("pnorm", [], power=3), "power"),
        (lambda: maps.PNorm(1.0), "above 1"),
        (lambda: maps.PNorm("a"), "Invalid p='a'"),
        (lambda: maps.PNorm(1.5, eps=None), "Invalid eps=None"),
        (lambda: maps.Hypentropy("x"), "Invalid beta='x'"),
        (lambda: maps.NegativeEntropy("no"), "Invalid simplex='no': pass True or False"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], rho="a"), "Invalid rho='a'"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], eps=None), "Invalid eps=None"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], units=True), "Invalid units=True"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], sigma=["a"]), "Invalid sigma="),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], seed=1.5), "Invalid seed=1.5"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], seed=2**70), "Invalid seed="),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], terms=2, eps=0), "eps=0 with terms=2"),
        (lambda: maps.PNorm(2.0, eps=-1), "at least 0"),
        (lambda: maps.Hypentropy(0.0), "above 0"),
        (lambda: maps.KroneckerNeural([]), "no parameters"),
        (lambda: maps.KroneckerNeural([torch.zeros(2, dtype=torch.long)]), "int64"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], terms=0), "terms=0"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], eps=1.0), r"eps=1\.0"),
        (lambda: maps.KroneckerNeural([torch.zeros(2)], units=-1), "units=-1"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], rho=1.0), r"rho=1\.0"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], sigma="relu"), "algebraic"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], share="row"), "share='row'"),
        (lambda: maps.SeparableNeural([torch.zeros(2)], parametrization="both"), "primal"),
        (lambda: maps.Diagonal([torch.zeros(2)]).check([torch.zeros(3)]), "shapes"),
        (lambda: maps.Diagonal([torch.zeros(2)])([torch.zeros(2)] * 2), "got 2"),
        *(
            (lambda name=name: maps.create(name, torch.zeros(2, 2)), "got one tensor: pass a seq")
            for name in OWNERS
        ),
        *(
            (lambda n=name, s=s: maps.create(n, [torch.zeros(4, 3)]).inverse([torch.zeros(s)]), m)
            for name in OWNERS
            for s, m in (((3, 4), r"shape \(3, 4\)"), ((1, 3), r"built for \(4, 3\)"))
        ),
        (lambda: maps.Euclidean().bregman([torch.zeros(3)], [torch.zeros(1)]), "of one shape"),
        (lambda: maps.NegativeEntropy().inverse(torch.zeros(3)), "got one tensor: pass a sequ"),
        (lambda: maps.PNorm()(torch.zeros(3)), "got one tensor: pass a sequence"),
        (lambda: maps.PNorm().potential(torch.zeros(3)), "got one tensor: pass a sequence"),
        (lambda: maps.Euclidean().bregman([None], [torch.zeros(1)]), "None in both"),
        (lambda: maps.Euclidean().bregman([torch.zeros(1)], []), "for 1 tensors and got 0"),
        (lambda: maps.NegativeEntropy().check([torch.ones(2)]), "sum to 1"),
        (lambda: maps.NegativeEntropy(simplex=False).check([-torch.ones(2)]), "positive"),
    ],
)
def test_bad_input_says_what_to_pass(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("call", ["check", "forward", "inverse"])
@pytest.mark.parametrize("name", OWNERS)
def test_tensors_whose_dtype_does_not_fit(name, call):
    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.full(shape, 0.5, dtype=dtype) for shape in ((3, 2), (2,))]

    served = {torch.float32: (torch.float32, *HALVES), torch.float64: (torch.float64,)}
    for built in (torch.float32, torch.float64, *HALVES):
        mirror_map = maps.create(name, tensors(built))
        wide = torch.promote_types(built, torch.float32)
        for dtype in (torch.float32, torch.float64, *HALVES):
            if dtype in served[wide]:
                getattr(mirror_map, call)(tensors(dtype))
                continue
            needed = torch.promote_types(dtype, torch.float32)
            with pytest.raises(InputError, match=rf"tensor 0 in {needed}.*\.to\({needed}\)"):
                getattr(mirror_map, call)(tensors(dtype))
            getattr(mirror_map.to(needed), call)(tensors(dtype))
            mirror_map.to(wide)
        # The second alone, so that the check looks at each.
        mixed = [
            tensors(built)[0],
            tensors(torch.float64 if wide == torch.float32 else HALVES[0])[1],
        ]
        with pytest.raises(InputError, match="tensor 1"):
            getattr(mirror_map, call)(mixed)
        with pytest.raises(InputError, match=r"own parameters are torch\.bfloat16"):
            getattr(mirror_map.bfloat16(), call)(tensors(torch.bfloat16))


def test_half_precision_parameters_get_float32_maps():
    for name, cls in maps.REGISTRY.items():
        if cls.owns_tensors:
            x = torch.linspace(-1, 1, 6, dtype=torch.bfloat16).reshape(3, 2)
            mirror_map = maps.create(name, [x])
            assert {p.dtype for p in mirror_map.parameters()} == {torch.float32}
            for way in (mirror_map.forward, mirror_map.inverse):
                torch.testing.assert_close(way([x])[0], way([x.float()])[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        c
        for c in CASES
        if not maps.create(c.values[0], [torch.zeros(2, 2)], **c.values[1]).inverse_is_closed
    ],
)
def test_solved_inverse_reports_nonfinite_input(name, options):
    mirror_map = learned(name, options, shapes=((2, 3),))
    with pytest.raises(NewtonError) as caught:
        mirror_map.inverse([torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 3.0]]).double()])
    assert caught.value.status is Status.NONFINITE


def test_pnorm_on_the_meta_device():
    x = torch.randn(3, device="meta")
    assert maps.PNorm(3.0, eps=0.5).inverse([x])[0].shape == (3,)
