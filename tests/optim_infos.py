"""The optimizer test inputs of torch itself, described for MirrorDescent with several maps.

``torch.testing`` describes an optimizer by an ``OptimizerInfo``; PyTorch's generic optimizer tests
run over those. They are not in the wheel, so what they check is written over the same inputs in
test_optim_inputs.py and test_optim_costs.py.
"""

import functools

import pytest
import torch
from optim_cases import learned
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mirror_opt import MirrorDescent, backends


def construct(name, map_options, params, **kwargs):
    """MirrorDescent over the map of this name, off its identity start, one for each group."""
    params = list(params)
    if params and isinstance(params[0], dict):
        groups = [{**group, "params": _as_list(group["params"])} for group in params]
        for group in groups:
            group["mirror_map"] = learned(name, tensors(group["params"]), map_options)
        return MirrorDescent(groups, **kwargs)
    return MirrorDescent(params, mirror_map=learned(name, tensors(params), map_options), **kwargs)


def _as_list(params):
    return [params] if isinstance(params, torch.Tensor) else list(params)


def tensors(params):
    return [p[1] if isinstance(p, tuple) else p for p in params]


def inputs(device, dtype=None):
    options = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "weight decay": {"lr": 0.01, "weight_decay": 0.5},
        "momentum": {"lr": 0.01, "momentum": 0.9},
        "maximize": {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "dual state": {"lr": 0.01, "momentum": 0.5, "dual_state": True},
    }
    return [OptimizerInput(params=None, kwargs=v, desc=k) for k, v in options.items()]


def error_inputs(device, dtype):
    # The base class warns of repeated parameters before a map is chosen.
    common = [
        e for e in get_error_inputs_for_all_optims(device, dtype) if e.error_type is not UserWarning
    ]
    own = {
        r"Invalid momentum=-0.5: pass a number in \[0, 1\)": {"momentum": -0.5},
        r"Invalid lr=-0.1: pass a number in \[0, inf\)": {"lr": -0.1},
        "is torch.complex64: pass float16.*view_as_complex": {
            "params": [torch.ones(2, 2, dtype=torch.complex64)]
        },
    }
    for regex, kwargs in own.items():
        params = kwargs.pop("params", None)
        given = OptimizerInput(params=params, kwargs=kwargs, desc=regex)
        common.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=regex))
    return common


def info(name, **map_options):
    separable = name == "separable" and backends.cpp.unavailable() is None
    return OptimizerInfo(
        functools.partial(construct, name, map_options),
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        supported_impls=("foreach", "differentiable", *["fused"] * separable),
        supports_fused_on=("cpu",) if separable else (),
        not_og_supported_flags=(
            "foreach",
            "fused",
            "maximize",
            "nesterov",
            "dual_state",
            "anchor",
            "rounding",
        ),
        supports_complex=False,
    )


INFOS = {
    "euclidean": info("euclidean"),
    "pnorm": info("pnorm", p=1.5),
    "hypentropy": info("hypentropy", beta=0.1),
    "negative-entropy": info("negative-entropy"),
    "diagonal": info("diagonal"),
    "separable": info("separable"),
    "separable-primal": info("separable", parametrization="primal"),
    "kronecker": info("kronecker"),
}
over_maps = pytest.mark.parametrize("name", INFOS)


def every(name, *skip):
    """The optimizer's class and all inputs, with each of the flags that exclude each other."""
    i = INFOS[name]
    return i.optim_cls, _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, i, skip)


def start(seed=0, dtype=torch.float32, shapes=((4, 3), (3,))):
    """Parameters inside the domain of every map."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [d.softmax(-1).to(dtype).requires_grad_() for d in draws]


def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps=3, first=0):
    for k in range(first, first + steps):
        give(params, k)
        optimizer.step()


def close(xs, ys, factor=16):
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype
        eps = factor * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=eps, atol=eps)


class Operators(TorchDispatchMode):
    """Names the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


class counting(Operators):  # noqa: N801
    """The operators of these prefixes that run inside."""

    def __init__(self, *prefixes):
        super().__init__()
        self.prefixes = prefixes

    def __enter__(self):
        super().__enter__()
        return lambda: [name for name in self.names if name.startswith(self.prefixes)]
