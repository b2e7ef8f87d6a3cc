"""A run of the command line ends alike whatever backend serves its operators."""

import pytest

from mirror_opt import backends
from mirror_opt.runs import RunConfig, train

CPP = pytest.mark.skipif(backends.cpp.unavailable() is not None, reason="no CPU library is built")


def losses(tmp_path, backend: str, **options) -> list[float]:
    """The query loss after each number of steps of a short run."""
    config = RunConfig.create(
        "sinusoid", "mirror", shots=4, queries=4, iterations=20, tasks_per_batch=4, train_steps=3,
        adapt_steps="1,3,6", test_tasks=20, **options,
    )  # fmt: skip
    with backends.use_backend(backend):
        return [row["mean"] for row in train(config, tmp_path / backend)]


@CPP
@pytest.mark.parametrize(
    "options",
    [
        {"map": "kronecker"},
        {"map": "separable"},
        {"map": "separable", "map_options": {"parametrization": "primal"}},
    ],
    ids=str,
)
def test_the_backends_agree(options, tmp_path):
    plain, compiled = (losses(tmp_path, backend, **options) for backend in ("torch", "cpp"))
    assert plain == pytest.approx(compiled, rel=1e-3)
    assert len(set(plain)) == 3  # it adapts
