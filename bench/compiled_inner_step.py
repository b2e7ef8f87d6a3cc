"""The meta-learner's inner step, eager and compiled: KroneckerNeural against gradient descent.

    python bench/compiled_inner_step.py

A second-order meta-gradient on sinusoids, 4 tasks of 5 inner steps each, one thread: by
`MetaLearner.meta_loss`, and with the inner step of docs/examples/compiled_inner_step.py, as it is
and compiled. All in turn, medians; the first call's compilation apart. Rows in
bench/results/compiled_inner_step.json.
"""

import argparse
import runpy
from collections.abc import Callable
from pathlib import Path

import torch
from in_turn import in_turn
from results import add_rows
from torch.nn import functional as F

from mirror_opt.fewshot import make_task
from mirror_opt.maps import create
from mirror_opt.meta import MetaLearner

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "compiled_inner_step.py"
TASKS, STEPS, LR = 4, 5, 0.01
# By method: gradient descent takes the inner step of torch.optim.SGD.
MAPS = {
    "gradient descent (MAML)": "euclidean",
    "Diagonal (Meta-SGD)": "diagonal",
    "Meta-Curvature": "meta-curvature",
    "KroneckerNeural": "kronecker",
}


def ways(registered: str) -> dict[str, Callable[[], None]]:
    """The meta-gradient with a map: by the learner, and by the example's step in two ways."""
    example = runpy.run_path(str(EXAMPLE))
    plain = example["inner_step"]
    compiled = torch.compile(plain, fullgraph=True)
    task = make_task("sinusoid", shots=10)
    batch = task.sample("train", 0, tasks=TASKS)
    torch.manual_seed(0)
    model = task.model()
    learner = MetaLearner(model, create(registered, model.parameters()), lr=LR, steps=STEPS)

    def backward(loss: Callable, *arguments) -> None:
        learner.zero_grad()
        loss(*arguments).backward()

    return {
        "meta_loss": lambda: backward(learner.meta_loss, F.mse_loss, *batch),
        "eager": lambda: backward(example["meta_loss"], learner, plain, batch),
        "compiled": lambda: backward(example["meta_loss"], learner, compiled, batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    contenders = {(name, way): run for name, registered in MAPS.items()
                  for way, run in ways(registered).items()}  # fmt: skip
    rows = []
    for (name, way), row in in_turn(contenders, repeats, lambda key: (key[0], "meta_loss")).items():
        rows.append({"name": name, "way": way, "tasks": TASKS, "steps": STEPS, **row})
        print(f"{name:24} {way:10} {1e3 * row['seconds']:8.2f} ms, "
              f"{row['ratio']:.2f} of meta_loss; first {row['first']:.1f} s")  # fmt: skip
    add_rows("compiled_inner_step", rows)


if __name__ == "__main__":
    main()
