"""Products along the modes of a weight, against einsum."""

import itertools

import pytest
import torch

from mirror_opt.maps.modes import fused_mode, mode_product, mode_sizes

SIZES = [(4, 3), (1, 3), (4, 3, 5), (4, 1, 5), (4, 3, 1), (1, 1, 5)]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mode_product(sizes, lead, transpose):
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    # The terms share u, which broadcasts.
    u = torch.randn(*(lead[:1] + (1,) * len(lead[1:])), *sizes, **options)
    factors = [torch.randn(*lead, n, n, **options) for n in sizes]
    modes, others = "abc"[: len(sizes)], "xyz"[: len(sizes)]
    for absent in itertools.product((False, True), repeat=len(sizes)):
        given = [None if a else f for a, f in zip(absent, factors, strict=True)]
        identity = [
            torch.eye(n, **options).expand(*lead, n, n) if a else f
            for a, n, f in zip(absent, sizes, factors, strict=True)
        ]
        matrices = [f.mT if transpose else f for f in identity]
        subscripts = ",".join(f"...{y}{x}" for x, y in zip(modes, others, strict=True))
        expected = torch.einsum(f"...{modes},{subscripts}->...{others}", u, *matrices)
        result = mode_product(u, given, transpose)
        torch.testing.assert_close(result.expand_as(expected), expected)


def test_the_modes_of_weights():
    assert mode_sizes(()) == mode_sizes((7,)) == ()
    assert mode_sizes((4, 3)) == (4, 3)
    assert mode_sizes((4, 3, 2, 5)) == (4, 3, 10)
    assert fused_mode((200, 64)) == 1
    assert fused_mode((32, 64, 32)) == 2
    assert fused_mode((32, 64, 1)) == 0
    assert fused_mode((200, 64, 200)) is None
    assert fused_mode((1, 1)) is None
