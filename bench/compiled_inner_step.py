"""The meta-learner's inner step, eager and compiled: KroneckerNeural against gradient descent.

    python bench/compiled_inner_step.py

A second-order meta-gradient on sinusoids, 4 tasks of 5 inner steps each, one thread: by
`MetaLearner.meta_loss`, and with the inner step of docs/examples/compiled_inner_step.py, as it is
and compiled. All three in turn, medians; the first call's compilation apart. Rows in
bench/results/compiled_inner_step.json.
"""

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import add_rows, revision
from torch.nn import functional as F

from mirror_opt.fewshot import make_task
from mirror_opt.maps import create
from mirror_opt.meta import MetaLearner
from mirror_opt.runs.results import versions

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "compiled_inner_step.py"
TASKS, STEPS, LR = 4, 5, 0.01
# By method: gradient descent takes the inner step of torch.optim.SGD.
MAPS = {
    "gradient descent (MAML)": "euclidean",
    "Diagonal (Meta-SGD)": "diagonal",
    "Meta-Curvature": "meta-curvature",
    "KroneckerNeural": "kronecker",
}


def seconds(learner: MetaLearner, loss: Callable[[], torch.Tensor]) -> float:
    learner.zero_grad()
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    example = runpy.run_path(str(EXAMPLE))
    plain = example["inner_step"]
    task = make_task("sinusoid", shots=10)
    batch = task.sample("train", 0, tasks=TASKS)
    rows = []
    for name, registered in MAPS.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = task.model()
        learner = MetaLearner(model, create(registered, model.parameters()), lr=LR, steps=STEPS)
        compiled = torch.compile(plain, fullgraph=True)
        ways = {
            "meta_loss": lambda learner=learner: learner.meta_loss(F.mse_loss, *batch),
            "eager": lambda learner=learner: example["meta_loss"](learner, plain, batch),
            "compiled": lambda learner=learner, step=compiled: example["meta_loss"](
                learner, step, batch
            ),
        }
        first = {way: seconds(learner, loss) for way, loss in ways.items()}
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, loss in ways.items():
                taken[way].append(seconds(learner, loss))
        for way, values in taken.items():
            cuts = statistics.quantiles(values, n=5)
            ratio = statistics.median(v / e for v, e in zip(values, taken["eager"], strict=True))
            rows.append(
                {
                    "name": name,
                    "way": way,
                    "seconds": statistics.median(values),
                    "p20": cuts[0],
                    "p80": cuts[3],
                    "ratio": ratio,
                    "first": first[way],
                    "tasks": TASKS,
                    "steps": STEPS,
                    "repeats": repeats,
                    "threads": 1,
                    "revision": revision(),
                    **versions("cpu"),
                }
            )
            print(f"{name:24} {way:10} {1e3 * rows[-1]['seconds']:8.2f} ms   {ratio:.2f} of eager")
    add_rows("compiled_inner_step", rows)


if __name__ == "__main__":
    main()
